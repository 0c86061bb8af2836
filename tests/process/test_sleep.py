"""A server's engines asleep: their memory, the requests meanwhile, and one that dies in its sleep."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from model_tools import long_folder
from process_tools import PATIENCE_S, alive, own_engines, wait_until_async

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import EngineAsleepError, InvalidRequestError
from microvllm.runtime.metrics.engine_metrics import EngineMetrics
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.channel import Sleep, SleepChanged, WakeUp
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.request import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [5, 70, 200, 31, 8] * 20
LEVELS = [1, 2]


def params(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


async def tokens_of(stream: TokenStream) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineClient]:
    args = EngineArgs(model=str(long_folder()), dtype="float32", cpu_threads=1, max_model_len=30_000)
    client = await EngineClient.start(args.resolve())
    yield client
    await client.close()
    assert own_engines() == []


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def awake(client: EngineClient) -> AsyncIterator[None]:
    yield
    await client.wake_up()
    await wait_until_async(client.healthy, "the engine serves")
    assert not client.sleep_level and not client.replicas[0].streams
    assert client.admission._num_tokens == 0


def engine_pid(client: EngineClient) -> int:
    (replica,) = client.replicas
    assert replica.process is not None
    return replica.process.pid


def resident(pid: int) -> int:
    """Bytes in memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("level", LEVELS)
async def test_the_cache_is_given_back_and_the_answers_stay(client: EngineClient, level: int) -> None:
    expected = await tokens_of(client.submit(PROMPT, params())[0])
    filling = await client.submit_all([[7 + i] * 3000 for i in range(2)], params(1))
    for stream in filling:
        await tokens_of(stream)
    held = 6000 * client.config.spec.cache_plan.page_size * 4
    before = resident(engine_pid(client))
    assert held > 8 << 20
    await client.sleep(level)
    assert before - resident(engine_pid(client)) > 0.8 * held
    await client.sleep(level)
    with pytest.raises(InvalidRequestError, match=f"asleep at level {level}"):
        await client.sleep(3 - level)
    for tags in (["weights"], ["kv_cache"]):
        with pytest.raises(EngineAsleepError):
            client.submit(PROMPT, params())
        await client.wake_up(tags)
    (stream,) = client.submit(PROMPT, params())
    assert await tokens_of(stream) == expected and stream.num_cached_tokens == 0


async def test_running_requests_are_ended(client: EngineClient) -> None:
    streams = [client.submit(PROMPT, params(20_000))[0] for _ in range(3)]
    await anext(streams[0])
    await client.sleep(1)
    for stream in streams:
        with pytest.raises(EngineAsleepError):
            await tokens_of(stream)
    assert client.healthy()


async def test_running_requests_may_be_waited_for(client: EngineClient) -> None:
    (stream,) = client.submit(PROMPT, params(100))
    sleeping = asyncio.ensure_future(client.sleep(2, wait=True))
    await asyncio.sleep(0)
    with pytest.raises(EngineAsleepError):
        client.submit(PROMPT, params())
    assert len(await tokens_of(stream)) == 100
    await sleeping


async def test_a_wait_is_cut_short_by_a_sleep_that_does_not_wait(client: EngineClient) -> None:
    (stream,) = client.submit(PROMPT, params(20_000))
    waiting = asyncio.ensure_future(client.sleep(1, wait=True))
    await anext(stream)
    await client.sleep(1)
    await waiting
    with pytest.raises(EngineAsleepError):
        await tokens_of(stream)


async def test_a_wait_that_is_given_up_leaves_the_engine_awake(client: EngineClient) -> None:
    (stream,) = client.submit(PROMPT, params(20_000))
    sleeping = asyncio.ensure_future(client.sleep(1, wait=True))
    await anext(stream)
    sleeping.cancel()
    await asyncio.gather(sleeping, return_exceptions=True)
    assert not client.sleep_level
    await anext(stream)
    stream.abort()


async def test_an_engine_that_dies_asleep_is_started_when_it_is_woken(client: EngineClient) -> None:
    metrics = client.replicas[0].observer = EngineMetrics(100, client.stats)
    expected = await tokens_of(client.submit(PROMPT, params())[0])
    await client.sleep(1)
    pid = engine_pid(client)
    os.kill(pid, signal.SIGKILL)
    await wait_until_async(lambda: metrics.engine_deaths == 1, "its death is known")
    await asyncio.sleep(0.2)
    assert own_engines() == [] and not alive(pid)
    with pytest.raises(EngineAsleepError):
        client.submit(PROMPT, params())
    await client.wake_up(["kv_cache"])
    assert own_engines() == []
    await client.wake_up()
    assert await tokens_of(client.submit(PROMPT, params())[0]) == expected


async def test_an_engine_that_is_starting_is_put_to_sleep(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (replica,) = client.replicas
    sent: list[object] = []
    pid, send = engine_pid(client), replica.send
    monkeypatch.setattr(replica, "send", lambda command: (sent.append(command), send(command)))
    os.kill(pid, signal.SIGKILL)
    await wait_until_async(lambda: own_engines() not in ([], [pid]), "another one is starting")
    await client.sleep(2)
    await wait_until_async(lambda: engine_pid(client) != pid, "it has started")
    await wait_until_async(lambda: Sleep(2) in sent and not replica._changing, "it is asleep")
    with pytest.raises(EngineAsleepError):
        client.submit(PROMPT, params())
    await client.wake_up()
    assert len(await tokens_of(client.submit(PROMPT, params())[0])) == 12


async def test_an_engine_that_is_awake_answers_a_wake_up(client: EngineClient) -> None:
    """As one of several does whose server tries again, because another could not wake up."""
    (replica,) = client.replicas
    await tokens_of(client.submit(PROMPT, params())[0])
    await asyncio.wait_for(replica.wake_up(["kv_cache", "weights"], last=True), PATIENCE_S)
    assert replica.in_flight == 0


async def test_a_wake_up_behind_a_sleep_that_has_not_begun_is_answered(client: EngineClient) -> None:
    (replica,) = client.replicas
    (stream,) = client.submit(PROMPT, params(20_000))
    await anext(stream)
    answers = [replica._send_change(command) for command in (Sleep(1), WakeUp(["kv_cache", "weights"]))]
    stream.abort()
    asleep, awake = await asyncio.wait_for(asyncio.gather(*answers), PATIENCE_S)
    assert asleep == SleepChanged() and awake.stats is not None
    (stream,) = client.submit(PROMPT, params())
    assert len(await tokens_of(stream)) == 12 and stream.num_cached_tokens == 0


async def test_counters_go_on_and_the_state_is_reported(client: EngineClient) -> None:
    metrics = client.replicas[0].observer = EngineMetrics(100, EngineStats())
    await tokens_of(client.submit(PROMPT, params())[0])
    await wait_until_async(lambda: metrics.totals.generation_tokens > 0, "the step has arrived")
    steps, states = metrics.totals.steps, []
    for level in LEVELS:
        states.append(metrics.sleep_states)
        await client.sleep(level)
        states.append(metrics.sleep_states)
        assert metrics.totals.kv_usage == 0
        await client.wake_up()
        assert metrics.totals.kv_blocks_total > 0
    names = [name for state in states for name, on in state.items() if on]
    assert names == ["awake", "weights_offloaded", "awake", "discard_all"]
    await tokens_of(client.submit(PROMPT, params())[0])
    assert metrics.totals.steps > steps
