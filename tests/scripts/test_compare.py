"""The comparison of engines: workloads, servers that are scripts, whole runs with them, and the report."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from types import SimpleNamespace
from unittest.mock import MagicMock

import gguf
import msgspec
import numpy as np
import pytest
from http_tools import eventually
from model_tools import load_script
from tiny_models import make_hf_folder, write_gguf

from microvllm.adapters.registry import load_spec

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import compare  # noqa: E402
from bench import engines, floor, plots, report, rounds  # noqa: E402
from bench.engines import Engine, Setup, Spec, build, named  # noqa: E402
from bench.rounds import Row  # noqa: E402
from bench.servers import Server, busy_neighbour, stop_all  # noqa: E402
from bench.weights import Weights, gguf_format  # noqa: E402
from bench.workloads import OFFLINE, WORKLOADS, Case, Sizes, cases_of, nano_lengths  # noqa: E402

from microvllm.openai_compat.bench.client import (  # noqa: E402
    BenchError,
    Completion,
    Conversation,
    Measured,
    RequestResult,
    measure,
)
from microvllm.openai_compat.bench.workloads import Span  # noqa: E402

# ---------------------------------------------------------------- workloads


def test_nano256_has_the_lengths_of_nano_vllms_benchmark() -> None:
    """Its README tells the sum of the answers."""
    (case,) = WORKLOADS["nano256"](Sizes())
    assert sum(output for _, output in case.lengths) == 133_966
    assert (len(case.lengths), case.concurrency, case.request_rate) == (256, 256, math.inf)
    assert case.lengths == nano_lengths()
    assert {100 <= length <= 1024 for pair in case.lengths for length in pair} == {True}


@pytest.mark.parametrize(
    ("name", "requests", "prompts", "answers", "at_once"),
    [
        ("single", 4, Span(128, 512), Span(500, 500), 1),
        ("concurrent35", 35, Span(128, 512), Span(500, 500), 35),
        ("prefill1000", 4, Span(1000, 1000), Span(1, 1), 1),
    ],
)
def test_the_workloads_as_they_are_described(
    name: str, requests: int, prompts: Span, answers: Span, at_once: int
) -> None:
    (case,) = WORKLOADS[name](Sizes())
    assert (len(case.lengths), case.at_once, case.arrivals(0)) == (requests, at_once, [])
    for prompt, answer in case.lengths:
        assert prompts.low <= prompt <= prompts.high and answers.low <= answer <= answers.high
    users = case.users("ids", 3)
    assert [(len(u.prompt), u.output_len) for u in users if isinstance(u, Completion)] == list(case.lengths)
    assert case == WORKLOADS[name](Sizes())[0] != WORKLOADS[name](Sizes(quick=True))[0]


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_prompts_differ_in_and_between_rounds_and_repeat_by_seed(kind: str) -> None:
    case = Case("w", "l", ((32, 4),) * 50, concurrency=1)
    prompts = [str(user) for user in case.users(kind, 1)]
    assert prompts == [str(user) for user in case.users(kind, 1)]
    assert len(set(prompts) | {str(user) for user in case.users(kind, 2)}) == 100
    for user in case.users(kind, 1):
        assert isinstance(user, Completion)
        assert len(user.prompt.split() if isinstance(user.prompt, str) else user.prompt) == 32


def test_the_users_of_a_chat_share_their_beginning_and_nothing_else() -> None:
    (case,) = WORKLOADS["chat"](Sizes())
    users = case.users("text", 5)
    assert len(users) == case.at_once == 16
    talks = [user for user in users if isinstance(user, Conversation)]
    assert len({talk.system for talk in talks}) == 1 and len(talks[0].system.split()) == case.shared_len
    assert len({message for talk in talks for message in talk.messages}) == 16 * case.turns
    assert case.longest > case.shared_len + case.turns * 128


def test_arrivals_are_a_poisson_process_and_the_same_for_every_engine() -> None:
    case = Case("sweep", "l", ((1, 1),) * 4000, request_rate=8.0)
    times = case.arrivals(1)
    assert times == case.arrivals(1) != case.arrivals(2)
    gaps = np.diff([0.0, *times])
    assert fmean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert pstdev(gaps) == pytest.approx(1 / 8, rel=0.1), "of an exponential distribution"
    steady = Case("sweep", "l", ((1, 1),) * 4000, request_rate=8.0, burstiness=100.0).arrivals(1)
    assert pstdev(np.diff(steady)) == pytest.approx(1 / 80, rel=0.1)


def test_sizes_replace_a_workloads_own_and_a_neighbour_doubles_the_cases() -> None:
    sizes = Sizes(streams=[1, 8], input_len=Span(5, 5), output_len=Span(7, 7), request_rates=[3.0])
    cases = cases_of(["streams", "sweep"], sizes, busy=True)
    assert [str(case) for case in cases[:3]] == [
        "streams, 1 stream",
        "streams, 8 streams",
        "sweep, 3 requests/s",
    ]
    assert [str(case) for case in cases[3:]] == [f"{case}, busy neighbour" for case in cases[:3]]
    assert {length for case in cases for length in case.lengths} == {(5, 7)}
    assert cases[1].shortened(2).lengths == ((5, 2),) * 8
    assert cases[1].shortened(9, 3).lengths == ((5, 7),) * 3
    assert Case("single", "l", ((9, 7),) * 3, concurrency=1).shortened(2, 5).lengths == ((9, 2),)
    chat = Case("chat", "l", ((10, 4), (20, 4)), turns=3, shared_len=100)
    assert (chat.work, chat.shortened(1, 9).work, chat.shortened(1).turns) == (119, 67, 3)


# ---------------------------------------------------------------- engines that are scripts

ENGINE = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from subprocess import Popen

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        event = lambda **fields: f"data: {json.dumps(fields)}\\n\\n".encode()
        choice = {"delta": {"content": "a"}} if "messages" in body else {"text": "a"}
        data = b"".join(event(choices=[choice]) for _ in range(body["max_tokens"]))
        data += event(choices=[], usage={"completion_tokens": body["max_tokens"], "prompt_tokens": 9})
        time.sleep(float(sys.argv[1]))
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *args): pass

Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as engines have processes of their own
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


GET = """
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'vllm:num_preemptions_total{engine="0"} 7.0\\n')
        self.close_connection = True
"""


def script_engine(name: str, delay: float = 0.0, program: str = ENGINE) -> Engine:
    return Engine(name, "1.0", "float32", [sys.executable, "-c", program, str(delay), "{port}"])


def state_of(process: int) -> str:
    """The letter of its state; "" if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")


@needs_proc
def test_a_server_is_halted_resumed_and_ended_with_all_its_processes(tmp_path: Path) -> None:
    server = Server(script_engine("one"), tmp_path)
    try:
        server.wait_ready(60)
        processes = server.processes()
        assert len(processes) == 2
        assert 0 < server.ready_s < 60
        assert server.memory() > 1e6
        assert server.cpu_seconds() > 0
        server.halt()
        eventually(lambda: {state_of(process) for process in processes} == {"T"})
        server.resume()
        eventually(lambda: "T" not in {state_of(process) for process in processes})
        server.halt()
    finally:
        stop_all([server])
    assert server.processes() == [] and server.ended()
    assert all(state_of(process) in ("", "Z") for process in processes)


@needs_proc
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            script_engine("one", program="print('a\\nb', flush=True); raise SystemExit('no such model')"),
            "ended while it started: a / b / no such model",
        ),
        (script_engine("one", program="import time; time.sleep(60)"), "no answer within 0.3 s"),
        (Engine("one", "1", "f32", ["/no/such/program"]), "cannot start /no/such/program"),
    ],
)
def test_a_server_that_does_not_start_says_why(tmp_path: Path, engine: Engine, message: str) -> None:
    with ExitStack() as stack, pytest.raises(BenchError, match=message):
        server = Server(engine, tmp_path)
        stack.callback(server.stop)
        server.wait_ready(60 if "ended" in message else 0.3)


@needs_proc
def test_a_busy_neighbour_takes_processor_time_while_the_block_runs() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())

    before = children()
    with busy_neighbour():
        (process,) = children() - before
        stat = Path(f"/proc/{process}/stat")
        end = time.monotonic() + 60
        while int(stat.read_text().rpartition(")")[2].split()[11]) < 20:  # hundredths of a second
            assert time.monotonic() < end, "it rests"
            time.sleep(0.01)
    assert children() == before


# ---------------------------------------------------------------- the whole comparison, with such scripts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF file, for the comparison to find."""
    folder = tmp_path_factory.mktemp("compare")
    return write_gguf(
        folder / "tiny.gguf", make_hf_folder(folder / "hf", "llama", hidden_size=288), quantization="Q8_0"
    )


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
    words = [sys.executable, str(SCRIPTS / "compare.py"), "--model", str(model), "--device", "cpu", *options]
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
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
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


# ---------------------------------------------------------------- the engines that are known


def setup_for(model: Path, tmp_path: Path, **programs: str) -> Setup:
    file = model if model.is_file() else None
    return Setup(Weights(model, file, tmp_path, lambda line: None), "cpu", 512, 3, programs)


def test_engines_get_the_same_weights_and_their_own_flags(tmp_path: Path, model: Path) -> None:
    llama = tmp_path / "llama-server"
    llama.write_text("#!/bin/sh\necho 'version: 77 (abc)' >&2\n")
    llama.chmod(0o755)
    setup = setup_for(model, tmp_path, **{"llama.cpp": str(llama)})
    specs = named(
        [
            Spec.parse("microvllm"),
            Spec.parse("name=ours-q4 kind=microvllm args='--block-size 32 --seed 1' env='A=1 B=2'"),
            Spec.parse("microvllm dtype=float32"),
            Spec.parse("hf-generate dtype=float32"),
            Spec.parse("llama.cpp"),
            Spec.parse("llama.cpp dtype=bf16 args='--threads 2'"),
            Spec.parse("name=mine url=http://localhost:1/v1 model=m"),
        ]
    )
    ours, q4, plain, loop, file, converted, other = (build(spec, setup) for spec in specs)
    assert [spec.name for spec in specs] == [
        *(
            "microvllm",
            "ours-q4",
            "microvllm float32",
            "hf-generate float32",
            "llama.cpp",
            "llama.cpp bf16",
            "mine",
        )
    ]
    assert str(model) in ours.command and ours.weights == ("Q8_0" if ours.quantized else "bfloat16")
    assert plain.weights == "float32" and not plain.quantized and "dequantized" in plain.command
    assert q4.command[-4:] == ["--block-size", "32", "--seed", "1"]
    assert (q4.environment["A"], q4.environment["B"]) == ("1", "2")
    assert str(tmp_path / "hf-float32") in loop.command
    assert json.loads((tmp_path / "hf-float32" / "config.json").read_text())["model_type"] == "llama"
    assert str(model) in file.command and (file.weights, file.version) == ("Q8_0", "77 (abc)")
    assert file.quantized and not converted.quantized
    assert file.command[file.command.index("--parallel") + 1] == "3"
    assert converted.command[-2:] == ["--threads", "2"] and converted.weights == "bf16"
    assert str(tmp_path / "tiny.bf16.gguf") in converted.command
    spec = load_spec(tmp_path / "tiny.bf16.gguf")
    quantized = load_spec(model)
    assert msgspec.structs.replace(spec, dtype=quantized.dtype) == quantized, "only the number format differs"
    assert gguf_format(tmp_path / "tiny.bf16.gguf") == "BF16"
    assert other.target(other.url).url == "http://localhost:1" and other.target(other.url).model == "m"
    assert ours.command_at(99)[ours.command.index("--port") + 1] == "99"


def test_command_lines_on_a_gpu(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache size for both engines, each with the others in the GPU's memory; flags of the user last."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho vllm 0.26\necho torch 2.11\necho microvllm 0.1\n")
    python.chmod(0o755)
    monkeypatch.setattr(engines, "_microvllm_defaults", lambda *_: ("bfloat16", "triton", False))
    setup = replace(setup_for(model.parent / "hf", tmp_path), device="cuda", context=4096)
    setup = replace(setup, kv_cache_bytes=23_000_000_000)
    shared = f"--model {model.parent / 'hf'} --served-model-name bench"
    end = "--host 127.0.0.1 --port {port} --kv-cache-memory-bytes 23000000000"
    both = f"--max-model-len 4096 --enable-prompt-tokens-details --disable-uvicorn-access-log {end}"
    offline = f"scripts/bench/offline_server.py {{}} {model.parent / 'hf'} {{{{port}}}} --max-model-len 4096"
    offline += " --kv-cache-memory-bytes 23000000000"
    expected = {
        "microvllm": f"-m microvllm.cli serve {shared} --device cuda --dtype bfloat16 {both}",
        "vllm args='--seed 1'": f"-m vllm.entrypoints.openai.api_server {shared} --dtype bfloat16 {both} "
        "--gpu-memory-utilization 0.35 --seed 1",
        "microvllm-offline": offline.format("microvllm").format(port="{port}"),
        "vllm-offline": offline.format("vllm").format(port="{port}"),
    }
    for text, words in expected.items():
        engine = build(Spec.parse(f"{text} program={python}"), setup)
        assert " ".join(engine.command).removeprefix(f"{python} ").removeprefix(f"{SCRIPTS.parent}/") == words
        assert engine.offline == (engine.workloads == (OFFLINE,)) == ("offline" in text)
    alone = build(Spec.parse(f"vllm program={python}"), replace(setup, kv_cache_bytes=None))
    assert alone.command[-1] == "{port}", "alone in the GPU's memory it sizes its own cache"


def test_llama_cpp_wants_a_gguf_file(tmp_path: Path, model: Path) -> None:
    setup = setup_for(model.parent / "hf", tmp_path, **{"llama.cpp": sys.executable})
    with pytest.raises(BenchError, match="--gguf FILE"):
        build(Spec("llama.cpp", "llama.cpp"), setup)


@needs_proc
def test_hugging_face_generate_answers_as_a_server(tmp_path: Path, model: Path) -> None:
    """Whole: the adapter on a tiny model, requests of several lengths in one batch, and a chat."""
    engine = build(
        Spec.parse("name=loop kind=hf-generate dtype=float32 env='OMP_NUM_THREADS=1'"),
        setup_for(model.parent / "hf", tmp_path),
    )
    server = Server(engine, tmp_path)
    try:
        server.wait_ready(120)
        words = ["the lazy dog", "a block is shared", "the"]
        users = [Completion(prompt, length) for prompt, length in zip(words, (3, 9, 5), strict=True)]
        together = measure(server.target, users)
        alone = measure(server.target, users, concurrency=1)
        chats = measure(server.target, [Conversation("Be brief.", ("Hello", "the dog"), 4)])
    finally:
        server.stop()
    assert not together.errors + alone.errors + chats.errors
    assert [request.completion_tokens for request in together.requests] == [3, 9, 5]
    assert [request.text for request in together.requests] == [request.text for request in alone.requests]
    assert chats.requests[1].prompt_tokens > chats.requests[0].prompt_tokens + 4


# ---------------------------------------------------------------- the report


def request_result(ttft: float, latency: float, tokens: int, error: str = "") -> RequestResult:
    return RequestResult(error, ttft, latency, [1.0] * (tokens - 1), 10, tokens)


ONE = Case("streams", "1 stream", ((10, 10),), concurrency=1)
OPEN = Case("sweep", "2 requests/s", ((10, 10),), request_rate=2.0)
FACTS = {
    "machine": {"cpu": "A CPU", "cores": 2, "flags": ["avx2"], "gpus": [], "system": "Linux", "load": 0.5},
    "date": "today", "model": "m", "rounds": 3, "remark": ", small", "command": "python compare.py",
    "left_out": {"vllm": "not found"},
    "no_time": [],
}  # fmt: skip


def row(name: str, *speeds: float, case: Case = ONE) -> Row:
    """An engine that gave these many tokens a second in the rounds."""
    reports = [Measured([request_result(5 / speed, 10 / speed, 10)], 10 / speed, 0.01) for speed in speeds]
    engine = Engine(name, "1.0", "float32", ["x"], remark="`x`")
    return Row(engine, [1.5], 0.01, 700_000_000, {case: reports})


GOLDEN = """\
A CPU, 2 cores (avx2), Linux, load 0.5 beforehand, today.
m, greedy; median (least to most) of 3 rounds, small.
`python compare.py`

| workload | engine | tokens/s | ours is | first token, p50 (p99) | each further token | whole request |
|---|---|---|---|---|---|---|
| streams, 1 stream | ours (float32) | 30.0 (10.0 to 40.0) |  | 167 (493) ms | 18.5 (54.8) ms | 333 (987) ms |
|  | other (float32) | 10.0 (5.0 to 10.0) | 3.00 (2.00 to 4.00) x as fast | 500 (990) ms | 55.6 (110.0) ms \
| 1,000 (1,980) ms |

| engine | weights | version | ready after | memory | CPU when idle | |
|---|---|---|---|---|---|---|
| ours | float32 | 1.0 | 1.5 s | 0.70 GB | 1 % | `x` |
| other | float32 | 1.0 | 1.5 s | 0.70 GB | 1 % | `x` |

* streams, 1 stream: 1 requests a round, 10 tokens in, 10 out

The client took at most 4 % of a core.

Left out: vllm: not found."""


def test_the_report_is_this_one_and_ratios_are_taken_within_a_round() -> None:
    rows = [row("ours", 10, 40, 30), row("other", 5, 10, 10)]
    assert report.markdown(rows, [ONE], FACTS) == GOLDEN


def test_quantised_weights_are_compared_with_quantised_ones() -> None:
    rows = [row("ours", 40), row("ours 16", 20), row("theirs", 20), row("theirs 16", 20)]
    for each, kind, quantized in zip(rows, ("a", "a", "b", "b"), (True, False, True, False), strict=True):
        each.engine = replace(each.engine, kind=kind, quantized=quantized)
    ratios = [line.split("|")[4].strip() for line in report.markdown(rows, [ONE], FACTS).splitlines()[6:10]]
    assert ratios == ["", "", "2.00 x as fast", "1.00 x as fast (float32)"]


def test_an_open_loop_is_compared_by_the_time_of_a_request_and_a_prefill_by_its_prompts() -> None:
    text = report.markdown([row("ours", 20, case=OPEN), row("other", 5, case=OPEN)], [OPEN], FACTS)
    assert "4.00 x as fast" in text
    prefill = Case("prefill1000", "1 stream", ((1000, 1),), concurrency=1)
    text = report.markdown([row("ours", 20, case=prefill)], [prefill], FACTS)
    assert "| 20.0 in |" in text


def test_throughput_kept_beside_a_busy_neighbour_errors_and_caches() -> None:
    busy = Case("streams", "1 stream", ((10, 10),), concurrency=1, busy=True)
    one = row("ours", 40, 50, 60)
    one.reports[busy] = row("", 20, 20, 45).reports[ONE]
    text = report.markdown([one], [ONE, busy], FACTS)
    assert "| ours (float32) | 0.50 (0.40 to 0.75) |" in text
    one.reports[ONE].append(Measured([request_result(1, 1, 3, "3 tokens in place of 10")], 1.0, 0.0))
    assert "Error with ours (float32): 3 tokens in place of 10" in report.markdown([one], [ONE], FACTS)
    chat = Case("chat", "2 users", ((10, 10),), turns=2)
    talk = row("ours", 10, case=chat)
    talk.requests(chat)[0].cached_tokens = 9
    assert "taken from the prefix cache: ours 90 %." in report.markdown([talk], [chat], FACTS)


def test_each_result_is_in_the_form_of_vllms_client() -> None:
    result = report.as_json([row("ours", 10, 40)], [ONE], FACTS, detailed=False)
    assert [(each["label"], each["round"]) for each in result["results"]] == [("ours", 1), ("ours", 2)]
    assert [each["output_throughput"] for each in result["results"]] == [10.0, 40.0]
    assert "itls" not in result["results"][0]
    json.dumps(result, allow_nan=False)


def test_plots_are_drawn_for_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Case("streams", "2 streams", ((10, 10),) * 2, concurrency=2)
    fast = Case("sweep", "4 requests/s", ((10, 10),), request_rate=4.0)
    one = row("ours", 10, 20)
    for case in (two, OPEN, fast):
        one.reports |= row("", 10, 30, case=case).reports
    files = plots.draw([one, row("other", 5)], [ONE, two, OPEN, fast], tmp_path)
    assert [file.name for file in files] == ["throughput.png", "latency.png", "sweep.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    failed = Measured([request_result(0, 0, 0, "refused")], 1.0, 0.0)
    none = Row(one.engine, reports={case: [failed] for case in (ONE, two, OPEN, fast)})
    files = plots.draw([none], [ONE, two, OPEN, fast], tmp_path)
    assert [file.name for file in files] == ["throughput.png"], "no times to draw"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match="pip install matplotlib"):
        plots.draw([one], [ONE], tmp_path)


# ---------------------------------------------------------------- the floor

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


def test_bytes_of_a_real_model() -> None:
    assert floor.weight_bytes(CONFIG) == pytest.approx(1.19e9, rel=0.01)
    assert floor.kv_bytes(CONFIG) == 114_688


def test_the_floor_counts_every_read_once() -> None:
    """Against a loop over all steps and sequences."""
    one = floor.Floor(1000, 10, 2.0)
    inputs, outputs = [10, 3, 7], [4, 9, 1]
    read = (max(outputs) - 1) * 1000
    for before, after in zip(inputs, outputs, strict=True):
        read += sum(before + token for token in range(1, after)) * 10
    assert one.seconds(inputs, outputs, 3) == pytest.approx(read / 2)
    # One after the other, no step is shared.
    alone = sum(one.seconds([i], [o], 1) for i, o in zip(inputs, outputs, strict=True))
    assert one.seconds(inputs, outputs, 1) == pytest.approx(alone)


def test_the_read_rate_is_that_of_the_gpu_or_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = floor.Floor.of(tmp_path, ["NVIDIA H200, 580.159"])
    assert found == floor.Floor(floor.weight_bytes(CONFIG), 114_688, 4.594e12)
    assert floor.Floor.of(tmp_path, ["NVIDIA L4"]) is None, "nobody has measured that one"
    given = floor.Floor.of(tmp_path, ["NVIDIA L4"], 0.3e12)
    assert given is not None and given.bytes_s == 0.3e12
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts": 8}))
    assert floor.Floor.of(tmp_path, ["NVIDIA H200"]) is None


# ---------------------------------------------------------------- other number formats of a GGUF file


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3)])
def test_converted_gguf_has_the_same_values_and_metadata(
    tmp_path: Path, dtype: str, tolerance: float
) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "<end>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_file_type(3)
    matrix = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    vector = np.arange(5, dtype=np.float32)
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("m", gguf.quants.quantize(matrix, q8), raw_dtype=q8)
    writer.add_tensor("v", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    assert load_script("write_checkpoint").main([str(source), str(target), "--dtype", dtype]) == 0

    before, after = gguf.GGUFReader(source), gguf.GGUFReader(target)
    names = {name for name in before.fields if not name.startswith("GGUF.")} - {"general.file_type"}
    assert names == {name for name in after.fields if not name.startswith("GGUF.")}
    for name in names:
        assert after.fields[name].contents() == before.fields[name].contents()
        assert after.fields[name].types == before.fields[name].types
    old, new = ({tensor.name: tensor for tensor in reader.tensors} for reader in (before, after))
    assert new["m"].tensor_type.name == dtype.upper() and new["v"].tensor_type.name == "F32"
    values = gguf.quants.dequantize(new["m"].data, new["m"].tensor_type)
    np.testing.assert_allclose(
        values, gguf.quants.dequantize(old["m"].data, q8), rtol=tolerance, atol=1e-6 * bool(tolerance)
    )
    np.testing.assert_array_equal(new["v"].data, vector)
