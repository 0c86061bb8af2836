"""Engines that are frozen, hang or only work hard, and engines whose server is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from model_tools import LONG, long_folder
from process_tools import PATIENCE_S, alive, stopped, wait_until, wait_until_async

from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.errors import EngineDeadError
from microvllm.runtime.process import heartbeat, spawn
from microvllm.runtime.process.channel import Start, frame
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.process.heartbeat import BEAT_S, Watch, delays_of, threads_of
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.request import SamplingParams

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
FROZEN_S = 4.0  # of the tests; the loop of a busy machine stands still for two or three seconds
NOTICED_S = 10.0  # at the latest, with the bounds of the package

# In an engine process of these tests: the second step of a request of so many tokens does this first.
WAITS, SPINS, HANGS = 8, 9, 10
PATCHED = f"""
import os, time
os.dup2(os.open(STDERR, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
from microvllm.runtime.core import engine_core as core
step, steps = core.EngineCore.step, []
def patched(self):
    running = [request.max_tokens for request in self.scheduler._running]
    if running in ([{WAITS}], [{SPINS}], [{HANGS}]):
        steps.append(running[0])
        if steps == [{HANGS}]:
            time.sleep(3600)
        elif steps == [{WAITS}]:
            time.sleep({FROZEN_S + 3})
        elif steps == [{SPINS}]:
            end = time.monotonic() + {FROZEN_S + 3}
            while time.monotonic() < end: sum(range(10**8))
    else:
        steps.clear()
    return step(self)
core.EngineCore.step = patched
main()
"""
ENDLESS = {
    "the model": """
import time
from microvllm.runtime.process import engine_main as process
process._load = lambda *_: (print("loading", flush=True), time.sleep(3600))
main()
""",
    "torch": """
import sys, time
class Endless:
    def find_spec(self, name, *_):
        if name == "torch":
            print("loading", flush=True)
            time.sleep(3600)
sys.meta_path.insert(0, Endless())
main()
""",
}

ENGINE_CODE = spawn.CODE.format(module="microvllm.runtime.process.engine_main")


def make_config() -> EngineConfig:
    return EngineArgs(
        model=str(long_folder()), dtype="float32", cpu_threads=1, num_gpu_blocks_override=LONG // 16
    ).resolve()


@pytest.fixture(scope="module")
def stderr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engines of `client` write there."""
    return tmp_path_factory.mktemp("engines") / "stderr"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stderr: Path) -> AsyncIterator[EngineClient]:
    """Its engines do what `PATCHED` says."""
    with pytest.MonkeyPatch.context() as patch:
        code = PATCHED.replace("STDERR", repr(str(stderr)))
        patch.setattr(spawn, "CODE", spawn.CODE.replace("main()\n", code))
        client = await EngineClient.start(make_config())
        yield client
        await client.close()


def submit(client: EngineClient, max_tokens: int | None = None) -> TokenStream:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    (stream,) = client.submit([5, 70, 200, 31, 8], params)
    return stream


def engine_pid(client: EngineClient) -> int:
    (replica,) = client.replicas
    assert replica.process is not None
    return replica.process.pid


# ---- through a real engine process -----------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_stopped_engine_is_seen_named_and_replaced(
    client: EngineClient, busy: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeat, "FROZEN_S", FROZEN_S)
    stream = submit(client) if busy else None
    if stream is not None:
        stream.name = "cmpl-77"
        await anext(stream)
    pid = engine_pid(client)
    os.kill(pid, signal.SIGSTOP)
    await wait_until_async(lambda: stopped(pid), "the engine has stopped")
    await wait_until_async(lambda: not client.healthy(), "the client has noticed")
    if stream is not None:
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
    await wait_until_async(client.healthy, "another engine serves")
    assert not alive(pid) and engine_pid(client) != pid
    assert await _read(submit(client, 3)) == 3
    assert "cannot print its stacks" in caplog.text
    assert ("1 requests: cmpl-77" if busy else "no requests") in caplog.text


async def test_a_step_that_hangs_leaves_its_stacks(
    client: EngineClient, stderr: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.replicas[0].watch.longest_step_s = 3.0
    pid, stream = engine_pid(client), submit(client, HANGS)
    with pytest.raises(EngineDeadError):
        async for _ in stream:
            pass
    await wait_until_async(client.healthy, "another engine serves")
    assert engine_pid(client) != pid
    stacks = stderr.read_text()
    assert "in patched" in stacks and "heartbeat.py" in stacks, "one of the threads is missing"
    assert "in one step for" in caplog.text and f"killed with 1 requests: {stream.request_id}." in caplog.text


@pytest.mark.parametrize(
    "action", [WAITS, SPINS], ids=["a step that waits", "a step that keeps the interpreter to itself"]
)
async def test_a_long_step_is_no_silence(
    client: EngineClient, action: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "FROZEN_S", FROZEN_S)
    stream, pid = submit(client, action), engine_pid(client)
    start, sick = time.monotonic(), 0
    reading = asyncio.ensure_future(_read(stream))
    while not reading.done():
        sick += not client.healthy()
        await asyncio.sleep(0.05)
    assert await reading == action and time.monotonic() - start > FROZEN_S + 2
    assert sick == 0 and engine_pid(client) == pid


async def _read(stream: TokenStream) -> int:
    return sum([len(delta.token_ids) async for delta in stream])


async def test_an_idle_engine_stays_healthy(client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "FROZEN_S", FROZEN_S)
    monkeypatch.setattr(client.replicas[0].watch, "longest_step_s", FROZEN_S)
    pid = engine_pid(client)
    for _ in range(int(2 * FROZEN_S)):
        await asyncio.sleep(1)
        assert client.healthy() and engine_pid(client) == pid


@pytest.mark.parametrize("wait_for", ENDLESS)
async def test_a_loading_engine_ends_with_its_server(wait_for: str) -> None:
    """As after kill -9: the other end of the socket is closed, and nobody kills the engine.

    What it loads takes longer than the test's patience.
    """
    code = ENGINE_CODE.replace("main()\n", ENDLESS[wait_for])
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
        )
    try:
        ours.sendall(frame(msgspec.msgpack.Encoder(), Start(make_config())))
        assert process.stdout is not None and process.stdout.readline() == b"loading\n"
        ours.close()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.communicate()


# ---- the judge alone: real processes, and a clock that the test sets ----------------------------------


WORK, SLEEP = "print(flush=True)\nwhile True: pass", "import time\nprint(flush=True)\ntime.sleep(3600)"


@contextlib.contextmanager
def process(code: str) -> Iterator[int]:
    """A process that has printed a line and then does what the code says."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None and child.stdout.readline()
            if code == SLEEP:
                wait_until(lambda: threads_of(child.pid)[0] == "S", "it sleeps")
            yield child.pid
        finally:
            child.kill()


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def problem_within(self, watch: Watch, seconds: float, **beat: Any) -> str | None:
        """What the judge says in so many seconds, a tick in each of them."""
        for _ in range(int(seconds)):
            self.now += 1
            if beat:
                watch.on_beat(**beat)
            if (problem := watch.tick(busy=False, interval_s=1.0)) is not None:
                return problem
        return None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


async def test_silence_counts_only_without_processor_time(clock: Clock) -> None:
    with process(WORK) as pid:
        assert clock.problem_within(Watch(pid, 60.0), 1000) is None, "it works and has no time to beat"
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: stopped(pid), "it has stopped")
        found = clock.problem_within(Watch(pid, 60.0), NOTICED_S - BEAT_S)
        assert "no sign of life" in str(found)
    with process(SLEEP) as pid:
        watch = Watch(pid, 60.0)
        assert "no sign of life" in str(clock.problem_within(watch, NOTICED_S - BEAT_S))
        watch.on_beat(resting=True)
        assert watch.tick(busy=False, interval_s=1.0) is None, "it is well again"


async def test_beats_are_missed_before_an_engine_is_frozen(clock: Clock) -> None:
    with process(SLEEP) as pid:
        watch = Watch(pid, 60.0)
        assert clock.problem_within(watch, 2) is None and not watch.missed
        assert clock.problem_within(watch, 1) is None and watch.missed
        watch.on_beat(resting=True)
        assert not watch.missed
        assert clock.problem_within(watch, 3) is None and watch.missed
        watch.on_step()
        assert not watch.missed
    with process(WORK) as pid:
        watch = Watch(pid, 60.0)
        assert clock.problem_within(watch, 4) is None and not watch.missed, "it works and has no time to beat"


async def test_a_step_is_bounded_and_rest_is_not(clock: Clock) -> None:
    with process(SLEEP) as pid:
        assert clock.problem_within(Watch(pid, 60.0), 1000, resting=True) is None
        assert clock.problem_within(Watch(pid, 60.0), 60, resting=False) is None
        assert "in one step" in str(clock.problem_within(Watch(pid, 60.0), 61, resting=False))


async def test_a_step_is_not_charged_for_waiting_for_a_processor(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each second the thread that waits most waits for 0.9: 61 s of its own are 610 in all."""
    monkeypatch.setattr(
        heartbeat, "delays_of", lambda _: {"1": round(clock.now * 9e8), "2": round(clock.now * 5e8)}
    )
    with process(SLEEP) as pid:
        assert clock.problem_within(Watch(pid, 60.0), 500, resting=False) is None
        assert "in one step" in str(clock.problem_within(Watch(pid, 60.0), 620, resting=False))


async def test_a_thread_waits_for_a_processor_unless_it_sleeps_or_is_stopped() -> None:
    with process(WORK) as pid, contextlib.ExitStack() as stack:
        processors = os.sched_getaffinity(pid)
        os.sched_setaffinity(pid, {min(processors)})
        rival = stack.enter_context(process(WORK))
        os.sched_setaffinity(rival, {min(processors)})
        before = delays_of(pid)
        if not any(before.values()):
            pytest.skip("the kernel does not account for it")
        wait_until(lambda: delays_of(pid)[str(pid)] > before[str(pid)], "it has waited for its rival")
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: stopped(pid), "it has stopped")
        before, (_, used) = delays_of(pid), threads_of(rival)
        wait_until(lambda: threads_of(rival)[1] > used + 5, "its rival has worked")
        assert delays_of(pid) == before


async def test_a_pause_of_the_server_itself_is_no_silence(clock: Clock) -> None:
    """Both processes of a container are paused together: the first tick may come before any beat."""
    with process(SLEEP) as pid:
        watch = Watch(pid, 60.0)
        clock.now += 3600
        assert watch.tick(busy=True, interval_s=1.0) is None
