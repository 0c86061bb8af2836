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
from functools import partial
from typing import Any

import msgspec
import pytest
from model_tools import LONG, long_folder
from process_tools import PATIENCE_S, alive, stopped, wait_until, wait_until_async

from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.errors import EngineDeadError
from microvllm.runtime.process import heartbeat, spawn
from microvllm.runtime.process.channel import Start, frame
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.process.heartbeat import FROZEN_S, Watch, threads_of
from microvllm.runtime.process.spawn import start_module
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.request import SamplingParams

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
NOTICED_S = 10.0
LOST_S = 5.0

# In the engine process: the second step of a request does something else first.
PATCHED = """
from microvllm.runtime.core import engine_core as core
step, steps = core.EngineCore.step, []
def patched(self):
    if self.scheduler.has_work():
        steps.append(1)
        if len(steps) == 2:
            {action}
    return step(self)
core.EngineCore.step = patched
main()
"""
ENDLESS_LOAD = """
import time
from microvllm.runtime.process import engine_main as process
process._load = lambda *_: (print("loading", flush=True), time.sleep(3600))
main()
"""

ENGINE_CODE = spawn.CODE.format(module="microvllm.runtime.process.engine_main")


def make_config() -> EngineConfig:
    return EngineArgs(
        model=str(long_folder()), dtype="float32", cpu_threads=1, num_gpu_blocks_override=LONG // 16
    ).resolve()


def start_patched(action: str, module: str, **options: Any) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """As `start_module`; the children of this process, which do not call this, are not patched."""
    with pytest.MonkeyPatch.context() as patch:
        code = PATCHED.format(action=action).replace("{", "{{").replace("}", "}}")
        patch.setattr(spawn, "CODE", spawn.CODE.replace("main()\n", code))
        return start_module(module, **options)


@contextlib.asynccontextmanager
async def started(patch: pytest.MonkeyPatch, action: str | None = None) -> AsyncIterator[EngineClient]:
    """A client whose first engine process does `action` in the second step of the first request."""
    with patch.context() as inner:
        if action is not None:
            inner.setattr(spawn, "start_module", partial(start_patched, action))
        client = await EngineClient.start(make_config())
    try:
        yield client
    finally:
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
    busy: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(monkeypatch) as client:
        stream = submit(client) if busy else None
        if stream is not None:
            stream.name = "cmpl-77"
            await anext(stream)
        pid = engine_pid(client)
        start = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        await wait_until_async(lambda: stopped(pid), "the engine has stopped")
        await wait_until_async(lambda: not client.healthy(), "the client has noticed")
        assert time.monotonic() - start < NOTICED_S
        if stream is not None:
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
        await wait_until_async(client.healthy, "another engine serves")
        assert not alive(pid) and engine_pid(client) != pid
        last = submit(client, 3)
        assert sum([len(delta.token_ids) async for delta in last]) == 3
    assert "cannot print its stacks" in caplog.text
    assert ("1 requests: cmpl-77" if busy else "no requests") in caplog.text


async def test_a_step_that_hangs_leaves_its_stacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async with started(monkeypatch, "import time; time.sleep(3600)") as client:
        client.replicas[0].watch.longest_step_s = 3.0
        stream = submit(client)
        pid = engine_pid(client)
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
        await wait_until_async(client.healthy, "another engine serves")
        assert engine_pid(client) != pid
    stacks = capfd.readouterr().err
    assert "in patched" in stacks and "heartbeat.py" in stacks, "one of the threads is missing"
    assert "in one step for" in caplog.text and f"killed with 1 requests: {stream.request_id}." in caplog.text


@pytest.mark.parametrize(
    "action",
    ["import time; time.sleep({seconds})", "import time; end = time.monotonic() + {seconds}\n"
     "            while time.monotonic() < end: sum(range(10**8))"],
    ids=["a step that waits", "a step that keeps the interpreter to itself"],
)  # fmt: skip
async def test_a_long_step_is_no_silence(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(monkeypatch, action.format(seconds=FROZEN_S + 4)) as client:
        stream, pid = submit(client, 8), engine_pid(client)
        start, sick = time.monotonic(), 0
        reading = asyncio.ensure_future(_read(stream))
        while not reading.done():
            sick += not client.healthy()
            await asyncio.sleep(0.05)
        assert await reading == 8 and time.monotonic() - start > FROZEN_S + 3
        assert sick == 0 and engine_pid(client) == pid


async def _read(stream: TokenStream) -> int:
    return sum([len(delta.token_ids) async for delta in stream])


async def test_an_idle_engine_stays_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(monkeypatch) as client:
        client.replicas[0].watch.longest_step_s = 4.0
        pid = engine_pid(client)
        for _ in range(int(2 * FROZEN_S)):
            await asyncio.sleep(1)
            assert client.healthy() and engine_pid(client) == pid


@pytest.mark.parametrize("wait_for", ["torch", "the model"])
async def test_a_loading_engine_ends_with_its_server(wait_for: str) -> None:
    """As after kill -9: the other end of the socket is closed, and nobody kills the engine."""
    code = ENGINE_CODE
    if wait_for == "the model":  # which takes longer than the test's patience
        code = code.replace("main()\n", ENDLESS_LOAD)
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
        )
    try:
        if wait_for == "the model":
            ours.sendall(frame(msgspec.msgpack.Encoder(), Start(make_config())))
            assert process.stdout is not None and process.stdout.readline() == b"loading\n"
        else:
            wait_until(lambda: len(threads_of(process.pid)[0]) > 1, "the heartbeat's thread is there")
        ours.close()
        start = time.monotonic()
        assert process.wait(PATIENCE_S) == 0
        assert time.monotonic() - start < LOST_S
    finally:
        process.kill()
        process.communicate()


# ---- the judge alone -------------------------------------------------------------------------------


@contextlib.contextmanager
def process(code: str) -> Iterator[int]:
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(heartbeat, "FROZEN_S", 1.0)


def problem_within(watch: Watch, seconds: float, **beat: Any) -> str | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
        if beat:
            watch.on_beat(**beat)
        if (problem := watch.tick(busy=False, interval_s=0.05)) is not None:
            return problem
    return None


@pytest.mark.usefixtures("hasty")
async def test_silence_counts_only_without_processor_time() -> None:
    with process("while True: pass") as pid:
        assert problem_within(Watch(pid, 60.0), 4) is None, "it works and has no time to beat"
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: stopped(pid), "it has stopped")
        assert "no sign of life" in str(problem_within(Watch(pid, 60.0), PATIENCE_S))
    with process("import time; time.sleep(3600)") as pid:
        watch = Watch(pid, 60.0)
        assert "no sign of life" in str(problem_within(watch, PATIENCE_S))
        watch.on_beat(resting=True)
        assert watch.tick(busy=False, interval_s=0.05) is None, "it is well again"


@pytest.mark.usefixtures("hasty")
async def test_beats_are_missed_before_an_engine_is_frozen() -> None:
    with process("import time; time.sleep(3600)") as pid:
        watch = Watch(pid, 60.0)
        wait_until(lambda: threads_of(pid)[0] == "S", "it sleeps")
        assert problem_within(watch, 0.5) is None and watch.missed
        watch.on_beat(resting=True)
        assert not watch.missed
        assert problem_within(watch, 0.5) is None and watch.missed
        watch.on_step()
        assert not watch.missed
    with process("while True: pass") as pid:
        watch = Watch(pid, 60.0)
        assert problem_within(watch, 0.5) is None and not watch.missed, "it works and has no time to beat"


@pytest.mark.usefixtures("hasty")
async def test_a_step_is_bounded_and_rest_is_not() -> None:
    with process("import time; time.sleep(3600)") as pid:
        assert problem_within(Watch(pid, 0.5), 2, resting=True) is None
        assert "in one step" in str(problem_within(Watch(pid, 0.5), PATIENCE_S, resting=False))


@pytest.mark.usefixtures("hasty")
async def test_a_pause_of_the_server_itself_is_no_silence() -> None:
    """Both processes of a container are paused together: the first tick may come before any beat."""
    with process("import time; time.sleep(3600)") as pid:
        watch = Watch(pid, 60.0)
        time.sleep(3)
        assert watch.tick(busy=True, interval_s=0.05) is None
