"""Plain events that are written when their tokens arrive, between those that the consumer sends."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from microvllm.openai_compat.api.generation import Chunks, Generation
from microvllm.openai_compat.transport.protocol import ChunkWriter
from microvllm.runtime.metrics.observer import EngineObserver, SampleGroup
from microvllm.runtime.process.token_stream import MAX_BACKLOG, TokenStream
from microvllm.runtime.request import EngineRequest, FinishReason, SamplingParams, StepOutput
from microvllm.runtime.text.detokenizer import TextDelta

NUMBER = 300  # tokens of an output


class Words(Chunks):
    """One event per delta: its text."""

    stateless = True  # type: ignore[assignment]

    def opening(self) -> list[bytes]:
        return [b"("]

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        if delta.text == "13,":
            raise ZeroDivisionError
        return delta.text.encode()

    def closing(self) -> list[bytes]:
        return [b")"]

    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        return counts


class Numbers:
    """Stands for the detokenizer: the text of a token is its id."""

    def process(self, output: StepOutput) -> TextDelta:
        reason = None if output.finish_reason is None else str(output.finish_reason)
        return TextDelta(output.token_ids, "".join(f"{token}," for token in output.token_ids), reason)


class Answer(Generation[Any]):
    """A request for one choice, without a server."""

    end = b"."
    sampling_params = read_prompts = answer = None  # type: ignore[assignment]
    chunks = Words  # type: ignore[assignment]

    def __init__(self, stream: Any, **changes: Any) -> None:
        self.id, self.streams, self._ended = "a", [stream], False
        self.include_usage, self.continuous_usage = True, False
        self.params = SamplingParams(n=1)
        self.body: Any = SimpleNamespace(stream_interval=None, echo=False)
        args = SimpleNamespace(
            stream_interval=1, enable_prompt_tokens_details=False, enable_per_request_metrics=False
        )
        self.state: Any = SimpleNamespace(args=args)
        for name, value in changes.items():
            setattr(self, name, value)


Answer.__abstractmethods__ = frozenset()


class Writer:
    """A `ChunkWriter` into a list."""

    def __init__(self, wire: list[bytes]) -> None:
        self.wire, self.open, self.written = wire, True, 0

    def write(self, body: bytes) -> None:
        assert self.open
        self.wire.append(body)
        self.written += 1


def make_stream() -> TokenStream:
    nothing = lambda *args, **kwargs: None  # noqa: E731
    client: Any = SimpleNamespace(
        observer=EngineObserver(),
        leave_queue=nothing,
        abort_request=nothing,
        forget_request=nothing,
    )
    request = EngineRequest(0, [1, 2], SamplingParams(max_tokens=NUMBER))
    stream = TokenStream(client, request, SampleGroup(1, 1))
    stream._text = Numbers()  # type: ignore[assignment]
    return stream


def output(token: int) -> StepOutput:
    return StepOutput(0, [token], FinishReason.LENGTH if token == NUMBER - 1 else None)


async def exchange(answer: Answer, writer: Writer, seed: int, *, turns: float = 0.7) -> None:
    """Feed the tokens one by one, the loop and the client now and then: what is sent gathers in the wire."""
    draw, stream, wire = random.Random(seed), answer.streams[0], writer.wire
    assert isinstance(stream, TokenStream)

    async def consume() -> None:
        async for event in answer.events(writer):  # type: ignore[arg-type]
            while not writer.open:
                await asyncio.sleep(0)
            wire.append(event)

    consumer = asyncio.ensure_future(consume())
    for token in range(NUMBER):
        stream.on_output(output(token), 0.0)
        if draw.random() < 0.1:
            writer.open = not writer.open
        while draw.random() < turns:
            await asyncio.sleep(0)
    writer.open = True
    await consumer


def whole(tokens: int = NUMBER) -> bytes:
    return b"(%s)" % "".join(f"{token}," for token in range(tokens)).encode()


@pytest.mark.parametrize("seed", range(20))
async def test_every_token_is_written_once_and_in_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Words, "chunk", lambda self, index, delta, usage: delta.text.encode())
    stream, writer = make_stream(), Writer([])
    await exchange(Answer(stream), writer, seed, turns=0.4 + 0.5 * (seed % 2))
    text = b"".join(writer.wire)
    assert text.startswith(whole()) and text.endswith(b".")
    assert b'"completion_tokens":%d' % NUMBER in text
    assert writer.written > NUMBER // 10 and stream.direct is None


async def test_an_error_of_the_writer_is_the_requests_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Token 13 cannot be written: as without the writer, the stream ends in an error event."""
    writer = Writer([])
    await exchange(Answer(make_stream()), writer, 3)
    text = b"".join(writer.wire)
    assert b"12," in text and b"14," not in text and b'"error"' in text and text.endswith(b".")


@pytest.mark.parametrize("changes", [{"continuous_usage": True}, {"interval": 2}, {"stateless": False}])
async def test_what_is_not_plain_is_left_to_the_consumer(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Words, "chunk", lambda self, index, delta, usage: delta.text.encode())
    monkeypatch.setattr(Words, "stateless", changes.pop("stateless", True))
    answer, writer = Answer(make_stream()), Writer([])
    answer.body.stream_interval = changes.pop("interval", None)
    for name, value in changes.items():
        setattr(answer, name, value)
    await exchange(answer, writer, 1)
    assert b"".join(writer.wire).startswith(whole()) and writer.written == 0


async def test_a_client_that_stops_reading_makes_the_stream_join_tokens() -> None:
    stream, writer = make_stream(), Writer([])
    consumer = answer = None
    answer = Answer(stream)
    sent: list[bytes] = []

    async def consume() -> None:
        async for event in answer.events(writer):  # type: ignore[arg-type]
            while not writer.open:
                await asyncio.sleep(0)
            sent.append(event)

    consumer = asyncio.ensure_future(consume())
    for token in range(13):
        stream.on_output(output(token), 0.0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    writer.open = False
    for token in range(100, NUMBER):
        stream.on_output(output(token), 0.0)
        await asyncio.sleep(0)
    assert len(stream._pending) <= MAX_BACKLOG
    writer.open = True
    await consumer
    assert b"".join([*writer.wire, *sent]).count(b",") >= 13 + NUMBER - 100


def test_a_writer_is_open_while_the_answer_may_be_written() -> None:
    transport: Any = SimpleNamespace(wire=b"", pause_reading=None)
    transport.write = lambda data: setattr(transport, "wire", transport.wire + data)
    flow = FlowControl(transport)
    cycle = RequestResponseCycle.__new__(RequestResponseCycle)
    cycle.transport, cycle.flow, cycle.chunked_encoding = transport, flow, None
    cycle.disconnected = cycle.response_complete = False
    writer = ChunkWriter(cycle)
    assert not writer.open, "no head was sent"
    cycle.chunked_encoding = True
    assert writer.open
    writer.write(b"x" * 26)
    assert transport.wire == b"1a\r\n" + b"x" * 26 + b"\r\n"
    flow.write_paused = True
    assert not writer.open
    flow.write_paused = False
    for name in ("disconnected", "response_complete"):
        setattr(cycle, name, True)
        assert not writer.open
        setattr(cycle, name, False)
