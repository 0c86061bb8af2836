"""The engine process and its client: start, stream, abort, die, come back, and leave nobody behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from model_tools import LONG, long_folder, make_engine
from process_tools import PATIENCE_S, alive, own_engines, stopped, wait_until, wait_until_async

from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.errors import (
    ConfigError,
    ContextLengthError,
    EngineBusyError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
)
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.channel import Ready, Start, Step, frame
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.process.engine_process import EngineProcess
from microvllm.runtime.process.spawn import SpawnedEngine
from microvllm.runtime.process.token_stream import MAX_BACKLOG, TokenStream
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.text.detokenizer import TextDelta

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 70, 200, 31, 8]
AT_ONCE_S = 20.0  # generous for a busy machine; what is meant takes milliseconds


def make_config(**options: Any) -> EngineConfig:
    defaults = {
        "model": str(long_folder()),
        "dtype": "float32",
        "cpu_threads": 1,
        "num_gpu_blocks_override": LONG // 16,
        "max_num_seqs": 8,
    }
    return EngineArgs(**{**defaults, **options}).resolve()


def params(max_tokens: int = 20, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True, **options})


async def collect(stream: TokenStream) -> TextDelta:
    """All deltas of a stream as one."""
    whole = TextDelta([], "")
    async for delta in stream:
        assert whole.finish_reason is None, "a delta after the last one"
        whole.merge(delta)
    return whole


def expected_tokens(count: int) -> list[int]:
    engine = make_engine(long_folder(), num_gpu_blocks_override=LONG // 16)
    prompt = engine.tokenizer.decode(PROMPT)
    assert engine.tokenizer.encode(prompt) == PROMPT, "choose a prompt that survives decoding"
    return [token for token, _ in engine.stream_generate(prompt, count, temperature=0.0, ignore_eos=True)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(make_config())
    yield client
    await client.close()
    assert own_engines() == []


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def at_rest(client: EngineClient) -> AsyncIterator[None]:
    """Before and after each test the engine serves, and holds nothing."""
    await wait_until_async(client.healthy, "the engine serves")
    yield
    await wait_until_async(client.healthy, "the engine serves again")
    assert not client.replicas[0].streams
    await wait_until_async(lambda: client.stats.kv_blocks_used == 0, "all blocks are free")


def engine_pid(client: EngineClient) -> int:
    (replica,) = client.replicas
    assert replica.process is not None
    return replica.process.pid


# ---- start ----------------------------------------------------------------------------------------


async def test_a_context_that_the_engine_lowers_is_the_client_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does whose memory holds no more than that."""
    wait_ready = EngineProcess.wait_ready

    async def lowered(self: EngineProcess, on_progress: Any) -> None:
        await wait_ready(self, on_progress)
        assert self.max_model_len == LONG
        self.max_model_len = 48

    monkeypatch.setattr(EngineProcess, "wait_ready", lowered)
    client = await EngineClient.start(make_config())
    try:
        assert client.config.max_model_len == 48
        with pytest.raises(ContextLengthError, match=r"context .*48 tokens"):
            client.submit([7] * 49, params(1))
        with pytest.raises(ContextLengthError, match=r"context .*48 tokens"):
            client.processor.tokenize_prompt("a" * 10_000)
        (stream,) = client.submit([7] * 40, params(8))
        reading = asyncio.ensure_future(collect(stream))
    finally:
        await client.close(drain_s=PATIENCE_S)  # which waits for streams as long as it is told to
    assert len((await reading).token_ids) == 8


async def test_start_reports_progress_and_is_ready_until_it_is_closed() -> None:
    told: list[tuple[Any, ...]] = []
    client = await EngineClient.start(make_config(), on_progress=lambda *each: told.append(each))
    try:
        assert client.healthy() and client.stats.kv_blocks_total == LONG // 16
        assert told == sorted(told) and told[-1][1] == told[-1][2] > 0
        assert {(what, total, note) for what, _, total, note in told} == {
            ("Loading weights", told[-1][2], "")
        }
        pid = engine_pid(client)
        assert alive(pid) and pid != os.getpid()
        (stream,) = client.submit(PROMPT, params(None))  # type: ignore[arg-type]
        await anext(stream)
    finally:
        await client.close()
    with pytest.raises(EngineDeadError, match="shutting down"):
        await collect(stream)
    assert not alive(pid) and not client.healthy()
    with pytest.raises(EngineDeadError):
        client.submit(PROMPT, params())


def break_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {')


async def test_a_broken_folder_is_one_line_and_leaves_no_process(tmp_path: Path) -> None:
    """And the event loop as good as before: later tests start engines on it."""
    before = own_engines()
    for damage, named in ((break_weights, "model.safetensors"), (break_tokenizer, "tokenizer.json")):
        folder = tmp_path / named
        shutil.copytree(long_folder(), folder)
        config = make_config(model=str(folder))
        damage(folder)
        with pytest.raises(ConfigError) as caught:
            await EngineClient.start(config)
        assert named in str(caught.value) and "\n" not in str(caught.value)
        assert own_engines() == before


async def test_a_start_that_is_given_up_leaves_no_process() -> None:
    before = own_engines()
    start = asyncio.ensure_future(EngineClient.start(make_config()))
    await wait_until_async(lambda: len(own_engines()) > len(before), "the engine process is there")
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert own_engines() == before


# ---- streams --------------------------------------------------------------------------------------


async def test_streams_give_what_the_engine_gives_in_this_process(client: EngineClient) -> None:
    expected = expected_tokens(30)
    (stream,) = client.submit(PROMPT, params(30))
    deltas = [delta async for delta in stream]
    assert [token for delta in deltas for token in delta.token_ids] == expected
    assert "".join(delta.text for delta in deltas) == client.tokenizer.decode(expected)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert stream.prompt_token_ids == PROMPT
    many = [client.submit(PROMPT, params(30))[0] for _ in range(12)]
    for whole in await asyncio.gather(*map(collect, many)):
        assert whole.token_ids == expected
    (endless,) = client.submit(PROMPT, params(None))  # type: ignore[arg-type]
    for _ in range(6):
        assert (await anext(endless)).finish_reason is None, "tokens come as they are made, not at the end"
    endless.abort()


async def test_parameters_arrive(client: EngineClient) -> None:
    expected = expected_tokens(30)
    text = client.tokenizer.decode(expected)
    stop = next(text[i : i + 2] for i in range(12, len(text)) if "\ufffd" not in text[i : i + 2])
    whole = await collect(client.submit(PROMPT, params(30, stop=[stop]))[0])
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (text[: text.index(stop)], "stop", stop)
    whole = await collect(client.submit(PROMPT, params(30, stop_token_ids=[expected[8]]))[0])
    assert whole.token_ids == expected[: expected.index(expected[8]) + 1]
    assert (whole.finish_reason, whole.stop_reason) == ("stop", expected[8])
    sampled = params(10, temperature=1.0, seed=3, n=3)
    first, second = [[(await collect(s)).token_ids for s in client.submit(PROMPT, sampled)] for _ in range(2)]
    assert first == second and len({tuple(tokens) for tokens in first}) == 3


async def test_the_prefix_cache_and_its_reset(client: EngineClient) -> None:
    prompt = [(7 * i) % 300 for i in range(70)]
    cached = []
    for salt in ("", "", "other", "other"):
        (stream,) = client.submit(prompt, params(2), cache_salt=salt)
        await collect(stream)
        cached.append(stream.num_cached_tokens)
    client.reset_prefix_cache()
    (stream,) = client.submit(prompt, params(2))
    await collect(stream)
    assert [*cached, stream.num_cached_tokens] == [0, 64, 0, 64, 0]


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([], {}, "prompt"),
        ([320], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * LONG, {}, "max_tokens"),
        ([1] * (LONG + 1), {}, "input_tokens"),
        ([1] * (LONG - 12), {"min_tokens": 20}, "min_tokens"),
        ([1], {"stop_token_ids": [320]}, "stop_token_ids"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_wrong_request_never_leaves(
    client: EngineClient, prompt: list[int], options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.submit(prompt, params(20, **options))
    assert caught.value.param == field and not client.replicas[0].streams


async def test_a_slow_consumer_gets_one_piece_beyond_the_backlog(client: EngineClient) -> None:
    expected = expected_tokens(200)
    (stream,) = client.submit(PROMPT, params(200))
    await wait_until_async(lambda: stream._ended, "the engine is through")
    deltas = [await anext(stream) for _ in range(MAX_BACKLOG)]
    assert [len(delta.token_ids) for delta in deltas] == [1] * (MAX_BACKLOG - 1) + [201 - MAX_BACKLOG]
    assert [token for delta in deltas for token in delta.token_ids] == expected
    assert "".join(delta.text for delta in deltas) == client.tokenizer.decode(expected)
    assert [delta.finish_reason for delta in deltas] == [None] * (MAX_BACKLOG - 1) + ["length"]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_every_token_is_a_delta_of_its_own_on_a_busy_event_loop(client: EngineClient) -> None:
    async def hold_up() -> None:
        while True:
            time.sleep(0.05)  # no other task and no message gets a turn
            await asyncio.sleep(0.001)

    async def sizes(stream: TokenStream) -> list[int]:
        return [len(delta.token_ids) async for delta in stream]

    streams = [stream for _ in range(4) for stream in client.submit(PROMPT, params(60))]
    busy = asyncio.ensure_future(hold_up())
    found = await asyncio.gather(*map(sizes, streams))
    busy.cancel()
    assert found == [[1] * 60] * 4


@pytest.mark.parametrize("error", [KeyError("a"), EngineError("it could not be turned into text")])
async def test_what_fails_in_one_stream_stays_there(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (bad,), (good,) = client.submit(PROMPT, params(None)), client.submit(PROMPT, params(40))

    def fail(output: Any) -> TextDelta:
        raise error

    monkeypatch.setattr(bad, "_text", SimpleNamespace(process=fail))
    with pytest.raises(EngineError, match="could not be turned into text"):
        await collect(bad)
    assert (await collect(good)).token_ids == expected_tokens(40)
    await wait_until_async(lambda: not client.stats.num_running, "the engine has stopped with it, too")
    assert client.healthy()


# ---- abort ----------------------------------------------------------------------------------------


async def test_an_abort_frees_the_blocks_within_one_step(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is stopped meanwhile, so that it is known at which step the abort reaches it."""
    told: list[EngineStats] = []
    monkeypatch.setattr(client.replicas[0].observer, "on_step", told.append)
    (stream,) = client.submit(PROMPT, params(None))  # type: ignore[arg-type]
    for _ in range(3):
        await anext(stream)
    pid = engine_pid(client)
    os.kill(pid, signal.SIGSTOP)
    try:
        await wait_until_async(lambda: stopped(pid), "the engine has stopped")
        await asyncio.sleep(0.01)  # the loop has a turn, in which it takes in what was sent before
        assert told[-1].kv_blocks_used > 0 and told[-1].num_running == 1
        told.clear()
        stream.abort()
        stream.abort()
        await asyncio.sleep(0)  # the loop has a turn, in which it writes the message
    finally:
        os.kill(pid, signal.SIGCONT)
    await wait_until_async(lambda: bool(told) and told[-1].kv_blocks_used == 0, "the blocks are free")
    still = [stats for stats in told if stats.kv_blocks_used]
    assert len(still) <= 1, "only the step that was being computed may still hold blocks"
    # What had arrived may be read, then the stream has ended.
    left = [delta async for delta in stream]
    assert len(left) <= MAX_BACKLOG and client.stats.num_running == 0


async def test_aborts_at_any_moment(client: EngineClient) -> None:
    """Before the first token, among others, after the end; the others do not notice."""
    expected = expected_tokens(40)
    (early,) = client.submit(PROMPT, params(40))
    early.abort()
    assert [delta async for delta in early] == []
    streams = [client.submit(PROMPT, params(40))[0] for _ in range(12)]
    for number, stream in enumerate(streams):
        if number % 3 == 0:
            stream.abort()
    results = await asyncio.gather(*map(collect, streams))
    assert all(whole.token_ids == expected for number, whole in enumerate(results) if number % 3)
    for stream in streams:
        stream.abort()


async def test_one_reader_waiting_is_woken_by_an_abort(client: EngineClient) -> None:
    (stream,) = client.submit(PROMPT, params(None))  # type: ignore[arg-type]
    reading = asyncio.ensure_future(collect(stream))
    await asyncio.sleep(0.05)
    stream.abort()
    whole = await asyncio.wait_for(reading, PATIENCE_S)
    assert whole.finish_reason is None


# ---- death and return -----------------------------------------------------------------------------


async def test_a_killed_engine_fails_open_streams_at_once_and_comes_back(client: EngineClient) -> None:
    expected = expected_tokens(20)
    streams = [client.submit(PROMPT, params(None))[0] for _ in range(3)]  # type: ignore[arg-type]
    await asyncio.gather(*(anext(stream) for stream in streams))
    pid = engine_pid(client)
    others = set(own_engines()) - {pid}
    start = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
    assert time.monotonic() - start < AT_ONCE_S
    assert all(isinstance(result, EngineDeadError) for result in results), results
    assert not client.healthy()
    with pytest.raises(EngineDeadError):
        client.submit(PROMPT, params())
    await wait_until_async(client.healthy, "the engine is back")
    assert engine_pid(client) != pid and set(own_engines()) - others == {engine_pid(client)}
    assert (await collect(client.submit(PROMPT, params(20))[0])).token_ids == expected


async def test_an_engine_killed_twice_comes_back_twice(client: EngineClient) -> None:
    """Once while it is idle, and once while it loads."""
    before = set(own_engines())
    os.kill(engine_pid(client), signal.SIGKILL)
    await wait_until_async(lambda: bool(set(own_engines()) - before), "it is started")
    (second,) = set(own_engines()) - before
    os.kill(second, signal.SIGKILL)
    await wait_until_async(lambda: client.healthy() and engine_pid(client) != second, "the engine is back")
    assert len((await collect(client.submit(PROMPT, params(4))[0])).token_ids) == 4


async def test_signals_for_the_service_do_not_end_the_engine(client: EngineClient) -> None:
    pid = engine_pid(client)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert len((await collect(client.submit(PROMPT, params(10))[0])).token_ids) == 10
    assert engine_pid(client) == pid


# ---- limits ---------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow() -> AsyncIterator[EngineClient]:
    """One request runs, two wait."""
    client = await EngineClient.start(make_config(max_num_seqs=1, max_num_queued_reqs=2))
    yield client
    await client.close()


async def test_a_full_queue_is_busy(narrow: EngineClient) -> None:
    (running,) = narrow.submit(PROMPT, params(None))  # type: ignore[arg-type]
    await anext(running)
    waiting = [narrow.submit(PROMPT, params(5))[0] for _ in range(2)]
    with pytest.raises(EngineBusyError):
        narrow.submit(PROMPT, params(5))
    with pytest.raises(EngineBusyError):
        narrow.submit(PROMPT, params(5, n=2, temperature=1.0))
    running.abort()
    for stream in waiting:
        assert len((await collect(stream)).token_ids) == 5
    assert len((await collect(narrow.submit(PROMPT, params(5))[0])).token_ids) == 5


async def test_the_queue_is_counted_while_requests_are_on_their_way(narrow: EngineClient) -> None:
    """A step that was computed before a request arrived says nothing about it: it still takes its place.

    Otherwise the next request would be let through, and refused by the engine as if the engine had failed.
    """
    (running,) = narrow.submit(PROMPT, params(None))  # type: ignore[arg-type]
    await anext(running)
    earlier = narrow.stats
    waiting = [narrow.submit(PROMPT, params(5))[0] for _ in range(2)]
    narrow.replicas[0].handle(Step([], earlier))
    with pytest.raises(EngineBusyError):
        narrow.submit(PROMPT, params(5))
    running.abort()
    for stream in waiting:
        assert len((await collect(stream)).token_ids) == 5
    assert len((await collect(narrow.submit(PROMPT, params(5))[0])).token_ids) == 5


# ---- orphans --------------------------------------------------------------------------------------

PARENT = """
import asyncio, sys
from pathlib import Path
import msgspec
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.config import EngineConfig

async def main():
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=EngineConfig)
    client = await EngineClient.start(config)
    print(client.replicas[0].process.pid, flush=True)
    if sys.argv[2] == "crash":
        raise RuntimeError("on purpose")
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Any]:
    """Starts scripts that start an engine; ends those that are left."""
    file = tmp_path / "config.json"
    file.write_bytes(msgspec.json.encode(make_config()))
    started: list[subprocess.Popen[str]] = []

    def start(how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(file), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["killed", "crash"])
async def test_no_engine_outlives_its_parent(parent: Any, how: str) -> None:
    process = parent(how)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    if how == "killed":
        assert alive(pid)
        process.kill()
    process.wait(PATIENCE_S)
    wait_until(lambda: not alive(pid), "the engine has ended")


async def test_a_spawned_engine_is_used_or_ends() -> None:
    others = set(own_engines())
    with SpawnedEngine(1) as spawned:
        (pid,) = set(own_engines()) - others
        client = await EngineClient.start(make_config(), spawned=spawned)
        (stream,) = client.submit(PROMPT, params(3))
        assert len((await collect(stream)).token_ids) == 3
    assert set(own_engines()) - others == {pid}
    await client.close()
    with pytest.raises(ZeroDivisionError), SpawnedEngine():
        assert len(set(own_engines()) - others) == 1
        raise ZeroDivisionError
    assert set(own_engines()) == others


async def test_the_engine_ends_when_its_socket_closes_during_load() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "microvllm.runtime.process.engine_main", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        ours.sendall(frame(msgspec.msgpack.Encoder(), Start(make_config())))
        ours.close()
        _, complaints = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0 and complaints == ""
    finally:
        process.kill()
        process.communicate()


async def test_the_engine_says_nothing_but_events_before_it_is_ready() -> None:
    """The protocol from the other side: Start in, progress and Ready out, end of file in, exit 0."""
    from microvllm.runtime.process.channel import HEADER_BYTES, Event

    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "microvllm.runtime.process.engine_main", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        with ours, ours.makefile("rb") as read:
            ours.settimeout(PATIENCE_S)
            message = frame(msgspec.msgpack.Encoder(), Start(make_config()))
            for byte in range(0, len(message), 7):  # in pieces, as a slow socket gives them
                ours.sendall(message[byte : byte + 7])
            events: list[Any] = []
            while not events or not isinstance(events[-1], Ready):
                size = int.from_bytes(read.read(HEADER_BYTES), "little")
                events.append(msgspec.msgpack.decode(read.read(size), type=Event))
        assert events[-2].done == events[-2].total
        assert events[-1].stats.kv_blocks_total == LONG // 16
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
