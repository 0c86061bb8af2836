"""`microvllm run-batch`: a file of requests in, a file of answers out, without a port.

Lines are in the form of OpenAI's batch files: `{"custom_id", "method", "url", "body"}` in,
`{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}` out, in the same order.
Each body goes through the server's own application, so what it may hold, what it means and how it is
refused is the same as over HTTP. As vLLM writes it, an answer is in `response.body` with `error` null, and
what went wrong is in `error` with `response.body` null.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
import orjson
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message

from microvllm.openai_compat.api import service
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.batch_files import AnswerFile, RequestFile
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.errors import PayloadTooLargeError, clip, error_object
from microvllm.openai_compat.server import HttpServer, Signals
from microvllm.openai_compat.state import ServerState
from microvllm.openai_compat.transport.listen import bind_socket, start_listening
from microvllm.openai_compat.transport.protocol import http_config
from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.errors import ConfigError, EngineError, InvalidRequestError, RequestError
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.text.chat_template import template_problem

logger = logging.getLogger("microvllm.batch")

LINE_REMEDY = (
    'nothing was answered; a line is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", '
    '"body": {...}}'
)
ENDPOINTS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
)
ENVELOPE_BYTES = 64 << 10  # what a line may hold beside the body
ATTEMPTS = 3  # at a request that the engine process died over
RESTART_S = 600.0  # for an engine process that died to be back
POLL_S = 0.1

RequestsDone = Callable[[int, int], None]


class Line(msgspec.Struct):
    """A line of the input. The body stays as it is, for the application to parse."""

    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw()


class Streaming(msgspec.Struct):
    """The one field of a body that concerns us."""

    stream: Any = None


def run_batch(
    engine_args: EngineArgs,
    args: ServerArgs,
    input_file: str,
    output_file: str,
    *,
    tmp_dir: str | None = None,
    max_inflight: int | None = None,
    enable_metrics: bool = False,
    on_load: OnProgress | None = None,
    on_progress: RequestsDone | None = None,
) -> None:
    """Answers all requests of `input_file` in `output_file`; each is a path, an http(s) address or `-`.

    What comes from or goes to an address is kept in `tmp_dir` meanwhile. `max_inflight` requests are with
    the engine at a time, by default some more than it runs at once. With `enable_metrics` the metrics are
    served on the host and port of `args`. A line that is no request at all ends the run before the model
    loads, an input without lines is an output without lines.
    `on_load` is called as the engine's start advances, `on_progress` with requests answered and all requests.
    SIGINT and SIGTERM end in `SystemExit` with 128 + their number; what is answered by then is written.
    Raises `ConfigError` naming the flag at fault, `EngineError` if the engine does not start or come back.
    """
    if args.chat_template is not None and (problem := template_problem(args.chat_template)):
        raise ConfigError(f"--chat-template: {problem}")
    if args.enable_log_requests:
        logging.getLogger("microvllm.server").setLevel(logging.INFO)
    if tmp_dir is not None and not os.path.isdir(tmp_dir):
        raise ConfigError(f"--output-tmp-dir {tmp_dir}: no such folder")
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(RequestFile(input_file, args.max_body_bytes + ENVELOPE_BYTES, tmp_dir))
        if requests.is_same_file(output_file):
            raise ConfigError(f"-o {output_file}: the answers would overwrite the requests")
        check_envelopes(requests, input_file)
        answers = stack.enter_context(AnswerFile(output_file, tmp_dir))
        if not requests.num_lines:
            answers.start()
            print("0 of 0 requests answered", file=sys.stderr)
            return
        sock = stack.enter_context(bind_socket(args)) if enable_metrics else None
        config = engine_args.prepare(on_load)
        work = _answer_all(config, args, requests, answers, max_inflight, sock, on_load, on_progress)
        asyncio.run(_until_signal(work))


def check_envelopes(requests: RequestFile, where: str) -> None:
    """Raise `ConfigError` for the first line that is no request, as vLLM does, whatever its body holds."""
    for number, text in requests.numbered():
        if text is None:
            continue  # too long to be read: an error of its own among the answers
        try:
            line = _decode(text)
        except InvalidRequestError as error:
            problem: str | None = str(error)
        else:
            names = ("custom_id", "method", "url")
            wrong = [name for name in names if not isinstance(getattr(line, name), str)]
            problem = f"{wrong[0]} must be a string" if wrong else None if line.body else "body is missing"
        if problem is not None:
            raise ConfigError(f"-i {where}: line {number}: {problem}", remedy=LINE_REMEDY)


async def _until_signal(work: Awaitable[None]) -> None:
    await Signals().run(work)


async def _answer_all(
    config: EngineConfig,
    args: ServerArgs,
    requests: RequestFile,
    answers: AnswerFile,
    max_inflight: int | None,
    metrics_sock: socket.socket | None,
    on_load: OnProgress | None,
    on_progress: RequestsDone | None,
) -> None:
    client = await EngineClient.start(config, chat_template=args.chat_template, on_progress=on_load)
    try:
        app = create_app(client, args)
        batch = Batch(client, app, requests.num_lines, on_progress)
        answers.start()
        start = time.monotonic()
        metrics = None
        if metrics_sock is not None:
            start_listening(metrics_sock, args)
            metrics = asyncio.ensure_future(_serve_metrics(app.state.server, metrics_sock))
        try:
            # A few more than run at once, so that the next is there when one ends.
            rows = config.max_num_seqs * config.data_parallel_size
            concurrency = max_inflight or rows + max(8, rows // 4)
            await in_order(requests, batch.answer, answers.write, concurrency)
        finally:
            if metrics is not None:
                metrics.cancel()
                await asyncio.gather(metrics, return_exceptions=True)
            print(
                f"{batch.done} of {batch.total} requests answered, {batch.failed} of them with an error, "
                f"in {time.monotonic() - start:.1f} s",
                file=sys.stderr,
            )
    finally:
        await client.close()


async def _serve_metrics(state: ServerState, sock: socket.socket) -> None:
    """GET /metrics (or any other path, as prometheus_client's own server has it), until cancelled."""
    app = Starlette(routes=Endpoint(path="/{path:path}", handler=service.metrics).routes(state))
    config = http_config(app, log_level="warning")
    await HttpServer(config, on_ready=lambda: None).serve(sockets=[sock])


async def in_order(
    lines: Iterable[bytes | None],
    answer: Callable[[bytes | None], Awaitable[bytes]],
    write: Callable[[bytes], None],
    concurrency: int,
) -> None:
    """Writes the answer of each line, `concurrency` of them in work at a time, in the order of the lines.

    Cut short, it writes what is done, though not all before it is.
    """
    slots = asyncio.Semaphore(concurrency)
    window: deque[asyncio.Task[bytes]] = deque()

    async def one(line: bytes | None) -> bytes:
        try:
            return await answer(line)
        finally:
            slots.release()

    try:
        for line in lines:
            await slots.acquire()
            window.append(asyncio.create_task(one(line)))
            while window and window[0].done():
                write(window.popleft().result())
        while window:
            await window[0]
            write(window.popleft().result())
    finally:
        for task in window:
            task.cancel()
        outcomes = await asyncio.gather(*window, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, bytes):
                write(outcome)


class Batch:
    """The requests of one run. Counts the lines that are `done`, among them those that `failed`."""

    def __init__(
        self, client: EngineClient, app: ASGIApp, total: int, on_progress: RequestsDone | None = None
    ) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self._client, self._app = client, app
        self._on_progress = on_progress
        self._again = asyncio.Lock()

    async def answer(self, text: bytes | None) -> bytes:
        """Return the line of the output for a line of the input; None is one that was too long to be read."""
        request_id = f"batch-{uuid.uuid4().hex}"
        line = Line()
        try:
            line = _decode(text)
            body = _checked_body(line)
            status, answer = await self._ask(line.url, body, request_id)
        except RequestError as error:
            status, answer = error.status, orjson.dumps(error_object(error))
        self.done += 1
        self.failed += status != 200
        if self._on_progress is not None:
            self._on_progress(self.done, self.total)
        fine = status == 200
        return orjson.dumps(
            {
                "id": f"microvllm-{uuid.uuid4().hex}",
                "custom_id": line.custom_id if isinstance(line.custom_id, str) else None,
                "response": {
                    "status_code": status,
                    "request_id": request_id,
                    "body": orjson.Fragment(answer) if fine else None,
                },
                "error": None if fine else orjson.Fragment(answer),
            }
        )

    async def _ask(self, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
        """Asks again where the engine process died.

        It may have died of this request or of one beside it, and takes all that run with it. So second
        attempts are made one at a time: a request that is to blame fails alone.
        """
        status, answer = await self._attempt(path, body, request_id)
        for _ in range(ATTEMPTS - 1):
            if status != 503:
                break
            async with self._again:
                status, answer = await self._attempt(path, body, request_id)
        return status, answer

    async def _attempt(self, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
        deadline = time.monotonic() + RESTART_S
        while not self._client.healthy():
            if time.monotonic() > deadline:
                raise EngineError(f"the engine process died and was not back within {RESTART_S:g} s")
            await asyncio.sleep(POLL_S)
        return await post(self._app, path, body, request_id)


async def post(app: ASGIApp, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
    """Sends one JSON request to an application in this process -> (status, body of the answer)."""
    status = 0
    answer = bytearray()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not unread:
            await asyncio.get_running_loop().create_future()  # this client does not leave
        return unread.pop()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            answer.extend(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": None,
    }
    try:
        await app(scope, receive, send)
    except Exception:
        # Starlette answers 500 and then raises what happened, for the server to log.
        if not status:
            raise
        logger.exception("A request failed.")
    return status, bytes(answer)


def _decode(text: bytes | None) -> Line:
    if text is None:
        raise PayloadTooLargeError("The line is too long.")
    try:
        return msgspec.json.decode(text, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"The line is not a JSON object: {clip(str(error))}") from error


def _checked_body(line: Line) -> bytes:
    """Return the body of a line as it stands there. Raises `InvalidRequestError` naming the field."""
    if line.method != "POST":
        raise InvalidRequestError('method must be "POST".', "method")
    if line.url not in ENDPOINTS:
        raise InvalidRequestError(f"url must be one of {', '.join(ENDPOINTS)}.", "url")
    body = bytes(line.body)
    try:
        streaming = msgspec.json.decode(body, type=Streaming).stream not in (None, False)
    except (msgspec.DecodeError, RecursionError):
        streaming = False  # the application reports what is wrong with such a body
    if streaming:
        raise InvalidRequestError("stream must be false: a batch has whole answers.", "stream")
    return body
