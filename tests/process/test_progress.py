"""How far the start of an engine has come: what a stage tells, and its way from one process to the other."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import msgspec
import pytest

from microvllm.runtime import progress
from microvllm.runtime.errors import EngineDeadError
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.channel import Progress, Ready, frame
from microvllm.runtime.process.engine_main import failure
from microvllm.runtime.process.engine_process import EngineProcess
from microvllm.runtime.progress import Stage


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


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/home/x"), "'/home/x'", "TRITON_CACHE_DIR"),
        (MemoryError(), "MemoryError", "free memory"),
        (RuntimeError("CUDA out of memory\nand more"), "CUDA out of memory", "free memory"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error: Exception, message: str, remedy: str) -> None:
    failed = failure(error)
    assert failed is not None and failed.message.startswith("the model could not be loaded: ")
    assert failed.message.endswith(message) and remedy in str(failed.remedy)


def test_another_fault_of_a_file_is_none() -> None:
    assert failure(OSError(errno.EIO, "Input/output error")) is None


def test_a_stage_need_not_tell_anybody() -> None:
    stage = Stage("Warming up", 1, None)
    stage.advance()
    stage.finish("")


async def connected(sock: socket.socket) -> EngineProcess:
    """The server's end of a channel whose other end a test writes to."""
    return EngineProcess(None, *await asyncio.open_unix_connection(sock=sock))  # type: ignore[arg-type]


async def test_every_stage_comes_from_the_engine_process_to_whoever_shows_it() -> None:
    """The engine's end is scripted: no test machine need have a GPU whose graphs could be captured."""
    told: list[tuple[Any, ...]] = [
        ("Loading weights", 272, 272, ""),
        ("Capturing CUDA graphs", 0, 35, ""),
        ("Capturing CUDA graphs", 35, 35, "Captured 35 graphs in 4.2 s, 1.1 GB"),
    ]
    ours, theirs = socket.socketpair()
    engine = await connected(ours)
    seen: list[tuple[Any, ...]] = []
    with theirs:
        encoder = msgspec.msgpack.Encoder()
        for each in told:
            theirs.sendall(frame(encoder, Progress(*each)))
        theirs.sendall(frame(encoder, Ready(EngineStats(kv_blocks_total=7), 64)))
        await engine.wait_ready(lambda *each: seen.append(each))
    assert seen == told and engine.first_stats.kv_blocks_total == 7 and engine.max_model_len == 64
    engine._writer.close()


async def test_events_in_pieces_and_the_end() -> None:
    """`read_event` returns events in their order, those from before its call too, and waits for half ones."""
    ours, theirs = socket.socketpair()
    encoder = msgspec.msgpack.Encoder()
    engine = await connected(ours)
    with theirs:
        message = b"".join(frame(encoder, Progress(what, 0, 1)) for what in ("one", "two", "three", "four"))
        for byte in range(0, len(message), 5):
            theirs.sendall(message[byte : byte + 5])
            await asyncio.sleep(0)
        for what in ("one", "two", "three", "four"):
            event = await engine.read_event()
            assert isinstance(event, Progress) and event.what == what
        theirs.sendall(message[:7])
        waiting = asyncio.ensure_future(engine.read_event())
        await asyncio.sleep(0.05)
        assert not waiting.done()
    for _ in range(2):  # the end of file, and again after it
        with pytest.raises(EngineDeadError):
            await waiting
        waiting = asyncio.ensure_future(engine.read_event())
    with pytest.raises(EngineDeadError):
        await waiting
    engine._writer.close()


async def test_a_frame_that_is_too_long_is_refused() -> None:
    ours, theirs = socket.socketpair()
    engine = await connected(ours)
    with theirs:
        theirs.sendall(b"\xff" * 4)
        with pytest.raises(EOFError, match="frame of 4294967295 bytes"):
            await engine.read_event()
    engine._writer.close()
