"""What the tests of the comparison of engines share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bench.engines import Engine
from bench.rounds import Row
from bench.workloads import Case

from microvllm.openai_compat.bench.client import Measured, RequestResult

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
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


def script_engine(name: str, delay: float = 0.0, program: str = ENGINE) -> Engine:
    return Engine(name, "1.0", "float32", [sys.executable, "-c", program, str(delay), "{port}"])


def state_of(process: int) -> str:
    """The letter of its state; "" if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")


def request_result(ttft: float, latency: float, tokens: int, error: str = "") -> RequestResult:
    return RequestResult(error, ttft, latency, [1.0] * (tokens - 1), 10, tokens)


ONE = Case("streams", "1 stream", ((10, 10),), concurrency=1)


def row(name: str, *speeds: float, case: Case = ONE) -> Row:
    """An engine that gave these many tokens a second in the rounds."""
    reports = [Measured([request_result(5 / speed, 10 / speed, 10)], 10 / speed, 0.01) for speed in speeds]
    engine = Engine(name, "1.0", "float32", ["x"], remark="`x`")
    return Row(engine, [1.5], 0.01, 700_000_000, {case: reports})
