"""The scripts that prove something: each must see what is wrong, and nothing where nothing is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from fake_client import FakeClient
from http_tools import real_server
from model_tools import ROOT, load_script, variant_folder


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("compare_vllm")
    for name in ("compare_vllm", "compare_cases"):
        sys.modules.pop(name, None)


def answer(compare: ModuleType, body: Any, status: int = 200, media_type: str = "application/json") -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return compare.Answer(status, media_type, httpx.Headers(), content)


def frames(*events: Any) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"


def token(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}


CHOICE = {
    "text": "a",
    "finish_reason": "stop",
    "logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]},
}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"text": "b"}, ['.choices.text: "a" / "b"']),
        ({"finish_reason": "length"}, ['.choices.finish_reason: "stop" / "length"']),
        ({"finish_reason": None}, ['.choices.finish_reason: "stop" / null']),
        ({"more": 1}, [".choices.more: only theirs"]),
        ({"logprobs": {"token_logprobs": [-1.001], "top_logprobs": [{"a": -1.001}]}}, []),
        (
            {"logprobs": {"token_logprobs": [-1.5], "top_logprobs": [{"b": -1.0}]}},
            [
                ".choices.logprobs.token_logprobs: another value",
                ".choices.logprobs.top_logprobs: other tokens",
            ],
        ),
    ],
)
def test_differences_of_two_bodies(compare: ModuleType, changed: dict[str, Any], found: list[str]) -> None:
    case = compare.Case("case", "POST", "/v1/completions")
    ours = answer(compare, {"id": "1", "choices": [CHOICE]})
    theirs = answer(compare, {"id": "2", "choices": [{**CHOICE, **changed}]})
    assert sorted(compare.differences(case, ours, theirs)) == found


def test_the_order_of_keys_and_the_status_count(compare: ModuleType) -> None:
    case = compare.Case("case", "POST", "/v1/completions")
    ours, theirs = answer(compare, {"id": "1", "object": "x"}), answer(compare, {"object": "x", "id": "2"})
    assert list(compare.differences(case, ours, theirs)) == [": order of the keys"]
    refused = answer(compare, {"error": {}}, 400)
    assert list(compare.differences(case, ours, refused)) == ["status 200 / 400"]


def test_differences_of_two_streams(compare: ModuleType) -> None:
    case = compare.Case("case", "POST", "/v1/completions")
    stream = "text/event-stream"
    ours = answer(compare, frames(token("a"), token("b"), token("c", "stop")), media_type=stream)
    cut_elsewhere = answer(compare, frames(token("ab"), token(""), token("c", "stop")), media_type=stream)
    # Each event shows its own text, so a cut may be seen there; what the stream says in all is the same.
    found = list(compare.differences(case, ours, cut_elsewhere))
    assert not any(line.startswith((".text", ".chunks", ".ends", ".order")) for line in found)
    merged = answer(compare, frames(token("a"), token("bc", "length")), media_type=stream)
    found = list(compare.differences(case, ours, merged))
    assert {line.partition(":")[0] for line in found} >= {".chunks", ".ends.finish_reason"}


def test_a_drawn_answer_is_compared_by_its_shape(compare: ModuleType) -> None:
    case = compare.Case("case", "POST", "/v1/completions", random=True)
    ours = answer(compare, {"choices": [CHOICE]})
    theirs = answer(compare, {"choices": [{**CHOICE, "text": "z", "finish_reason": "length"}]})
    assert not list(compare.differences(case, ours, theirs))
    theirs = answer(compare, {"choices": [{**CHOICE, "index": 0}]})
    assert list(compare.differences(case, ours, theirs)) == [".choices.index: only theirs"]


def test_every_request_has_a_name_of_its_own(compare: ModuleType) -> None:
    names = [case.name for case in compare.cases("m")]
    assert len(names) > 900 and len(set(names)) == len(names)


def test_a_server_equals_itself_and_not_another(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "^(completions|chat) (echo|stop=)|^(de)?tokenize [mpit]"
    recording = tmp_path / "answers.json"

    def run(ours: int, theirs: str, *flags: str) -> int:
        address = f"http://127.0.0.1:{ours}"
        monkeypatch.setattr(sys, "argv", ["compare", address, theirs, "--only", only, *flags])
        status: int = compare.main()
        return status

    with real_server(FakeClient()) as port, real_server(FakeClient(max_model_len=128)) as other:
        url = f"http://127.0.0.1:{port}"
        assert run(port, url, "--record", str(recording)) == 0
        assert "0 differences that are not explained" in capsys.readouterr().out
        assert run(port, str(recording)) == 0
        assert run(other, str(recording)) == 1
        assert ".max_model_len: 128 / 256" in capsys.readouterr().out


def test_what_the_benchmark_client_counted() -> None:
    script = load_script("check_clients")
    right = {
        "completed": 2,
        "failed": 0,
        "total_output_tokens": 6,
        "output_lens": [3, 3],
        "itls": [[0.1, 0.1], [0.1, 0.1]],
        "errors": ["", ""],
    }
    assert not list(script.mismatches(right, 2, 3, 2))
    wrong = {**right, "total_output_tokens": 5, "output_lens": [3, 2], "itls": [[0.1, 0.1, 0.1], [0.1]]}
    assert len(list(script.mismatches(wrong, 2, 3, 2))) == 4
    assert list(script.mismatches({**right, "errors": ["", "a\nb"]}, 2, 3, 2)) == ["request 1: b"]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_front_end_alone(endpoint: str) -> None:
    script = load_script("bench_frontend")
    args = argparse.Namespace(
        model=str(variant_folder("llama-tied")),
        endpoint=endpoint,
        streams=5,
        output_len=40,
        running=None,
        steps_per_second=200.0,
        extra_body="{}",
        profile=False,
        server_arguments=[],
    )
    report = script.measure(args)
    assert report["tokens"] == 200
    assert 5 <= report["chunks"] <= 200  # a busy machine may join tokens
    assert report["chunks"] + report["joined_tokens"] == report["tokens"]


def test_the_table_of_faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows against a server of a tiny model, and a third that misses its target."""
    faults = load_script("faults")

    def few(args: argparse.Namespace) -> Any:
        yield from faults.burst(args, 20)
        yield faults.Figure("one more", "0", "1", False)

    monkeypatch.setattr(faults, "TRAILER_CONNECTIONS", 2)
    monkeypatch.setitem(faults.ROWS, "burst", few)
    model = ["--model", str(variant_folder("llama-tied"))]
    monkeypatch.setattr(sys, "argv", ["faults.py", "trailers", *model, "--", "--max-num-seqs", "4"])
    assert faults.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.endswith("|  |") for line in lines[2:])
    monkeypatch.setattr(sys, "argv", ["faults.py", "burst", *model])
    assert faults.main() == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 20 prompts at once | all answered | 20 of 20 |  |",
        "| one more | 0 | 1 | missed |",
    ]
    monkeypatch.setattr(sys, "argv", ["faults.py", "flood"])
    with pytest.raises(SystemExit):
        faults.main()


def invariance_table(script: ModuleType, prompts: int) -> Any:
    """A table of parts in which every prompt has the same answer in every way."""
    table = script.Table()
    table.parts = list(script.parts_of(range(prompts), script.EVERY_WAY))
    for part in table.parts:
        digests = [(f"tokens {i}", f"bits {i}") for i in range(part.first, part.first + part.count)]
        part.modes[script.INVARIANT] = script.Mode(digests, 8, 0.5, hits=1, preemptions=1)
    return table


def test_shards_of_the_invariance_check_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("check_invariance")
    shards = [script.shard_of(f"{i}/3", 1000) for i in (1, 2, 3)]
    assert [number for shard in shards for number in shard] == list(range(1000))
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError):
            script.shard_of(wrong, 1000)
    files = []
    for i, first in enumerate((0, 64)):
        parts = [part for part in invariance_table(script, 128).parts if first <= part.first < first + 64]
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text("".join(json.dumps(dataclasses.asdict(part)) + "\n" for part in parts))
    assert script.main(["--prompts", "128", "--add-up", *map(str, files)]) == 0
    assert "| alone |  | 128 of 128 |  | 16 |  |" in capsys.readouterr().out
    assert script.main(["--prompts", "128", "--add-up", str(files[0])]) == 1, "half of the prompts is missing"
    files[1].write_text(files[1].read_text().replace('"of": ""', '"of": "another model"'))
    with pytest.raises(SystemExit):
        script.main(["--prompts", "128", "--add-up", *map(str, files)])
    assert "parts of other options: another model" in capsys.readouterr().err


def test_an_invariance_check_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("check_invariance")
    table, out, ran = invariance_table(script, 128), tmp_path / "parts.jsonl", []
    found = {(part.way, part.first): part for part in table.parts}

    def measure(args: argparse.Namespace, part: Any, number: int) -> Any:
        ran.append((part.way, part.first))
        return found[part.way, part.first]

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    command = ["--prompts", "128", "--without-fast", "--out", str(out)]
    assert script.main(command) == 0 and sorted(ran) == sorted(found)
    kept = out.read_text().splitlines(keepends=True)[::2]
    out.write_text("".join(kept))
    ran.clear()
    assert script.main(command) == 0, "what was kept counts"
    assert len(ran) == len(found) - len(kept) and len(out.read_text().splitlines()) == len(found)
    with pytest.raises(SystemExit):
        script.main([*command, "--max-tokens", "7"])
    assert "parts of other options: smollm2" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["another bit", "a way without prompts", "no hit", "no preemption"])
def test_the_invariance_check_sees_what_is_wrong(fault: str) -> None:
    script = load_script("check_invariance")
    table = invariance_table(script, 20)
    assert table.print(20, script.EVERY_WAY)
    part = next(part for part in table.parts if part.way == script.PREEMPTED)
    mode = part.modes[script.INVARIANT]
    if fault == "another bit":
        mode.digests[7] = ("tokens 7", "others")
    elif fault == "a way without prompts":
        table.parts.remove(part)
    for each in table.parts:
        each.modes[script.INVARIANT].hits *= fault != "no hit"
        each.modes[script.INVARIANT].preemptions *= fault != "no preemption"
    assert not table.print(20, script.EVERY_WAY)


def test_every_script_has_a_line_in_the_readme() -> None:
    text = (ROOT / "scripts" / "README.md").read_text()
    for path in [*(ROOT / "scripts").iterdir(), *(ROOT / "scripts" / "gpu").iterdir()]:
        name = str(path.relative_to(ROOT / "scripts")) + ("/" if path.is_dir() else "")
        if path.name not in ("README.md", "gpu", "__pycache__"):
            assert f"`{name}`" in text, name
    for name in re.findall(r"^\|? ?`([\w./]+)`", text, re.MULTILINE):
        assert (ROOT / "scripts" / name).exists(), name
