"""run-batch: what each line becomes, the order, the files, and runs that are cut short."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_client import FakeClient, fresh
from http_tools import held_port, in_process
from model_tools import variant_folder
from process_tools import PATIENCE_S, alive, engines_of, wait_until

from microvllm import cli
from microvllm.openai_compat import batch, batch_files
from microvllm.openai_compat.app import ENDPOINTS, create_app
from microvllm.openai_compat.batch import ATTEMPTS, Batch, check_envelopes, in_order
from microvllm.openai_compat.batch_files import AnswerFile, RequestFile
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def line(body: Any, url: Any = COMPLETIONS, custom_id: Any = "a", method: Any = "POST") -> bytes:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body}).encode()


def batch_of(client: FakeClient, total: int = 1) -> Batch:
    return Batch(client, create_app(client, ServerArgs()), total)  # type: ignore[arg-type]


def answers(*lines: bytes | None, client: FakeClient | None = None) -> list[Any]:
    """What each line becomes, one after the other."""

    async def run() -> list[Any]:
        batch = batch_of(client or fresh(), len(lines))
        found = [json.loads(await batch.answer(text)) for text in lines]
        assert batch.done == len(lines) and batch.failed == sum(one["error"] is not None for one in found)
        return found

    return asyncio.run(run())


# ---- lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (COMPLETIONS, {"prompt": ["Once", "Twice"], "n": 2, "max_tokens": 3, "seed": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "model": "fake-model"}),
    ],
)
async def test_an_answer_is_the_one_that_http_gives(url: str, body: Any) -> None:
    client = fresh()
    mine = json.loads(await batch_of(client).answer(line(body, url)))
    assert list(mine) == ["id", "custom_id", "response", "error"]
    assert mine["custom_id"] == "a" and mine["error"] is None
    response = mine["response"]
    assert list(response) == ["status_code", "request_id", "body"] and response["status_code"] == 200
    assert response["body"]["id"].endswith("-" + response["request_id"])
    async with in_process(client) as http:
        theirs = (await http.post(url, json=body)).json()
    for name in ("id", "created"):
        del theirs[name], response["body"][name]
    assert response["body"] == theirs


BAD_LINES = [
    (b"not json", 400, None),
    (b'{"custom_id": "a"', 400, None),
    (b"[" * 100_000, 400, None),
    (b'{"custom_id": "a", "body": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None),
    (b'{"custom_id": "\xff"}', 400, None),
    (b'{"custom_id": "\\ud800"}', 400, None),
    (b"[]", 400, None),
    (None, 413, None),
    (line({"prompt": "x"}, method="GET"), 400, "method"),
    (line({"prompt": "x"}, url="/v1/nothing"), 400, "url"),
    (line({"prompt": "x"}, url=[COMPLETIONS]), 400, "url"),
    (line("x"), 400, "body"),
    (line([1]), 400, "body"),
    (line({"prompt": "x", "stream": True}), 400, "stream"),
    (line({"prompt": "x", "stream": "true"}), 400, "stream"),
    (line({"prompt": "x", "temperature": 3}), 400, "temperature"),
    (line({"prompt": 5}), 400, "body.prompt"),
    (line({"prompt": "x" * 300}), 400, "input_tokens"),
    (line({"prompt": "x", "model": "other"}), 404, "model"),
    (line({"messages": []}, CHAT), 400, "messages"),
]


@pytest.mark.parametrize(("text", "status", "param"), BAD_LINES)
def test_a_bad_line_becomes_an_error_and_harms_no_other(
    text: bytes | None, status: int, param: str | None
) -> None:
    bad, good = answers(text, line({"prompt": "x", "max_tokens": 2}, custom_id="b"))
    assert bad["response"]["status_code"] == bad["error"]["error"]["code"] == status
    assert bad["response"]["body"] is None and bad["response"]["request_id"]
    assert bad["error"]["error"]["message"] and len(bad["error"]["error"]["message"]) < 1000
    assert param is None or param in (bad["error"]["error"]["param"] or "")
    assert good["custom_id"] == "b" and good["error"] is None


def test_a_stream_that_is_not_wanted_is_none() -> None:
    for value in (None, False):
        (found,) = answers(line({"prompt": "x", "stream": value, "max_tokens": 1}))
        assert found["error"] is None


def test_an_application_that_fails_is_status_500() -> None:
    client = fresh()
    client._start = None  # type: ignore[assignment]
    (found,) = answers(line({"prompt": "x"}), client=client)
    assert (
        found["response"]["status_code"] == 500 and found["error"]["error"]["type"] == "InternalServerError"
    )


# ---- an engine that dies ----------------------------------------------------------------------------


def test_what_an_engine_died_over_is_asked_again_alone() -> None:
    """The one request that kills the engine fails; those that it took along are answered."""
    client = fresh()
    running: set[str] = set()
    attempts: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        prompt = json.loads((await receive())["body"])["prompt"]
        attempts.append(prompt)
        running.add(prompt)
        await asyncio.sleep(0.01)
        dies = "killer" in running  # the engine, and all that runs with it
        await asyncio.sleep(0.01)
        running.discard(prompt)
        status = 503 if dies else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({"prompt": prompt}).encode()})

    async def run() -> list[Any]:
        batch = Batch(client, app, 8)  # type: ignore[arg-type]
        prompts = ["killer" if i == 3 else str(i) for i in range(8)]
        return [
            json.loads(found)
            for found in await asyncio.gather(*(batch.answer(line({"prompt": prompt})) for prompt in prompts))
        ]

    found = asyncio.run(run())
    assert [one["response"]["status_code"] for one in found] == [200, 200, 200, 503, 200, 200, 200, 200]
    assert attempts.count("killer") == ATTEMPTS and len(attempts) == 7 * 2 + ATTEMPTS


def test_requests_wait_for_an_engine_that_is_being_started() -> None:
    client = fresh(alive=False)

    async def run() -> Any:
        answer = asyncio.ensure_future(batch_of(client).answer(line({"prompt": "x", "max_tokens": 2})))
        await asyncio.sleep(0.3)
        assert not answer.done()
        client.alive = True
        return json.loads(await answer)

    assert asyncio.run(run())["error"] is None


# ---- order ------------------------------------------------------------------------------------------


async def test_answers_come_in_order_and_so_many_at_a_time() -> None:
    running = most = 0

    async def answer(text: bytes | None) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(hash(text) % 7):
            await asyncio.sleep(0)
        running -= 1
        return b"<%s>" % text

    lines = [b"%d" % i for i in range(200)]
    written: list[bytes] = []
    await in_order(lines, answer, written.append, 5)
    assert written == [b"<%s>" % text for text in lines] and most == 5


@pytest.mark.parametrize("end", ["cancelled", "answer fails", "disk full"])
async def test_a_run_cut_short_keeps_what_is_done(end: str) -> None:
    stuck = asyncio.Event()
    left: list[str] = []

    async def answer(text: bytes | None) -> bytes:
        if text == b"2":
            try:
                await stuck.wait()
            except asyncio.CancelledError:
                left.append("2")
                raise
        if text == b"5" and end == "answer fails":
            raise RuntimeError
        return text or b""

    def write(text: bytes) -> None:
        if text == b"1" and end == "disk full":
            raise ConfigError("no space")
        written.append(text)

    written: list[bytes] = []
    run = asyncio.ensure_future(in_order([b"%d" % i for i in range(6)], answer, write, 4))
    await asyncio.sleep(0.05)
    if end == "disk full":
        with pytest.raises(ConfigError):
            await run
        return
    assert written == [b"0", b"1"]
    run.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await run
    done = [b"0", b"1", b"3", b"4"] + ([b"5"] if end == "cancelled" else [])
    assert written == done and left == ["2"]


# ---- files ------------------------------------------------------------------------------------------


def test_blank_long_and_marked_lines(tmp_path: Path) -> None:
    file = tmp_path / "in"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\n  \n" + b"x" * 5000 + b"\n" + b"y" * 20 + b"\nlast")
    with RequestFile(str(file), 20) as requests:
        assert requests.num_lines == 4
        assert list(requests) == [b"one", None, None, b"last"]
    with RequestFile(str(file), 21) as requests:
        assert list(requests) == [b"one", None, b"y" * 20, b"last"]


def test_requests_from_stdin_and_from_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/in.jsonl" else 404)
            self.end_headers()
            self.wfile.write(b"one\ntwo\n")

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for where in ("-", f"{address}/in.jsonl"):
            with RequestFile(where, 100) as requests:
                assert list(requests) == [b"one", b"two"] == list(requests)
        with pytest.raises(ConfigError, match=f"-i {address}/other: .*Not Found"):
            RequestFile(f"{address}/other", 100)
        server.shutdown()


def test_the_answer_file_is_emptied_only_when_the_answers_begin(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("an earlier run\n")
    with AnswerFile(str(file)) as out:
        assert file.read_text() == "an earlier run\n"
        out.start()
        out.write(b"{}")
        assert file.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("-i", "no-such-file", "-o", "out"), "-i no-such-file"),
        (("-i", ".", "-o", "out"), "-i ."),
        (("-i", "nul\0byte", "-o", "out"), "-i"),
        (("-i", "bad", "-o", "out"), "-i bad: line 3: custom_id must be a string"),
        (("-i", "in", "-o", "out", "--output-tmp-dir", "none"), "--output-tmp-dir none"),
        (("-i", "in", "-o", "out", "--max-inflight", "0"), "--max-inflight"),
        (("-i", "in", "-o", "out", "--enable-metrics", "--port", "0"), "--port"),
        (("-i", "in", "-o", "no/such/folder"), "-o no/such/folder"),
        (("-i", "in", "-o", "./in"), "overwrite"),
        (("-i", "in", "-o", "out", "--chat-template", "{% for"), "--chat-template"),
        (("-i", "in", "-o", "out"), "no-such-model"),
        (("-i", "in"), "--output-file"),
        (("-o", "out"), "--input-file"),
    ],
)
def test_bad_usage_is_one_line(
    files: tuple[str, ...],
    names: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").write_bytes(line({"prompt": "x"}) + b"\n")
    Path("bad").write_bytes(line({"prompt": "x"}) + b'\n\n{"method": "POST"}\n')
    assert cli.run(["run-batch", "--model", "no-such-model", *files]) == 2
    err = capsys.readouterr().err
    assert names in err and err.count("\n") == 2 and err.startswith("microvllm: error: ")
    assert Path("in").read_bytes() == line({"prompt": "x"}) + b"\n"


def test_options_reach_the_engine_and_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(batch, "run_batch", lambda *args, **_: calls.append(args))
    argv = ["run-batch", "-i=in", "-o", "-", "--model", "m", "--max_num_seqs", "3", "--seed=7"]
    names = ["--served-model-name", "a", "b", "--response-role", "bot", "--return-tokens-as-token-ids"]
    more = ["--enable-prompt-tokens-details", "--enable-per-request-metrics"]
    more += ["--chat-template-content-format", "string"]
    kwargs = ["--default-chat-template-kwargs", '{"thinking": true}', "--chat-template", "{{ messages }}"]
    assert cli.run([*argv, *names, *more, *kwargs]) == 0
    expected = ServerArgs(
        served_model_names=("a", "b"),
        chat_template="{{ messages }}",
        chat_template_content_format="string",
        default_chat_template_kwargs={"thinking": True},
        response_role="bot",
        return_tokens_as_token_ids=True,
        enable_prompt_tokens_details=True,
        enable_per_request_metrics=True,
    )
    assert calls == [(EngineArgs(model="m", max_num_seqs=3, seed=7), expected, "in", "-")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (line({"prompt": "x"}, custom_id=None), "custom_id must be a string"),
        (line({"prompt": "x"}, custom_id=5), "custom_id must be a string"),
        (line({"prompt": "x"}, method=None), "method must be a string"),
        (line({"prompt": "x"}, url=[COMPLETIONS]), "url must be a string"),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions"}', "body is missing"),
        (b"not json", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
    ],
)
def test_a_line_that_is_no_request_ends_the_run_first(text: bytes, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "in"
    file.write_bytes(line({"prompt": 5}, url="/v1/none") + b"\n\n" + text)
    with (
        RequestFile(str(file), 1 << 20) as requests,
        pytest.raises(ConfigError, match=f"-i in: line 3: .*{problem}"),
    ):
        check_envelopes(requests, "in")


def test_a_file_without_requests_is_done_without_an_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_bytes(b"\n \n")
    out = tmp_path / "out"
    out.write_text("an earlier run")
    argv = ["run-batch", "--model", "no-such-model", "-i", str(tmp_path / "in"), "-o", str(out)]
    assert cli.run(argv) == 0
    assert out.read_bytes() == b"" and "0 of 0 requests" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [0, 1, 99])
def test_answers_are_sent_to_an_address(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end and whole; what cannot be sent is kept and named."""
    puts: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            puts.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(503 if len(puts) <= fails else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(batch_files, "UPLOAD_PAUSES_S", (0.0, 0.0))
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/out.jsonl"
        refused = pytest.raises(ConfigError, match=f"-o {address}: .*Service Unavailable")
        with (
            refused if fails > 1 else contextlib.nullcontext() as caught,
            AnswerFile(address, str(tmp_path)) as out,
        ):
            out.start()
            out.write(b"{}")
            assert puts == [] and len(list(tmp_path.iterdir())) == 1
        server.shutdown()
    assert set(puts) == {b"{}\n"}
    kept = list(tmp_path.iterdir())
    if caught is not None:
        assert str(kept[0]) in (caught.value.remedy or "") and kept[0].read_bytes() == b"{}\n"
    else:
        assert kept == [] and len(puts) == fails + 1


@pytest.mark.parametrize(
    ("flags", "host", "port", "warned"),
    [
        ((), "127.0.0.1", 8000, False),
        (("--enable-metrics", "--host", "0.0.0.0", "--port", "9"), "0.0.0.0", 9, False),
        (("--enable-metrics", "--url", "0.0.0.0"), "0.0.0.0", 8000, False),
        (("--port", "9"), "127.0.0.1", 9, True),
    ],
)
def test_where_the_metrics_are(
    flags: tuple[str, ...],
    host: str,
    port: int,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(batch, "run_batch", lambda *args, **more: calls.append((args[1], more)))
    argv = ["run-batch", "-i", "in", "-o", "out", "--model", "m", "--max-inflight", "3"]
    assert cli.run([*argv, "--output-tmp-dir", "/tmp", *flags]) == 0
    ((args, more),) = calls
    assert (args.host, args.port, more["enable_metrics"]) == (host, port, "--enable-metrics" in flags)
    assert (more["max_inflight"], more["tmp_dir"]) == (3, "/tmp")
    assert ("--port has no effect without --enable-metrics" in capsys.readouterr().err) is warned


def test_requests_are_logged_where_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line shows warnings only, unless told otherwise."""
    log, source = logging.getLogger("microvllm.server"), tmp_path / "in"
    source.write_bytes(line({"prompt": "Hi", "max_tokens": 2}) + b"\n")
    monkeypatch.setattr(EngineArgs, "prepare", lambda *_: fresh().config)

    async def start(*_: object, **__: object) -> FakeClient:
        return fresh()

    monkeypatch.setattr(batch.EngineClient, "start", start)
    argv, level = ["run-batch", "-i", str(source), "-o", str(tmp_path / "out"), "--model", "m"], log.level
    try:
        assert cli.run(argv) == 0 and "Received request" not in capsys.readouterr().err
        assert cli.run([*argv, "--enable-log-requests"]) == 0
        assert "Received request" in capsys.readouterr().err
    finally:
        log.setLevel(level)


# ---- the command on a real engine -------------------------------------------------------------------


@contextlib.contextmanager
def started(folder: Path, requests: list[bytes], *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`microvllm run-batch` on a tiny model, from in.jsonl to out.jsonl in `folder`."""
    (folder / "in.jsonl").write_bytes(b"\n".join(requests))
    command = [
        sys.executable,
        "-m",
        "microvllm.cli",
        "run-batch",
        "--model",
        str(variant_folder("llama-tied")),
    ]
    process = subprocess.Popen(
        [*command, "-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--dtype", "float32",
         "--cpu-threads", "1", "--served-model-name", "tiny", *flags],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def prompt_line(i: int, max_tokens: int) -> bytes:
    body = {
        "model": "tiny",
        "prompt": [1 + i, 2, 3],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return line(body, custom_id=f"request {i}")


def test_a_batch_on_a_real_engine(tmp_path: Path) -> None:
    requests = [prompt_line(i, 1 + (7 * i) % 20) for i in range(40)]
    requests.insert(20, line({"prompt": "x"}, url="/v1/nothing", custom_id="bad"))
    with held_port() as held:
        port = held.getsockname()[1]
        flags = ["--enable-metrics", "--port", str(port), "--max-inflight", "5"]
        with started(tmp_path, requests, "--max-num-seqs", "4", *flags) as process:
            seen = ""
            while process.poll() is None and "vllm:generation_tokens_total" not in seen:
                with (
                    contextlib.suppress(OSError, http.client.HTTPException),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer,
                ):
                    seen = answer.read().decode()
            out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert 'vllm:generation_tokens_total{engine="0",model_name="tiny"}' in seen
    assert (
        out == "" and "41 of 41 requests answered, 1 of them with an error" in err and "Traceback" not in err
    )
    found = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found.pop(20)["custom_id"] == "bad"
    assert [one["custom_id"] for one in found] == [f"request {i}" for i in range(40)]
    used = [one["response"]["body"]["usage"]["completion_tokens"] for one in found]
    assert used == [1 + (7 * i) % 20 for i in range(40)]


def test_a_signal_ends_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    number, out = signal.SIGINT, tmp_path / "out.jsonl"
    requests = [prompt_line(0, 2)] + [prompt_line(i, 200) for i in range(1, 500)]
    with started(tmp_path, requests, "--max-num-seqs", "1") as process:
        wait_until(lambda: process.poll() is not None or size_of(out) > 0, "there is an answer")
        engines = engines_of(process.pid)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number, err
    done = [json.loads(text)["custom_id"] for text in out.read_text().splitlines()]
    assert done == [f"request {i}" for i in range(len(done))] and 0 < len(done) < len(requests)
    assert "Traceback" not in err and f"{len(done)} of 500 requests answered" in err
    assert engines and not any(map(alive, engines))


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def test_its_addresses_are_those_of_the_server() -> None:
    pooling = {endpoint.path for endpoint in ENDPOINTS if endpoint.pools}
    served = {endpoint.path for endpoint in ENDPOINTS if endpoint.generates} | pooling
    assert pooling <= set(batch.ENDPOINTS) <= served
