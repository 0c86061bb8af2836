"""chat and complete against a server, and collect-env."""

from __future__ import annotations

import http.client
import io
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from fake_client import FakeClient, fresh
from http_tools import real_server
from process_tools import PATIENCE_S, asleep, wait_until

import microvllm
from microvllm import cli
from microvllm.runtime import collect_env as environment
from microvllm.runtime.errors import EngineError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell's own key and proxies must not have a say."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def client() -> FakeClient:
    return fresh()


@pytest.fixture
def url(client: FakeClient) -> Iterator[str]:
    with real_server(client) as port:
        yield f"http://127.0.0.1:{port}/v1"


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


def error_line(capsys: pytest.CaptureFixture[str], status: int, *argv: str) -> str:
    assert cli.run(argv) == status
    err = capsys.readouterr().err
    assert err.startswith("microvllm: error: ") and err.count("\n") == 2 and "\nmicrovllm: hint: " in err, err
    return err


# ---- chat and complete ------------------------------------------------------------------------------


def test_chat_prints_what_the_server_answers(
    url: str, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["chat", "--url", url, "--system_prompt", "Be brief.", "-q", "Hello there"]) == 0
    shown = capsys.readouterr()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    answer = httpx.post(f"{url}/chat/completions", json={"messages": messages}).json()
    assert shown.out == answer["choices"][0]["message"]["content"] + "\n" and len(shown.out) > 1
    assert shown.err == ""
    assert client.submitted[0][0] == client.submitted[1][0]


def test_one_text_as_an_argument_with_limits_and_the_address_from_the_environment(
    url: str,
    client: FakeClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    for command in ("chat", "complete"):
        assert cli.run([command, "Hello", "--max-tokens", "3", "--temperature", "0"]) == 0
        assert capsys.readouterr().out.strip()
        params = client.submitted[-1][1]
        assert (params.max_tokens, params.temperature) == (3, 0)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert cli.run(["chat", "Hello", "--url", url]) == 0
    assert "two texts" in error_line(capsys, 2, "chat", "Hello", "-q", "again", "--url", url)
    assert "--temperature" in error_line(capsys, 2, "chat", "Hello", "--temperature", "3")


def test_every_line_of_a_pipe_is_a_turn_of_one_chat(
    url: str, client: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client.config = type(client.config)(max_model_len=4096)
    client.processor.config = client.config
    pipe(monkeypatch, "first\r\n\nsecond ünd \xff".encode("latin-1"))
    assert cli.run(["chat", "--url", url]) == 0
    answers = capsys.readouterr().out.splitlines()
    prompts = [client.tokenizer.decode(ids) for ids, *_ in client.submitted]
    assert len(answers) == len(prompts) == 2
    assert prompts[0] == "user: first\nassistant: "
    # Bytes that are not UTF-8 are replaced, not refused.
    assert prompts[1] == f"user: first\nassistant: {answers[0]}\nuser: second �nd �\nassistant: "


def test_complete_goes_on_from_each_line(
    url: str, client: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, b"Once\nTwice\n")
    assert cli.run(["complete", "--url", url, "--max-tokens", "3", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert [client.tokenizer.decode(ids) for ids, *_ in client.submitted] == ["Once", "Twice"]
    texts = [
        httpx.post(f"{url}/completions", json={"prompt": text, "max_tokens": 3}).json()["choices"][0]["text"]
        for text in ("Once", "Twice")
    ]
    assert out == "".join(text + "\n" for text in texts)
    assert err.count("TTFT: ") == 2 and len(re.findall(r"TPS:  [\d.]+ tokens/s \(3 tokens in", err)) == 2


def test_the_model_is_the_one_that_was_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, 1, "complete", "--url", url, "--model-name", "other", "-q", "x")
    assert "404" in line and "`other` does not exist" in line


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_keys(
    command: str, client: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with real_server(client, api_keys=("right",)) as port:
        url = f"http://127.0.0.1:{port}/v1"
        argv = (command, "--url", url, "-q", "x")
        assert "API key is missing or wrong" in error_line(capsys, 1, *argv)
        assert "API key is missing or wrong" in error_line(capsys, 1, *argv, "--api-key", "wrong")
        assert cli.run([*argv, "--api-key", "right"]) == 0
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        assert cli.run(argv) == 0
        assert "API key is missing or wrong" in error_line(capsys, 1, *argv, "--api-key", "wrong")


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_no_server(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        line = error_line(capsys, 1, command, "--url", url, "-q", "x")
    assert url in line and "refused" in line


def test_a_wrong_address_of_a_right_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, 1, "chat", "--url", url.removesuffix("/v1"), "-q", "x")
    assert "404" in line and "/v1?" in line


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://[", "http://x:99999/v1", "http:///v1", ""]
)
def test_addresses_that_are_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--url" in error_line(capsys, 2, "chat", "--url", url, "-q", "x")


@pytest.mark.parametrize(
    "argv",
    [
        ("--api-key", "schlüssel"),
        ("--api-key", "a\nb"),
        ("--model-name", "\udcff"),
        ("--system-prompt", "\udcff", "--model-name", "m"),
        ("--quick", "\udcff", "--model-name", "m"),
    ],
)
def test_texts_that_cannot_be_sent(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert argv[0] in error_line(capsys, 2, "chat", "--url", "http://127.0.0.1:9/v1", *argv)


def test_a_refused_turn_ends_a_pipe(
    url: str, client: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, b"x" * 300 + b"\nshort\n")
    line = error_line(capsys, 1, "complete", "--url", url)
    assert "status 400" in line and "context" in line and not client.submitted


def test_an_engine_that_fails_in_an_answer(
    url: str, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    client.fail_after, client.failure = 2, EngineError("The engine failed.")
    assert cli.run(["complete", "--url", url, "-q", "x"]) == 1
    out, err = capsys.readouterr()
    assert len(out) == 3 and out.endswith("\n")
    shown = [line for line in err.splitlines() if ": warning: Request " not in line]  # the server's own log
    assert "The engine failed." in shown[0] and len(shown) == 2


@contextmanager
def scripted_server(answer: bytes) -> Iterator[str]:
    """Sends `answer` to whoever asks and hangs up, after the whole request.

    A socket closed with bytes unread resets the connection, which may take the answer with it.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            try:
                while True:
                    connection, _ = listening.accept()
                    with connection, connection.makefile("rb") as request:
                        request.readline()
                        request.read(int(http.client.parse_headers(request).get("content-length", 0)))
                        connection.sendall(answer)
            except OSError:
                pass

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)


def test_a_connection_that_breaks_in_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    event = b'data: {"id":"c","created":1,"model":"m","choices":[{"index":0,"text":"Hi"}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = head + b"%x\r\n%s\r\n" % (len(event), event)
    with scripted_server(answer) as url:
        assert cli.run(["complete", "--url", url, "--model-name", "m", "-q", "x"]) == 1
    out, err = capsys.readouterr()
    assert out == "Hi\n" and err.count("\n") == 2 and "peer closed" in err


@pytest.mark.parametrize(
    ("kind", "body"),
    [("text/html", b"<html>"), ("application/json", b"[1]"), ("application/json", b'{"data":[]}')],
)
def test_something_else_than_an_openai_server(
    kind: str, body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with scripted_server(head + body) as url:
        assert url in error_line(capsys, 1, "chat", "--url", url, "-q", "x")


class Session:
    """`microvllm chat` on a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        self._terminal, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "microvllm.cli", "chat", *argv],
            stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def expect(self, text: str) -> None:
        """Reads until `text` was shown, and forgets what came up to there."""
        self._read_until(lambda: text in self.text, repr(text))
        self.text = self.text.partition(text)[2]

    def await_more(self, characters: int) -> None:
        """Reads until so many characters were shown that no `expect` has taken."""
        self._read_until(lambda: len(self.text) >= characters, f"{characters} characters")

    def _read_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {self.text!r}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.text += os.read(self._terminal, 4096).decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo terminal that reads as on Linux")
def test_a_session_on_a_terminal(url: str, client: FakeClient) -> None:
    """Ctrl-C ends an answer and frees its place, a refusal is a line, Ctrl-D ends the session."""
    client.stall_after = 2
    session = Session("--url", url)
    try:
        session.expect(f"Using model: fake-model on {url}")
        session.expect("> ")
        session.type("hello\n")
        session.expect("hello\r\n")
        session.await_more(2)
        # A signal between Python's look for signals and the call that waits for data is seen only when data
        # come, and here none do; one in the middle of a library may be lost there.
        wait_until(lambda: asleep(session.process.pid), "the client waits for the next token")
        session.process.send_signal(signal.SIGINT)
        session.expect("> ")
        wait_until(lambda: not client.running, "the answer was aborted")
        session.type("x" * 300 + "\n")
        session.expect("microvllm: error: ")
        session.expect("> ")
        client.stall_after = None
        session.type("again\n")
        session.expect("> ")
        last = client.tokenizer.decode(client.submitted[-1][0])
        assert last.startswith("user: hello\nassistant: ") and "xxx" not in last and "user: again" in last
        session.type("\x04")
        assert session.process.wait(PATIENCE_S) == 0
    finally:
        session.close()


# ---- collect-env ------------------------------------------------------------------------------------


def test_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden-1")
    monkeypatch.setenv("HF_TOKEN", "hf-hidden-2")
    monkeypatch.setenv("https_proxy", "http://me:hidden-3@proxy:3128")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("EDITOR", "not-our-matter")
    assert cli.run(["collect-env"]) == 0
    text = capsys.readouterr().out
    assert "hidden-" not in text and "not-our-matter" not in text
    for line in (
        rf"version +{re.escape(microvllm.__version__)}",
        r"Python +3\.\d+",
        r"cores +\d+ usable of \d+",
        r"total memory +[\d.]+ GiB",
        r"PyTorch version +\d[\w.+]*",
        r"built +(yes|no)",
        r"torch +\d[\w.+]*",
        r"orjson +\d[\w.]*",
        r"OPENAI_API_KEY +\(set, not shown\)",
        r"HF_TOKEN +\(set, not shown\)",
        r"https_proxy +http://\*\*\*@proxy:3128",
        r"OMP_NUM_THREADS +1",
    ):
        assert re.search(rf"^  {line}", text, re.MULTILINE), line
    assert "not known  " not in text, "a part of the report failed"


def test_a_broken_part_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(environment.metadata, "requires", lambda name: ["no-such-package>=2", "orjson>=99"])
    text = environment.report()
    assert "ModuleNotFoundError: import of torch" in text and "nvidia-smi  not there" in text
    assert re.search(r"no-such-package +not installed\n", text) and re.search(
        r"orjson +[\d.]+ \(needs >=99\)", text
    )
    assert re.search(r"compiler +no-such-compiler", text) and "Environment variables" in text
