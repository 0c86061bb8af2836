"""How far the start of an engine has come: what a stage tells, and its way from one process to the other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from microvllm.runtime import progress
from microvllm.runtime.errors import EngineDeadError
from microvllm.runtime.process.channel import Progress, Ready, frame
from microvllm.runtime.process.engine_process import EngineProcess
from microvllm.runtime.progress import Stage
from microvllm.runtime.request import EngineStats


def test_a_stage_tells_its_beginning_each_part_and_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 14.25])
    monkeypatch.setattr(progress, "perf_counter", lambda: next(times))
    told: list[tuple[Any, ...]] = []
    stage = Stage("Capturing CUDA graphs", 3, lambda *each: told.append(each))
    for _ in range(3):
        stage.advance()
    stage.finish(f"Captured 3 graphs in {stage.seconds:.1f} s")
    assert told == [
        ("Capturing CUDA graphs", 0, 3, ""),
        ("Capturing CUDA graphs", 1, 3, ""),
        ("Capturing CUDA graphs", 2, 3, ""),
        ("Capturing CUDA graphs", 3, 3, "Captured 3 graphs in 4.2 s"),
    ]


def test_a_stage_need_not_tell_anybody() -> None:
    stage = Stage("Warming up", 1, None)
    stage.advance()
    stage.finish("")


async def test_every_stage_comes_from_the_engine_process_to_whoever_shows_it() -> None:
    """The engine's end is scripted: no test machine need have a GPU whose graphs could be captured."""
    told: list[tuple[Any, ...]] = [
        ("Loading weights", 272, 272, ""),
        ("Capturing CUDA graphs", 0, 35, ""),
        ("Capturing CUDA graphs", 35, 35, "Captured 35 graphs in 4.2 s, 1.1 GB"),
    ]
    ours, theirs = socket.socketpair()
    engine = EngineProcess(None)  # type: ignore[arg-type]
    transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: engine, sock=ours)
    heard: list[tuple[Any, ...]] = []
    with theirs:
        encoder = msgspec.msgpack.Encoder()
        for each in told:
            theirs.sendall(frame(encoder, Progress(*each)))
        theirs.sendall(frame(encoder, Ready(EngineStats(kv_blocks_total=7))))
        await engine._await_ready(lambda *each: heard.append(each))
    assert heard == told and engine.first_stats.kv_blocks_total == 7
    transport.close()


async def test_events_in_pieces_an_event_at_fault_and_the_end() -> None:
    """`hear` hands over what came before it was called, too, and goes on where the last one left."""
    ours, theirs = socket.socketpair()
    encoder, heard = msgspec.msgpack.Encoder(), list[Any]()
    engine = EngineProcess(None)  # type: ignore[arg-type]
    await asyncio.get_running_loop().create_unix_connection(lambda: engine, sock=ours)

    def until(last: str) -> Callable[[Any], bool]:
        def on_event(event: Any) -> bool:
            heard.append(event.what)
            return bool(event.what == last)

        return on_event

    with theirs:
        message = b"".join(frame(encoder, Progress(what, 0, 1)) for what in ("one", "two", "three", "four"))
        for byte in range(0, len(message), 5):
            theirs.sendall(message[byte : byte + 5])
            await asyncio.sleep(0)
        await engine.hear(until("two"))
        assert heard == ["one", "two"]
        with pytest.raises(ZeroDivisionError):
            await engine.hear(lambda event: bool(1 // 0))
        await engine.hear(until("four"))
        theirs.sendall(message[:7])
        waiting = asyncio.ensure_future(engine.hear(until("never")))
        await asyncio.sleep(0.05)
        assert not waiting.done()
    for _ in range(2):  # the end of file, and again after it
        with pytest.raises(EngineDeadError):
            await waiting
        waiting = asyncio.ensure_future(engine.hear(until("never")))
    with pytest.raises(EngineDeadError):
        await waiting
    assert heard == ["one", "two", "four"]
