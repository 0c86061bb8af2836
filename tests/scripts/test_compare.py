"""The comparison of engines: whole runs with servers that are scripts."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import compare
import pytest
from bench import report, rounds
from bench.engines import Engine
from bench.servers import Server
from bench.workloads import OFFLINE, Case
from compare_case import ENGINE, ONE, SCRIPTS, needs_proc, request_result, script_engine, state_of
from http_tools import eventually
from tiny_models import make_hf_folder

from microvllm.adapters.registry import load_spec
from microvllm.openai_compat.bench.client import BenchError, Completion, Measured

GET = """
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'vllm:num_preemptions_total{engine="0"} 7.0\\n')
        self.close_connection = True
"""


def command(
    tmp_path: Path, name: str, delay: float = 0.0, program: str = ENGINE, fields: str = "weights=f32"
) -> list[str]:
    """The option for an engine that is a script."""
    file = tmp_path / f"{name}.py"
    file.write_text(program)
    return ["--engine", f"name={name} {fields} command='{sys.executable} {file} {delay} {{port}}'"]


@needs_proc
@pytest.mark.parametrize("turns", ["halt", "restart", "sequence"])
def test_engines_take_turns_and_the_faster_one_is_reported_so(
    tmp_path: Path,
    model: Path,
    turns: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rounds, "SETTLE_S", 0.0)
    monkeypatch.setattr(rounds, "IDLE_S", 0.05)
    options = [*command(tmp_path, "one"), *command(tmp_path, "two", 0.3)]
    options += command(tmp_path, "three", program="raise SystemExit('refused')")
    options += ["--workload", "streams,chat", "--streams", "1,2", "--output-len", "4", "--rounds", "2"]
    options += ["--turns", turns, "--no-plots", *(["--busy-neighbour"] if turns == "halt" else [])]
    folder = tmp_path / "comparison"
    words = ["compare.py", "--model", str(model), "--device", "cpu", "--out", str(folder), *options]
    monkeypatch.setattr(sys, "argv", words)
    assert compare.main() == 1, "one engine did not start"
    out, err = capsys.readouterr()
    result = json.loads((folder / "result.json").read_text())
    assert [engine["engine"] for engine in result["engines"]] == ["one", "two", "three"]
    loads = ["1 stream", "2 streams", "4 users, 2 turns, 128 shared tokens"]
    seen = Counter((each["label"], each["load"], each["busy_neighbour"]) for each in result["results"])
    busy = (False, True) if turns == "halt" else (False,)
    assert seen == {(name, load, b): 2 for name in ("one", "two") for load in loads for b in busy}
    assert all(each["failed"] == 0 and each["completed"] == each["num_prompts"] for each in result["results"])
    order = [line.split()[2:4] for line in err.splitlines() if line.split()[1:2] == ["round"]]
    cases = len(loads) * len(busy)
    expected = {
        "halt": [[number, name] for number in ("1:", "2:") for _ in range(cases) for name in ("one", "two")],
        "restart": [
            [number, name] for number in ("1:", "2:") for name in ("one", "two") for _ in range(cases)
        ],
        "sequence": [
            [number, name] for name in ("one", "two") for number in ("1:", "2:") for _ in range(cases)
        ],
    }
    assert order == expected[turns]
    ratio = next(line for line in out.splitlines() if "| two (f32) |" in line).split("|")[4]
    assert float(ratio.split()[0]) > 1.0, "the other one waits each time"
    assert "Left out: three: ended while it started: refused" in out
    assert (folder / "report.md").read_text() == out
    (log,) = (folder / "logs").glob("two.log")
    assert log.read_text().count("$ ") == (2 if turns == "restart" else 1)


@needs_proc
def test_an_engine_takes_part_in_its_own_workloads_alone(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "SETTLE_S", 0.0)
    monkeypatch.setattr(rounds, "IDLE_S", 0.05)
    seen: list[int] = []
    shortened = rounds.Case.shortened
    monkeypatch.setattr(rounds.Case, "shortened", lambda self, n, m: seen.append(n) or shortened(self, n, m))
    options = [*command(tmp_path, "one"), *command(tmp_path, "two", fields="workloads=single,chat")]
    options += ["--workload", "streams,single", "--streams", "2", "--output-len", "4", "--rounds", "1"]
    options += ["--no-plots", "--warmup-len", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--model", str(model), "--device", "cpu", *options])
    assert compare.main() == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    found = {(each["label"], each["load"]) for each in result["results"]}
    assert found == {("one", "2 streams"), ("one", "1 stream"), ("two", "1 stream")}
    assert seen == [2, 2, 2], "the longest answer of the turn that warms up"
    assert "streams, 2 streams | one" in capsys.readouterr().out


@needs_proc
def test_a_gpus_comparison_of_random_weights_with_the_share_of_the_floor(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of it but the GPU: a configuration without weights, and engines that are scripts."""
    monkeypatch.setattr(rounds, "SETTLE_S", 0.0)
    monkeypatch.setattr(rounds, "IDLE_S", 0.05)
    monkeypatch.setattr(report, "_gpus", lambda: ["NVIDIA H200, 580"])
    config = tmp_path / "config"
    config.mkdir()
    for file in (model.parent / "hf").glob("*.json"):
        (config / file.name).write_bytes(file.read_bytes())
    counting = ENGINE.replace("    def log_message", GET + "    def log_message")
    options = [*command(tmp_path, "one", program=counting), *command(tmp_path, "two", 0.1)]
    options += ["--workload", "concurrent35,sweep", "--requests", "3", "--output-len", "4", "--no-plots"]
    options += ["--request-rate", "9", "--turns", "halt", "--rounds", "2", "--warmup-len", "2"]
    folder, kept = tmp_path / "out", tmp_path / "kept"
    words = ["compare.py", "--model", str(config), "--device", "cuda", "--out", str(folder), *options]
    monkeypatch.setattr(sys, "argv", [*words, "--keep", str(kept), "--kv-cache-memory-bytes", "9"])
    assert compare.main() == 0
    out = capsys.readouterr().out
    assert load_spec(kept / "config").vocab_size and list((kept / "config").glob("*.safetensors"))
    closed = next(line for line in out.splitlines() if "concurrent35" in line and "| one" in line)
    assert closed.split("|")[-2].strip().endswith("%") and "share of the floor" in out
    assert next(line for line in out.splitlines() if "sweep" in line and "| one" in line).endswith("|  |")
    assert "Preempted requests, warm-up included: one (f32): 7." in out and "4.59 TB/s" in out
    result = json.loads((folder / "result.json").read_text())
    assert [engine["preemptions"] for engine in result["engines"]] == [7, 0]
    assert result["floor"]["bytes_s"] == 4.594e12
    assert "num_preemptions" in (folder / "logs" / "one.metrics").read_text()


@needs_proc
def test_generate_without_a_server_takes_part_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "SETTLE_S", 0.0)
    monkeypatch.setattr(rounds, "IDLE_S", 0.05)
    options = [*command(tmp_path, "one"), "--engine", "microvllm-offline dtype=float32 env=OMP_NUM_THREADS=1"]
    options += ["--workload", "single,offline256", "--requests", "3", "--input-len", "5-9"]
    options += ["--output-len", "2-4", "--rounds", "1", "--no-plots", "--out", str(tmp_path / "out")]
    folder = make_hf_folder(tmp_path / "hf", "llama", vocab_size=10_000)  # the prompts are ids below that
    monkeypatch.setattr(sys, "argv", ["compare.py", "--model", str(folder), "--device", "cpu", *options])
    assert compare.main() == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    (offline,) = [each for each in result["results"] if each["workload"] == OFFLINE]
    assert (offline["label"], offline["completed"]) == ("microvllm-offline float32", 3)
    assert {each["label"] for each in result["results"] if each["workload"] == "single"} == {"one"}
    assert 6 <= offline["total_output_tokens"] <= 12 and offline["total_input_tokens"] >= 15
    assert "| microvllm-offline float32 (float32) |" in capsys.readouterr().out


@needs_proc
def test_a_server_that_runs_already_needs_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is measured, climbing from load to load, and left alone."""
    monkeypatch.setattr(rounds, "SETTLE_S", 0.0)
    monkeypatch.setattr(rounds, "IDLE_S", 0.05)
    server = Server(script_engine("theirs"), tmp_path)
    try:
        server.wait_ready(60)
        options = ["--engine", f"url={server.target.url}/v1/", "--workload", "streams,sweep"]
        options += ["--streams", "1,2", "--request-rate", "20,40", "--requests", "2", "--output-len", "3"]
        options += ["--rounds", "1", "--no-plots", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["compare.py", "--model", "whatever it serves", *options])
        assert compare.main() == 0
        assert not server.ended()
    finally:
        server.stop()
    results = json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    assert [each["load"] for each in results] == ["1 stream", "2 streams", "20 requests/s", "40 requests/s"]
    assert [each["total_output_tokens"] for each in results] == [6, 6, 6, 6]
    assert "whatever it serves, greedy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("minutes", "skipped", "rounds_done"),
    [(0.4, ["sweep, long", "sweep, more"], 1), (1.5, ["sweep, more"], 1), (3.0, [], 1), (10.0, [], 3)],
)
def test_what_would_end_too_late_does_not_begin(
    minutes: float, skipped: list[str], rounds_done: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two engines that need 0.1 s for a token of an answer, on a clock of their own; 100 s a round."""
    now = 0.0

    def pass_time(users: list[Completion], **options: object) -> Measured:
        nonlocal now
        seconds = sum(user.output_len for user in users) / 10
        now += seconds
        return Measured([request_result(1.0, seconds, user.output_len) for user in users], seconds, 0.0)

    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: now))
    server = MagicMock(ended=lambda: False, metrics=lambda: "", measure=pass_time)
    monkeypatch.setattr(rounds.Comparison, "_start", lambda self, row: server)
    monkeypatch.setattr(rounds, "stop_all", lambda servers: None)
    cases = [
        Case("single", "short", ((0, 100),), concurrency=1),
        Case("sweep", "long", ((0, 200),)),
        Case("sweep", "more", ((0, 200),)),
    ]
    plan = rounds.Plan(cases, 3, warmup_len=1, ends=60 * minutes)
    comparison = rounds.Comparison(plan, tmp_path, lambda text: None, lambda text: None)
    comparison.run([Engine("one", "1", "f32"), Engine("two", "1", "f32")])
    assert ([str(case) for case in comparison.skipped], comparison.rounds_done) == (skipped, rounds_done)
    assert now <= 60 * minutes
    for row in comparison.rows:
        assert {str(case): len(reports) for case, reports in row.reports.items()} == {
            str(case): rounds_done for case in cases if str(case) not in skipped
        }


@pytest.mark.parametrize(("ends", "seconds"), [(160.0, 30.0), (math.inf, 600.0), (99.0, 1.0)])
def test_a_server_gets_a_share_of_the_time_that_is_left_to_start(
    ends: float, seconds: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = MagicMock()
    server.wait_ready.side_effect = BenchError("not ready")
    monkeypatch.setattr(rounds, "Server", lambda engine, logs: server)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(rounds, "stop_all", lambda servers: None)
    plan = rounds.Plan([ONE], 1, start_share=0.5, ends=ends)
    said: list[str] = []
    comparison = rounds.Comparison(plan, tmp_path, said.append, lambda text: None)
    comparison.run([Engine("one", "1", "f32")])
    server.wait_ready.assert_called_once_with(seconds)
    assert said[0] == "one (f32) is left out: not ready" and comparison.rows[0].trouble == "not ready"


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_from_outside_it_leaves_no_process_behind(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    options = [*command(tmp_path, "one"), *command(tmp_path, "two", 60.0), "--workload", "single"]
    words = [sys.executable, "-X", "faulthandler", str(SCRIPTS / "compare.py")]
    words += ["--model", str(model), "--device", "cpu", *options]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)

    scripts = {str(tmp_path / name).encode() for name in ("one.py", "two.py")}

    def engines() -> list[int]:
        found = []
        for entry in (entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            found += [int(entry.name)] if scripts.intersection(arguments) else []
        return found

    try:
        eventually(
            lambda: any(state_of(pid) == "T" for pid in engines()), 120
        )  # halted: the other one starts
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(120)
    finally:
        process.send_signal(signal.SIGABRT)  # one that hangs says where; none is left
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 143), err
    assert "Traceback" not in err
    eventually(lambda: engines() == [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/no/such.gguf"], "/no/such.gguf"),
        (["--engine", "vllm program=/no/such/python"], "no engine is left"),
        (["--engine", "sglang"], "'sglang' is none of microvllm"),
        (["--engine", "name=x url=http://x kind=vllm"], "kind=url goes with url="),
        (["--engine", "vllm speed=9"], "'speed' is none of kind"),
        (["--engine", "vllm env=9"], "env is not NAME=VALUE"),
        (["--engine", "vllm workloads=single,solo"], "workloads: 'solo' is none of single"),
        (["--engine", "vllm args='--x"], "No closing quotation"),
        (["--workload", "solo"], "'solo' is none of single"),
        (["--streams", "0"], "--streams"),
        (["--input-len", "9-3"], "ends below its beginning"),
        (["--request-rate", "1,-2"], "is not a number above 0"),
        (["--quick", "--full"], "exclude each other"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(
    tmp_path: Path,
    model: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["compare.py", "--model", str(model), "--device", "cpu", "--out", str(tmp_path / "o"), *options]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises((BenchError, SystemExit)) as caught:
        compare.main()
    refusal = capsys.readouterr().err.splitlines()[-1] if caught.type is SystemExit else str(caught.value)
    assert message in refusal and "\n" not in refusal
