"""Collects the token streams of a request, one per choice, or merges their deltas as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
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

    def take(self, delta: TextDelta) -> None:
        """Add all of a delta but its text, which the caller joins."""
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


async def collect(
    streams: list[Stream], start_again: Callable[[TokenStream], TokenStream | None]
) -> list[Outcome]:
    """Return every choice, whole. Raises `EngineError` if the engine fails; the caller aborts.

    A choice whose engine died is computed again where `start_again` gives a stream, which takes the place of
    the first in `streams`.
    """
    outcomes = []
    taken = 0  # thousands may be ready at once
    # One after the other takes no longer: the other streams fill up meanwhile.
    for number in range(len(streams)):
        outcome = None
        while outcome is None:
            outcome, parts = Outcome(), list[str]()
            try:
                async for delta in streams[number]:
                    outcome.take(delta)
                    parts.append(delta.text)
                    taken += 1
                    if taken % DELTAS_AT_ONCE == 0:
                        await asyncio.sleep(0)
            except EngineDeadError:
                stream = streams[number]
                again = start_again(stream) if isinstance(stream, TokenStream) else None
                if again is None:
                    raise
                streams[number], outcome = again, None
        outcome.text = "".join(parts)
        outcomes.append(outcome)
    return outcomes


def merged(streams: Sequence[Stream], interval: int) -> AsyncIterable[TextDelta]:
    """Return the deltas of all streams as they arrive, of at least `interval` tokens each, to be closed.

    The first and the last delta of a choice do not wait for others.
    """
    arriving = streams[0] if len(streams) == 1 else _arriving(streams)
    return arriving if interval == 1 else _spaced(arriving, interval)


async def close(deltas: AsyncIterable[TextDelta]) -> None:
    """Close what `merged` returned, where a generator is behind it. A lone stream has none: 0.6 KB less."""
    if isinstance(deltas, AsyncGenerator):
        await deltas.aclose()


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
    try:
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
    finally:
        await close(deltas)


async def _pump(choice: int, stream: Stream, queue: asyncio.Queue[TextDelta | Exception | None]) -> None:
    try:
        async for delta in stream:
            delta.choice = choice
            await queue.put(delta)
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
