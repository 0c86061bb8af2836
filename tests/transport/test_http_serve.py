"""`serve` as a process: its port, what it prints, signals, the drain, the line of statistics."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from http_tools import eventually, held_port, raw_exchange
from process_tools import PATIENCE_S

from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.metrics import stats_line
from microvllm.openai_compat.server import HttpServer, Signals, force_exit
from microvllm.openai_compat.transport.listen import address_of, bind_socket, release_socket, start_listening
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.metrics.stats import EngineStats

# The real `serve` with the engine's client replaced: argv is the options as JSON.
PROGRAM = """
import asyncio, gc, json, signal, sys
sys.path.insert(0, {tests!r})
from fake_client import fresh
from microvllm.openai_compat import server
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.text.chat_template import ChatTemplate
from microvllm.runtime.text.template_sandbox import Sandbox
from microvllm.runtime.errors import ConfigError

options = json.loads(sys.argv[1])
client = fresh(**options["client"])

class Args:
    def prepare(self, on_progress):
        print("resolving", flush=True)
        return client.config

class Engine:
    @staticmethod
    async def start(config, *, chat_template=None, on_progress=None, spawned=None):
        print("loading", flush=True)
        if chat_template is not None:
            special = client.tokenizer.special_tokens
            client.processor.template = ChatTemplate(chat_template, special, Sandbox())
        await asyncio.sleep(options["load_s"])
        return client

async def close(drain_s=0):
    print("frozen", gc.get_freeze_count() > 10_000, flush=True)
    print("closed", len(client.running), client.aborted, flush=True)

submit = client._start

def submitted(*args, **options):
    streams = submit(*args, **options)
    print("submitted", len(client.submitted), flush=True)
    return streams

client.close = close
client._start = submitted
signal.signal(signal.SIGUSR1, lambda *_: setattr(client, "delay", 0.0))
server.EngineClient = Engine
try:
    server.serve(Args(), ServerArgs(**options["args"]))
except ConfigError as error:
    print("ConfigError:", error, flush=True)
    sys.exit(2)
"""
BODY = {"prompt": "hi", "max_tokens": 200, "ignore_eos": True}


class Serving:
    """A `serve` process; `output` grows as it prints. `files` is its soft limit of open files."""

    def __init__(
        self, folder: Path, *, client: dict[str, Any], load_s: float, files: int | None = None, **args: Any
    ) -> None:
        self.held = held_port()
        self.port = args.setdefault("port", self.held.getsockname()[1])
        self._file = folder / f"output-{self.port}-{time.monotonic_ns()}"
        program = PROGRAM.format(tests=str(Path(__file__).parent.parent))
        options = json.dumps({"client": client, "load_s": load_s, "args": args})
        files = f"ulimit -S -n {files} && " if files else ""
        command = [sys.executable, "-c", program, options]
        with self._file.open("wb") as file:
            self.process = subprocess.Popen(
                ["sh", "-c", f'{files}exec "$@"', "sh", *command], stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self._file.read_text()

    def wait_for(self, text: str, seconds: float = PATIENCE_S) -> None:
        eventually(lambda: text in self.output or self.process.poll() is not None, seconds)
        assert text in self.output, self.output

    def post(self, body: dict[str, Any], path: str = "/v1/completions") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if connection.sock is not None:
            connection.sock.close()  # for good as soon as the answer is read or dropped
        return answer

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def serving(
    folder: Path,
    client: dict[str, Any] | None = None,
    load_s: float = 0,
    files: int | None = None,
    **args: Any,
) -> Iterator[Serving]:
    server = Serving(folder, client=client or {}, load_s=load_s, files=files, **args)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        server.held.close()


def test_start_and_stop(tmp_path: Path) -> None:
    with serving(tmp_path, api_keys=["k"], served_model_names=["m"]) as server:
        server.wait_for("Application startup complete.")
        printed = server.output
        assert f"Starting microvllm server on http://127.0.0.1:{server.port}" in printed
        assert f"Or open http://127.0.0.1:{server.port}/ in a browser." in printed
        assert f"curl http://127.0.0.1:{server.port}/v1/chat/completions" in printed
        assert '"model": "m"' in printed and "Bearer YOUR_KEY" in printed
        assert server.post(BODY).status == 401
        server.stop()
        assert server.process.wait(PATIENCE_S) == 0
        assert "closed 0 0" in server.output and "Traceback" not in server.output
        assert "frozen True" in server.output


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server whose shell lets it open 64 files."""
    with serving(tmp_path_factory.mktemp("plain"), files=64) as server:
        server.wait_for("Application startup complete.")
        yield server


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
def test_a_low_soft_limit_of_open_files_bounds_no_clients(plain: Serving) -> None:
    """A shell's limit is often 1,024, and a benchmark client opens thousands of connections at once."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", plain.port), PATIENCE_S))
        assert plain.post({**BODY, "max_tokens": 1}).status == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_line_works(plain: Serving) -> None:
    line = next(line for line in plain.output.splitlines() if line.startswith("Try: "))
    answer = subprocess.run(
        ["bash", "-c", line.removeprefix("Try: ").replace("curl", "curl -s", 1)],
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert json.loads(answer.stdout)["object"] == "chat.completion"


def test_no_request_forges_a_line_of_the_log(plain: Serving) -> None:
    """And this server stops here, so that all its lines are there."""
    forged = b"GET /a%0d%0aINFO:%20forged%1b[31m HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert raw_exchange(plain.port, forged).startswith(b"HTTP/1.1 404")
    body = {"prompt": "hi", "request_id": "x", "user": "\nforged", "model": "\nforged"}
    assert plain.post(body).status == 404
    plain.stop()
    assert plain.process.wait(PATIENCE_S) == 0
    assert not [line for line in plain.output.splitlines() if line.startswith(("INFO: forged", "forged"))]
    assert "\x1b" not in plain.output


def test_a_chat_template_of_ones_own(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for message in messages %}<{{ message.content }}>{% endfor %}"
    with serving(tmp_path, chat_template=template) as server:
        server.wait_for("Application startup complete.")
        tokens = json.loads(
            server.post({"messages": [{"role": "user", "content": "hi"}]}, "/tokenize").read()
        )
        assert tokens["tokens"] == [256, *b"<hi>"]
    with serving(tmp_path, load_s=600, chat_template="{% for %}") as server:
        assert server.process.wait(PATIENCE_S) == 2
        assert server.output.startswith("ConfigError: --chat-template: ") and server.output.count("\n") == 1


def test_a_taken_port_is_known_before_anything_slow(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with serving(tmp_path, load_s=600, port=taken.getsockname()[1]) as server:
            assert server.process.wait(PATIENCE_S) == 2
            assert "loading" not in server.output and "resolving" not in server.output
            assert server.output.startswith("ConfigError: cannot listen on 127.0.0.1 port")
            assert server.output.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading(tmp_path: Path, number: int) -> None:
    with serving(tmp_path, load_s=600) as server:
        server.wait_for("loading")
        with pytest.raises(ConnectionRefusedError):
            server.post(BODY)
        server.stop(number)
        assert server.process.wait(PATIENCE_S) == 128 + number
        assert "Traceback" not in server.output


def test_running_requests_finish_and_new_ones_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, {"delay": 0.1}, shutdown_timeout=PATIENCE_S) as server:
        server.wait_for("Application startup complete.")
        stream = server.post({**BODY, "stream": True})
        first = stream.readline()
        server.stop()
        # The server takes it as long as it has not noticed the signal: not one that outlives the stream.
        one_token = {**BODY, "max_tokens": 1}
        eventually(lambda: server.post(one_token).status == 503)
        refused = server.post(one_token)
        assert refused.getheader("retry-after") == "1"
        assert json.loads(refused.read())["error"]["message"] == "The server is shutting down."
        server.process.send_signal(signal.SIGUSR1)  # the tokens come at once
        rest = (first + stream.read()).decode()
        assert rest.count("data: {") == 200 and rest.endswith("data: [DONE]\n\n") and "error" not in rest
        assert server.process.wait(PATIENCE_S) == 0
        assert "closed 0 0" in server.output


@pytest.mark.parametrize("second_signal", [False, True])
def test_requests_that_do_not_finish_are_told(tmp_path: Path, second_signal: bool) -> None:
    timeout = PATIENCE_S if second_signal else 0.3
    with serving(tmp_path, {"stall_after": 2}, shutdown_timeout=timeout) as server:
        server.wait_for("Application startup complete.")
        stream = server.post({**BODY, "stream": True})
        head = stream.readline()
        waiting = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        waiting.request("POST", "/v1/completions", json.dumps(BODY), {"content-type": "application/json"})
        server.wait_for("submitted 2")
        server.stop()
        if second_signal:
            one_token = {**BODY, "max_tokens": 1}  # does not stall
            eventually(lambda: server.post(one_token).status == 503)
            server.stop(signal.SIGINT)
        tail = (head + stream.read()).decode().split("\n\n")
        assert (
            json.loads(tail[-3].removeprefix("data: "))["error"]["message"] == "The server is shutting down."
        )
        assert tail[-2:] == ["data: [DONE]", ""]
        answer = waiting.getresponse()
        assert answer.status == 503 and json.loads(answer.read())["error"]["code"] == 503
        waiting.close()
        assert server.process.wait(PATIENCE_S) == 0
        assert "closed 0 2" in server.output and "Traceback" not in server.output
        why = "at a second signal." if second_signal else "that did not finish within 0.3 s."
        assert f"requests {why}" in server.output


def test_a_signal_ends_the_wait_for_connections_as_uvicorn_says() -> None:
    class Interrupter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "CTRL+C to force quit" in record.getMessage():
                os.kill(os.getpid(), signal.SIGINT)

    async def shut_down() -> bool:
        server = HttpServer(uvicorn.Config(None, lifespan="off", log_config=None), lambda: None)
        server.server_state.connections.add(Mock(spec=["shutdown"]))  # one that never closes
        server.servers, server.lifespan = [], Mock()
        waiting = asyncio.ensure_future(force_exit(server, Signals()))
        server.force_exit = False
        await server.shutdown()
        return waiting.done()

    log, interrupter = logging.getLogger("uvicorn.error"), Interrupter()
    level = log.level
    log.addHandler(interrupter)
    log.setLevel(logging.INFO)
    try:
        assert asyncio.run(shut_down())
    finally:
        log.removeHandler(interrupter)
        log.setLevel(level)


def test_unix_socket(tmp_path: Path) -> None:
    # The path of a unix socket is at most 107 bytes, which the test folder's may exceed.
    path = os.path.relpath(tmp_path / "s")
    if len(path) > 100:
        pytest.skip("the temporary folder's path is too long for a unix socket")
    with serving(tmp_path, uds=path) as server:
        server.wait_for("Application startup complete.")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        server.stop()
        assert server.process.wait(PATIENCE_S) == 0
    assert not os.path.exists(path)


def test_an_idle_connection_stays_open_as_long_as_was_asked(tmp_path: Path) -> None:
    with serving(tmp_path, http_timeout_keep_alive=7) as server:
        server.wait_for("Application startup complete")
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        asked = time.monotonic()
        connection.request("GET", "/health")
        connection.getresponse().read()
        assert connection.sock.recv(1) == b""
        assert time.monotonic() - asked > 6.5  # uvicorn's own limit is 5 s
        connection.close()


@pytest.mark.parametrize(
    "options", [{}, {"disable_log_stats": True}, {"log_level": "warning"}], ids=["shown", "off", "warnings"]
)
def test_statistics_are_logged_when_there_is_traffic(tmp_path: Path, options: dict[str, Any]) -> None:
    with serving(tmp_path, stats_interval=0.1, **options) as server:
        server.wait_for("Application startup complete")
        time.sleep(0.4)
        assert "Engine 000" not in server.output
        assert server.post(BODY).status == 200
        if options:
            time.sleep(0.4)
            assert "Engine 000" not in server.output
        else:
            server.wait_for("Engine 000: Avg prompt throughput: ")


def test_stats_line_is_vllms() -> None:
    before = EngineStats(prompt_tokens=100, generation_tokens=50, prefix_queries=10, prefix_hits=10)
    now = EngineStats(
        num_running=3,
        num_waiting=2,
        kv_blocks_used=25,
        kv_blocks_total=200,
        prompt_tokens=200,
        generation_tokens=75,
        prefix_queries=50,
        prefix_hits=20,
    )
    assert stats_line(before, now, 10.0) == (
        "Engine 000: Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 2.5 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, GPU KV cache usage: 12.5%, Prefix cache hit rate: 25.0%"
    )
    assert "Waiting: 2 reqs, KV cache usage: 12.5%" in stats_line(before, now, 10.0, "cpu")
    assert "Preemptions: 4 reqs, GPU" in stats_line(EngineStats(), EngineStats(preemptions=4), 1.0)


def test_bind_errors_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    wrong = [
        ServerArgs(host="no.such.host.invalid"),
        ServerArgs(host="192.0.2.1"),
        ServerArgs(host="\x00"),
        ServerArgs(uds=str(file)),
        ServerArgs(uds=str(tmp_path / "missing" / "s")),
        ServerArgs(uds="x" * 200),
    ]
    for args in wrong:
        with pytest.raises(ConfigError) as caught:
            bind_socket(args)
        assert "\n" not in str(caught.value)
    assert file.read_text() == "precious"


def test_two_that_start_at_once(tmp_path: Path) -> None:
    with held_port() as held:
        args = ServerArgs(port=held.getsockname()[1])
        first, second = bind_socket(args), bind_socket(args)
        start_listening(first, args)
        with pytest.raises(ConfigError, match="cannot listen"):
            start_listening(second, args)
        release_socket(first, args)
        release_socket(second, args)


def test_a_dead_unix_socket_is_replaced_and_a_live_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ServerArgs(uds="s")
    live = bind_socket(args)
    with pytest.raises(ConfigError, match="another server listens there"):
        bind_socket(args)
    live.close()  # killed: the file stays
    release_socket(bind_socket(args), args)
    assert not Path("s").exists()


def test_addresses() -> None:
    assert address_of(ServerArgs(host="::1", port=80)) == "http://[::1]:80"
    assert address_of(ServerArgs(uds="/s")) == "unix:/s"
