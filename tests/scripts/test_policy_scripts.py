"""The scripts that compare scheduling policies and report the KV cache's figures, on models of nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from model_tools import load_script

SMALL = "--conversations 3 --at-once 2 --turns 3 --system-prompt 400 --message 60-90 --answer 2-5".split()


@pytest.fixture(scope="module")
def kv_figures() -> Any:
    return load_script("kv_figures")


@pytest.fixture(scope="module")
def policies() -> Any:
    return load_script("compare_policies")


def cells(output: str, first: str) -> list[str]:
    (row,) = re.findall(rf"^\| {re.escape(first)} .*$", output, re.MULTILINE)
    found: list[str] = [cell.strip() for cell in row.strip("|").split("|")]
    return found


# ---- KV figures ------------------------------------------------------------------------------------


def test_kv_figures_of_a_short_chat(
    kv_figures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kv.json"
    assert kv_figures.main([*SMALL, "--cases", "torch:16", "torch:4", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["block_size"] for row in rows] == [16, 4]
    for row in rows:
        assert row["requests"] == 9 and row["leaked_blocks"] == row["preemptions"] == 0
        # Nothing is evicted, so that the engine finds all that whole blocks can hold of what is reusable.
        assert row["hit_tokens"] == row["reusable_block_tokens"] > 0
        assert 0 <= row["reusable_tokens"] - row["hit_tokens"] < row["requests"] * row["block_size"]
        assert 0 < row["fragmentation"] <= row["peak_fragmentation"] < 1
    assert rows[0]["reusable_tokens"] == rows[1]["reusable_tokens"] < rows[0]["prompt_tokens"]
    assert rows[1]["fragmentation"] < rows[0]["fragmentation"]
    assert cells(output, "torch | 16 (default)")[-1] == "met"


def test_reuse_that_eviction_prevents_is_seen(kv_figures: Any, tmp_path: Path) -> None:
    """In a pool of hardly more than one conversation the goal is missed, and the exit status says so."""
    file = tmp_path / "kv.json"
    squeezed = [*SMALL, "--cases", "torch", "--system-prompt", "40", "--pool-tokens", "352"]
    assert kv_figures.main([*squeezed, "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())["rows"]
    assert row["reuse"] < kv_figures.MIN_REUSE and not row["meets_goals"] and row["leaked_blocks"] == 0


def test_a_leak_is_a_failure(
    kv_figures: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = kv_figures.Figures("torch", 16, fragmentation=0.01, leaked_blocks=1)
    monkeypatch.setattr(kv_figures, "run", lambda workload, options: figures)
    assert kv_figures.main([*SMALL, "--cases", "torch:16"]) == 1
    assert cells(capsys.readouterr().out, "torch | 16 (default)")[-2:] == ["1", "missed"]


@pytest.mark.parametrize(
    "wrong", [["--cases", "warp:16"], ["--turns", "0"], ["--cases", "torch:x"], ["--answer", "9-2"]]
)
def test_wrong_arguments_of_kv_figures(kv_figures: Any, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kv_figures.main(wrong)
    assert ended.value.code == 2


# ---- policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("matplotlib", [True, False], ids=["plots", "text"])
def test_the_comparison_of_policies(
    policies: Any,
    kv_figures: Any,
    matplotlib: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "config.json").write_text(json.dumps(kv_figures.SMALL_MODEL))
    model = ["--model", str(tmp_path), "--load-format", "dummy"]
    # The wall clock would take both cores, whose threads wait for each other while others use them.
    sizes = ["--requests", "4", "--rounds", "1", "--clock", "cpu"]
    assert policies.main([*model, *sizes, "--plots", str(tmp_path / "plots")]) == 0
    output, errors = capsys.readouterr()
    for policy in ("fcfs", "priority", "sjf"):
        row = cells(output, policy)
        assert row[0] == policy and row[-1] == "4 of 4" and 0 < float(row[-2]) <= 1
    assert float(cells(output, "sjf")[2]) < float(cells(output, "fcfs")[2]), "requests a step"
    assert int(cells(output, "sjf")[3].strip("%")) < int(cells(output, "fcfs")[3].strip("%")), "padding"
    written = sorted(path.name for path in (tmp_path / "plots").rglob("*.*"))
    if matplotlib:
        assert written == ["alignment.png", "alignment.svg", "policies.png", "policies.svg"]
    else:
        assert not written and "pip install 'microvllm[bench]'" in errors
        turns = re.findall(r"^ +(\d+) .*?(#+)$", output.partition("fcfs:")[0], re.MULTILINE)
        assert [len(bar) for _, bar in turns][:11] == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4]


def test_the_figures_of_a_known_run(policies: Any) -> None:
    jobs = [policies.Job([1] * 10, 2, policies.URGENT, 0), policies.Job([1] * 20, 2, policies.ORDINARY, 0)]
    run = policies.Run([0.0, 1.0], [[1.0, 2.0], [1.5, 5.0]], [[7, 7], [8, 8]], batches=[1, 2, 2])
    run.decodes = [[11], [12, 20], [21], []]
    found = policies.figures(jobs, run, run, policies.Alone(0.05, 0.25))
    assert found["tokens/s, all at once"] == 4 / 5 and found["requests a step"] == 5 / 3
    assert found["padding"] == pytest.approx(8 / (11 + 40 + 21))
    assert (found["TTFT p50"], found["TTFT p99"], found["TTFT p99, urgent"]) == (500, 1000, 1000)
    assert (found["latency p50"], found["latency p99"], found["longest wait"]) == (2000, 4000, 3500)
    # Alone they take 1.0 s and 1.5 s: slowdowns of 2 and 8/3.
    assert found["slowdown, mean"] == pytest.approx(7 / 3)
    assert found["fairness"] == pytest.approx((14 / 3) ** 2 / (2 * (4 + 64 / 9)))
    assert policies.fairness([3.0] * 5) == 1.0
    assert policies.fairness([1.0, 0.0, 0.0, 0.0]) == 0.25


def test_a_model_that_is_not_there(policies: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert policies.main(["--model", "/nowhere/model"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
