"""Large requests: what they share travels once, and no callback of the event loop takes long."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from fakes import VOCAB, Engine, make_request, run_alone
from http_tools import assert_no_callback_is_long, events, in_process
from model_tools import long_folder
from process_tools import own_engines

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.server import HttpServer
from microvllm.openai_compat.transport.protocol import http_config
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import EngineBusyError
from microvllm.runtime.process.channel import Add, EngineEnd, frame
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.request import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONGEST_S = 0.05  # processor time of one callback
WAITING, LARGEST_WAITING = 400, 14_500  # bytes, in CPython 3.11; the engine process holds 1.7 KB more


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineClient]:
    args = EngineArgs(
        model=str(long_folder()), dtype="float32", cpu_threads=1, max_num_seqs=64, max_num_batched_tokens=2048
    )
    client = await EngineClient.start(args.resolve())
    gc.collect()
    gc.freeze()  # as the server does: a collection that walks pytest's own objects would be counted, too
    yield client
    await client.close()
    assert own_engines() == []


async def answer(client: Any, body: dict[str, Any]) -> httpx.Response:
    async with in_process(client) as http:
        return await http.post("/v1/completions", content=json.dumps(body), headers=JSON, timeout=300)


JSON = {"content-type": "application/json"}
MANY = {"prompt": [[i % 90 + 3, 5] for i in range(1024)], "n": 4, "max_tokens": 2, "temperature": 1.0}
LARGE = {
    "log probabilities": {**MANY, "logprobs": 20},
    "allowed tokens": {**MANY, "prompt": [5, 6], "n": 128, "allowed_token_ids": [3, 4, 5, 6] * 40_000},
    "a bias, and words": {
        **MANY,
        "prompt": [[5, 6]] * 32,
        "n": 128,
        "logit_bias": {str(i): -1 for i in range(3, 90)},
        "bad_words": [f"word {i}" * 20 for i in range(128)],
        "stop": ["x" * 1000, "y" * 1000],
    },
}


@pytest.mark.parametrize("name", LARGE)
async def test_no_callback_of_the_loop_is_long(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    await answer(client, {"prompt": [5], "max_tokens": 1})  # what is imported or compiled at first use
    body = {"model": client.config.model, **LARGE[name]}
    prompts = body["prompt"]

    async def ask() -> None:
        response = await answer(client, body)
        assert response.status_code == 200, response.text[:300]
        choices = response.json()["choices"]
        assert len(choices) == body["n"] * (len(prompts) if type(prompts[0]) is list else 1)

    await assert_no_callback_is_long(monkeypatch, ask, LONGEST_S)


async def test_a_waiting_request_is_small(client: EngineClient) -> None:
    """With its connection, and the client's end of it; `scripts/faults.py` measures what is resident."""
    server = HttpServer(
        http_config(create_app(client, ServerArgs()), log_level="error"), on_ready=lambda: None
    )
    # Streams that nobody knows hold every row: what running requests generate would be measured, too.
    (engine,) = client.replicas
    rows = client.submit([5], SamplingParams(n=64, max_tokens=7000, ignore_eos=True))
    for stream in rows:
        engine.forget_request(stream.request_id)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock, ExitStack() as stack:
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))

        async def hold(count: int, message: bytes) -> None:
            expected = engine.num_open + count
            for _ in range(count):
                connection = stack.enter_context(socket.create_connection(sock.getsockname()))
                connection.sendall(message)
            while engine.num_open < expected or engine.in_flight:
                await asyncio.sleep(0.01)

        async def measure(message: bytes) -> float:
            await hold(50, message)
            gc.collect()
            tracemalloc.start()
            try:
                await hold(WAITING, message)
                gc.collect()
                return tracemalloc.get_traced_memory()[0] / WAITING
            finally:
                tracemalloc.stop()

        try:
            sizes = [await measure(waiting_message(stream=stream)) for stream in (False, True)]
        finally:
            stack.close()
            server.should_exit = True
            await serving
            for stream in rows:
                engine.streams[stream.request_id] = stream
                stream.abort()
    assert max(sizes) < LARGEST_WAITING, "whole {:.0f} bytes, streamed {:.0f}".format(*sizes)


def waiting_message(*, stream: bool) -> bytes:
    body = json.dumps({"prompt": [5], "max_tokens": 7000, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


async def test_large_lists_fill_the_queue_as_prompts_do() -> None:
    args = EngineArgs(
        model=str(long_folder()), dtype="float32", cpu_threads=1, max_num_seqs=1, max_num_queued_tokens=2000
    )
    client = await EngineClient.start(args.resolve())
    streams = []
    try:
        endless = SamplingParams(max_tokens=7000, temperature=0.0, ignore_eos=True)
        streams += client.submit([5], endless)
        while not client.stats.num_running:
            await asyncio.sleep(0.01)
        allowed = msgspec.structs.replace(endless, allowed_token_ids=[3, 4, 5] * 300)
        for _ in range(2):
            streams += client.submit([5], allowed)
        with pytest.raises(EngineBusyError):
            client.submit([5], allowed)
        streams[1].abort()
        streams += client.submit([5], allowed)
        for stream in streams[1:]:
            stream.abort()
        assert client.admission._num_tokens == 0
    finally:
        await client.close()


class CountedParams(SamplingParams, frozen=True, kw_only=True):
    """Counts how often one was checked."""

    def __post_init__(self) -> None:
        COUNTED.append(1)


COUNTED: list[int] = []


async def test_parameters_are_checked_once_and_travel_once(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(client.replicas[0], "send", sent.append)
    COUNTED.clear()
    params = CountedParams(n=8, temperature=1.0, seed=3, allowed_token_ids=[3, 4] * 1000, max_tokens=9)
    streams = await client.submit_all([[5, 6] * 50, [7] * 20], params)
    (message,) = [each for each in sent if isinstance(each, Add)]
    one = len(frame(msgspec.msgpack.Encoder(), Add(message.shared, [])))
    assert one < len(frame(msgspec.msgpack.Encoder(), message)) < one + 400
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame(msgspec.msgpack.Encoder(), message))
        (received,) = EngineEnd(theirs).receive_commands(wait=True)
    assert isinstance(received, Add) and len(COUNTED) == 1
    first, second = received.samples()
    assert [request.request_id for request in [*first, *second]] == [stream.request_id for stream in streams]
    assert [request.seed for request in second] == list(range(3, 11))
    assert {id(request.params.allowed_token_ids) for request in [*first, *second]} == {
        id(received.shared.params.allowed_token_ids)
    }
    assert len({id(request.prompt_token_ids) for request in first}) == 1
    for stream in streams:
        stream.abort()


async def test_waiting_samples_of_a_prompt_share_its_tokens_in_the_engine() -> None:
    engine = Engine(max_num_seqs=4, num_blocks=64)
    prompt = [token % VOCAB for token in range(37)]
    samples = [msgspec.structs.replace(make_request(i, prompt), sample=i) for i in range(6)]
    assert engine.core.add_samples(samples) == []
    requests = list(engine.core.scheduler._requests.values())
    assert len({id(request.token_ids) for request in requests}) == 1
    assert len({id(request.keys) for request in requests}) == 1
    engine.drain()
    for sample in samples:
        assert engine.answers[sample.request_id].tokens == run_alone(sample).tokens


async def test_time_outs_reach_the_client() -> None:
    args = EngineArgs(
        model=str(long_folder()),
        dtype="float32",
        cpu_threads=1,
        max_num_seqs=1,
        queue_timeout=0.5,
        request_timeout=4.0,
    )
    client = await EngineClient.start(args.resolve())
    try:
        endless = {"prompt": [5], "max_tokens": 7000, "ignore_eos": True, "model": client.config.model}
        long = asyncio.ensure_future(answer(client, endless))
        while not client.stats.num_running:
            await asyncio.sleep(0.01)
        late, late_stream = await asyncio.gather(
            answer(client, endless), answer(client, {**endless, "stream": True})
        )
        ended = await long
    finally:
        await client.close()
    assert late.status_code == 503 and int(late.headers["retry-after"]) >= 1
    assert late.json()["error"]["type"] == "QueueTimeoutError"
    (event,) = events(late_stream.text)
    assert event["error"]["type"] == "QueueTimeoutError" and event["error"]["code"] == 503
    assert ended.status_code == 504 and ended.json()["error"]["type"] == "TimeoutError"
