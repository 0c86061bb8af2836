"""What the scripts for a GPU compute without one: floors, tables, and what came of tests."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from model_tools import load_script

GPU_SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts" / "gpu"
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@functools.cache
def script(name: str) -> ModuleType:
    sys.path.insert(0, str(GPU_SCRIPTS))  # where it finds its parts, as when it is run
    try:
        return load_script(f"gpu/{name}")
    finally:
        sys.path.remove(str(GPU_SCRIPTS))


def test_bytes_of_a_real_model() -> None:
    table = script("compare_table")
    assert table.weight_bytes(CONFIG) == pytest.approx(1.19e9, rel=0.01)
    assert table.kv_bytes(CONFIG) == 114_688


def test_the_floor_counts_every_read_once() -> None:
    """Against a loop over all steps and sequences."""
    table = script("compare_table")
    inputs, outputs = [10, 3, 7], [4, 9, 1]
    read = (max(outputs) - 1) * table.weight_bytes(CONFIG)
    for before, after in zip(inputs, outputs, strict=True):
        read += sum(before + token for token in range(1, after)) * table.kv_bytes(CONFIG)
    assert table.floor_bytes(CONFIG, inputs, outputs, 3) == pytest.approx(read)
    # One after the other, no step is shared.
    alone = sum(table.floor_bytes(CONFIG, [i], [o], 1) for i, o in zip(inputs, outputs, strict=True))
    assert table.floor_bytes(CONFIG, inputs, outputs, 1) == pytest.approx(alone)


def row(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    def run(engine: str, speed: float) -> dict[str, Any]:
        return {
            **{"engine": engine, "tok_s": speed, "tokens": 500, "seconds": 500 / speed, "ttft_ms": 5.0},
            **{"tpot_ms": 1e3 / speed, "client_cpu": [0.1], "prompt_lengths": [128, 128], "counters": {}},
            **{"inputs": [128], "outputs": [500]},
        }

    return {
        "row": {"concurrency": 1, "clients": 1},
        "config": CONFIG,
        "runs": [run("microvllm", s) for s in ours] + [run("vllm", s) for s in theirs],
        "commands": {
            "microvllm": ["/usr/bin/python", "-m", "microvllm.cli", "--port", "4711", "/tmp/m/name"]
        },
        "ready_s": {"microvllm": 4.0, "vllm": None},
        "on_the_gpu": ["microvllm:name", "vllm:name"],
    }


def test_files_are_merged_into_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"gpu": "Some GPU", "vllm": "1.2"}
    files: list[Path] = []
    for name, speeds in (("0.6b-1", ([90.0, 100.0, 120.0], [50.0, 40.0, 60.0])), ("7b-1", ([30.0], [30.0]))):
        files.append(tmp_path / f"{name}.json")
        here = machine | ({"gpu": "NVIDIA H200, 580"} if name == "7b-1" else {})
        files[-1].write_text(json.dumps({"machine": here, "rows": {name: row(*speeds)}}))
    sys_argv, sys.argv = sys.argv, ["compare.py", "table", *map(str, files)]
    try:
        script("compare").main()
    finally:
        sys.argv = sys_argv
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| Qwen2-7B, 1 stream") and "**1.00**" in lines[2]
    assert lines[3].startswith(
        "| Qwen3-0.6B, 1 stream, 128 / 500 | 100.0 (90.0 to 120.0) | 50.0 (40.0 to 60.0)"
    )
    assert "| **2.00** | 10.00 (20.00) | 5.0 (5.0) | - |" in lines[3]  # nobody has measured that GPU
    share = script("compare_table").floor_bytes(CONFIG, [128], [500], 1) / (500 / 30.0) / 4.594e12
    assert lines[2].endswith(f" | {share:.0%} ({share:.0%}) |") and 0 < share < 1
    assert lines[5:7] == ["gpu Some GPU, vllm 1.2", "gpu NVIDIA H200, 580, vllm 1.2"]
    assert lines[-1].strip() == "python3 -m microvllm.cli --port PORT name"


def test_lengths_of_the_rows_are_those_of_the_workload() -> None:
    """As the client rounds them: down and up from the mean."""
    import math

    found = script("compare").ROWS["0.6b-256"]
    assert math.floor(found.input * (1 - found.ratio)) == 100
    assert math.ceil(found.output * (1 + found.ratio)) == 1024
    assert found.prompts % found.clients == 0 and found.concurrency % found.clients == 0


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("=== 3 failed, 40 passed, 2 skipped in 9.1s ===", (40, 3, 2)),
        ("1 passed, 1 error in 2s", (1, 1, 0)),
        ("no tests ran", (0, 0, 0)),
    ],
)
def test_what_came_of_tests_is_read_from_their_summary(output: str, counts: tuple[int, int, int]) -> None:
    assert script("checks").pytest_counts(output) == counts
