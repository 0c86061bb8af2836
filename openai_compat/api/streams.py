"""Collects the token streams of a request, one per choice, or merges their deltas as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from microvllm.runtime.errors import EngineDeadError
from microvllm.runtime.process.token_stream import TokenStream

if TYPE_CHECKING:
    from microvllm.openai_compat.api.beam import BeamStream
    from microvllm.runtime.request import TokenLogprobs
    from microvllm.runtime.text.detokenizer import TextDelta

    Stream = TokenStream | BeamStream

DELTAS_AT_ONCE = 1024


@dataclass(slots=True)
class Outcome:
    """One finished choice; `logprobs` has one entry per token if they were requested."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


async def collect(
    streams: list[Stream], start_again: Callable[[TokenStream], TokenStream | None]
) -> list[Outcome]:
    """Return every choice, whole. Raises `EngineError` if the engine fails; the caller aborts.

    A choice whose engine died is computed again where `start_again` gives a stream, which takes the place of
    the first in `streams`.
    """
    outcomes = []
    # One after the other takes no longer: the other streams fill up meanwhile.
    for number, stream in enumerate(streams):
        if number % DELTAS_AT_ONCE == DELTAS_AT_ONCE - 1:  # thousands may be ready at once, of one delta each
            await asyncio.sleep(0)
        try:
            outcomes.append(await _whole(stream))
        except EngineDeadError:
            again = start_again(stream) if isinstance(stream, TokenStream) else None
            if again is None:
                raise
            streams[number] = again
            outcomes.append(await _whole(again))
    return outcomes


async def _whole(stream: Stream) -> Outcome:
    outcome, parts, taken = Outcome(), [], 0
    async for delta in stream:
        taken += 1
        if taken % DELTAS_AT_ONCE == 0:
            await asyncio.sleep(0)
        parts.append(delta.text)
        outcome.token_ids += delta.token_ids
        outcome.logprobs += delta.logprobs or []
        if delta.finish_reason is not None:
            outcome.finish_reason = delta.finish_reason
            outcome.stop_reason = delta.stop_reason
    outcome.text = "".join(parts)
    return outcome


@asynccontextmanager
async def merged(streams: Sequence[Stream], interval: int) -> AsyncGenerator[AsyncIterable[TextDelta], None]:
    """Give the deltas of all streams as they arrive, of at least `interval` tokens each.

    The first and the last delta of a choice do not wait for others.
    """
    if len(streams) == 1:
        yield streams[0] if interval == 1 else _spaced(streams[0], interval)
        return
    async with aclosing(_arriving(streams)) as arriving:
        yield arriving if interval == 1 else _spaced(arriving, interval)


async def _arriving(streams: Sequence[Stream]) -> AsyncGenerator[TextDelta, None]:
    # Bounded, so that a slow client makes the streams join tokens instead of filling this queue.
    queue: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue(len(streams))
    pumps = [asyncio.ensure_future(_pump(i, stream, queue)) for i, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()


async def _spaced(deltas: AsyncIterable[TextDelta], interval: int) -> AsyncGenerator[TextDelta, None]:
    held: dict[int, TextDelta] = {}
    begun: set[int] = set()
    async for later in deltas:
        choice = later.choice
        delta = held.pop(choice, None)
        if delta is None:
            delta = later
        else:
            delta.merge(later)
        if choice in begun and delta.finish_reason is None and len(delta.token_ids) < interval:
            held[choice] = delta
            continue
        begun.add(choice)
        yield delta


async def _pump(choice: int, stream: Stream, queue: asyncio.Queue[TextDelta | Exception | None]) -> None:
    try:
        async for delta in stream:
            delta.choice = choice
            await queue.put(delta)
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
