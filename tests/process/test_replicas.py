"""Several engines behind one client: shared work, a prompt's place, and one that dies or freezes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq
from model_tools import LONG, long_folder
from process_tools import PATIENCE_S, own_engines, stopped, wait_until_async

from microvllm import LLM
from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.errors import (
    ConfigError,
    EngineAsleepError,
    EngineBusyError,
    EngineDeadError,
    EngineError,
)
from microvllm.runtime.machine import device_environment, usable_cores
from microvllm.runtime.metrics.engine_metrics import EngineMetrics
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.options import rank_checks
from microvllm.runtime.process import heartbeat
from microvllm.runtime.process.channel import Sleep, SleepChanged, WakeUp
from microvllm.runtime.process.client import EngineClient, _configs, total_stats
from microvllm.runtime.process.engine_process import EngineProcess
from microvllm.runtime.process.replica import Replica
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.request import SamplingParams

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(usable_cores() < 2, reason="two engines want two cores"),
]
SHARED = list(range(3, 99)) * 2  # 192 tokens


def make_config(**options: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "model": str(long_folder()),
        "dtype": "float32",
        "cpu_threads": 1,
        "num_gpu_blocks_override": LONG // 16,
        "max_num_seqs": 2,
        "max_num_queued_reqs": 20,
        "data_parallel_size": 2,
    }
    return EngineArgs(**{**defaults, **options}).resolve()


def params(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True, **options})


async def tokens_of(stream: TokenStream) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineClient]:
    address = "tcp://127.0.0.1:*"
    events = {"enable_kv_cache_events": True, "endpoint": address, "replay_endpoint": address}
    client = await EngineClient.start(make_config(kv_events_config=events))
    yield client
    await client.close()
    assert own_engines() == []


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def at_rest(client: EngineClient) -> AsyncIterator[None]:
    """Before and after each test both engines serve, and nothing is open or counted."""
    await wait_until_async(lambda: all(each.healthy() for each in client.replicas), "both serve")
    client.reset_prefix_cache()
    yield
    await wait_until_async(lambda: all(each.healthy() for each in client.replicas), "both serve again")
    assert not any(each.streams or each.waiting_tokens for each in client.replicas)
    assert client.admission._num_tokens == 0
    await wait_until_async(lambda: client.stats.kv_blocks_used == 0, "all blocks are free")


def pid_of(replica: Replica) -> int:
    assert replica.process is not None
    return replica.process.pid


def owner(stream: TokenStream) -> int:
    assert isinstance(stream.owner, Replica)
    return stream.owner.index


async def test_both_engines_give_the_same_tokens_and_share_the_work(client: EngineClient) -> None:
    (first,), (second,) = (client.submit(SHARED, params(), rank=rank) for rank in (0, 1))
    assert (owner(first), owner(second)) == (0, 1)
    assert await tokens_of(first) == await tokens_of(second)
    streams = await client.submit_all([[5 + i] * 8 for i in range(4)], params())
    assert sorted(map(owner, streams)) == [0, 0, 1, 1]
    assert [len(await tokens_of(stream)) for stream in streams] == [12] * 4
    await wait_until_async(lambda: client.stats.generation_tokens == 72, "all steps have arrived")
    assert client.stats.kv_blocks_total == 2 * LONG // 16


async def test_a_wake_up_that_fails_on_one_engine_may_be_tried_again(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, problems = client.replicas[1], ["no memory"]
    change = replica._change

    async def failing(command: Sleep | WakeUp) -> SleepChanged:
        answer = await change(command)
        failed = isinstance(command, WakeUp) and problems
        return SleepChanged(problems.pop()) if failed else answer

    monkeypatch.setattr(replica, "_change", failing)
    await client.sleep(1)
    with pytest.raises(EngineError, match="cannot wake up: no memory"):
        await client.wake_up()
    with pytest.raises(EngineAsleepError):
        client.submit(SHARED, params())
    await client.sleep(1)  # the one that has woken, too
    assert [await replica._change(WakeUp([])) for replica in client.replicas] == [SleepChanged()] * 2
    await asyncio.wait_for(client.wake_up(), PATIENCE_S)
    for rank in (0, 1):
        assert len(await tokens_of(client.submit(SHARED, params(), rank=rank)[0])) == 12
    assert [replica.in_flight for replica in client.replicas] == [0, 0]


async def test_a_wake_up_does_not_wait_for_an_engine_that_cannot_start(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, begin = asyncio.Event(), client.replicas[1].restart
    await client.sleep(1)

    async def restart() -> EngineProcess:
        await started.wait()
        return await begin()

    monkeypatch.setattr(client.replicas[1], "restart", restart)
    os.kill(pid_of(client.replicas[1]), signal.SIGKILL)
    await wait_until_async(lambda: not client.replicas[1].ready, "its death is known")
    await asyncio.wait_for(client.wake_up(), PATIENCE_S)
    assert len(await tokens_of(client.submit(SHARED, params())[0])) == 12
    started.set()


async def test_a_conversation_stays_where_its_beginning_is(client: EngineClient) -> None:
    owners = []
    for beginning in (0, 1):  # two conversations, in turns
        await tokens_of(client.submit([beginning + 5, *SHARED], params())[0])
    for turn in range(1, 4):
        for beginning in (0, 1):
            (stream,) = client.submit([beginning + 5, *SHARED, *[9] * 20 * turn], params())
            await tokens_of(stream)
            assert stream.num_cached_tokens >= 192
            owners.append(owner(stream))
    assert owners in ([0, 1] * 3, [1, 0] * 3)


async def test_each_engine_publishes_the_events_of_its_own_cache(client: EngineClient) -> None:
    for rank in (0, 1):
        await tokens_of(client.submit(SHARED, params(), rank=rank)[0])
    sources = client.kv_event_sources()
    assert list(sources) == [0, 1] and sources[0].endpoint != sources[1].endpoint
    with zmq.Context() as context:
        for rank, source in sources.items():
            sock = context.socket(zmq.DEALER)
            sock.linger, sock.rcvtimeo = 0, 30_000
            sock.connect(source.replay_endpoint or "")
            sock.send_multipart((b"", (0).to_bytes(8, "big")))
            _, events, found = msgspec.msgpack.decode(sock.recv_multipart()[-1])
            sock.close()
            assert (events[0]["type"], found) == ("AllBlocksCleared", rank)


async def test_the_samples_of_a_prompt_stay_together(client: EngineClient) -> None:
    streams = client.submit(SHARED, params(n=2, temperature=1.0))
    assert owner(streams[0]) == owner(streams[1])
    for stream in streams:
        await tokens_of(stream)


async def test_the_queue_is_that_of_all_engines(client: EngineClient) -> None:
    streams = [client.submit([7, 8], params(LONG - 8))[0] for _ in range(4 + 20)]
    with pytest.raises(EngineBusyError):
        client.submit([7, 8], params())
    assert abs(client.replicas[0].num_open - client.replicas[1].num_open) <= 2
    for stream in streams:
        stream.abort()


async def killed_under_load(client: EngineClient, how: signal.Signals) -> None:
    expected = [
        await tokens_of(client.submit([5 + i] * 8, params(seed=3, temperature=1.0))[0]) for i in range(8)
    ]
    first_tokens = [[token] for token in await tokens_of(client.submit([6], params(3))[0])]
    victim, other = client.replicas
    begun = [client.submit([6], params(LONG - 8), rank=None)[0] for _ in range(4)]
    for stream in begun:
        await anext(stream)
    queued = [client.submit([5 + i] * 8, params(seed=3, temperature=1.0))[0] for i in range(8)]
    samples = client.submit([4] * 8, params(n=2, temperature=1.0, seed=1))
    bound = client.submit([9, 9], params(), rank=0)
    assert {owner(stream) for stream in queued} == {0, 1}
    pid = pid_of(victim)
    if how is signal.SIGSTOP:
        os.kill(pid, how)
        await wait_until_async(lambda: stopped(pid), "the engine has stopped")
    else:
        os.kill(pid, how)
    lost = [stream for stream in begun if owner(stream) == 0]
    assert len(lost) == 2
    for stream in [*lost, *bound]:
        with pytest.raises(EngineDeadError):
            await tokens_of(stream)
    (again,) = filter(None, [client.start_again(each) for each in [lost[0], bound[0]]])
    assert owner(again) == 1 and client.start_again(again) is None, "once only"
    assert client.healthy() and not victim.healthy()
    assert {owner(stream) for stream in queued} == {1}
    for stream in begun:
        stream.abort()
    assert [(await anext(again)).token_ids for _ in range(3)] == first_tokens
    again.abort()
    assert [await tokens_of(stream) for stream in queued] == expected
    again = client.submit([4] * 8, params(n=2, temperature=1.0, seed=1))
    assert [await tokens_of(stream) for stream in samples] == [await tokens_of(stream) for stream in again]
    await wait_until_async(victim.healthy, "another engine serves")
    assert pid_of(victim) != pid and other.healthy()


async def test_what_had_not_begun_on_an_engine_that_dies_goes_to_another(client: EngineClient) -> None:
    counted = [EngineMetrics(LONG, each.stats) for each in client.replicas]
    for replica, metrics in zip(client.replicas, counted, strict=True):
        replica.observer = metrics
    await killed_under_load(client, signal.SIGKILL)
    assert [metrics.engine_deaths for metrics in counted] == [1, 0]


async def test_an_engine_that_is_stopped_is_replaced_and_loses_nothing(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeat, "FROZEN_S", 2.0)
    await killed_under_load(client, signal.SIGSTOP)
    assert "Engine 0 gave no sign of life" in caplog.text and "Engine 0 died" in caplog.text


async def test_an_engine_that_misses_beats_gets_no_prompt_while_another_beats(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.replicas[0].watch, "missed", True)  # until the next beat
    streams = [client.submit([5 + i] * 8, params())[0] for i in range(4)]
    assert {owner(stream) for stream in streams} == {1}
    streams += client.submit([5] * 8, params(), rank=0)
    assert owner(streams[-1]) == 0, "chosen by number"
    monkeypatch.setattr(client.replicas[1].watch, "missed", True)
    streams += [client.submit([9 + i] * 8, params())[0] for i in range(4)]
    assert {owner(stream) for stream in streams[5:]} == {0, 1}, "neither is passed over then"
    assert [len(await tokens_of(stream)) for stream in streams] == [12] * 9


async def test_a_request_that_ends_engines_ends_two_at_most(client: EngineClient) -> None:
    begun = [client.submit([6], params(LONG - 8))[0] for _ in range(4)]
    for stream in begun:
        await anext(stream)
    (stream,) = client.submit([7], params())
    first = owner(stream)
    os.kill(pid_of(client.replicas[first]), signal.SIGKILL)
    await wait_until_async(lambda: owner(stream) != first, "it has moved")
    os.kill(pid_of(client.replicas[1 - first]), signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await tokens_of(stream)
    with pytest.raises(EngineDeadError):
        client.submit([7], params())
    assert not client.healthy() and client.start_again(begun[0]) is None
    for each in begun:
        each.abort()


async def test_what_an_engine_that_died_had_begun_goes_to_none_that_sleeps(client: EngineClient) -> None:
    (stream,) = client.submit([6], params(LONG - 8))
    await anext(stream)
    os.kill(pid_of(client.replicas[owner(stream)]), signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await tokens_of(stream)
    await client.sleep(1)
    assert client.start_again(stream) is None
    await client.wake_up()
    (again,) = filter(None, [client.start_again(stream)])
    again.abort()


# ---- without an engine ------------------------------------------------------------------------------


async def test_the_numbers_of_engines_add_up() -> None:
    one = EngineStats(*range(1, 16), step_seconds=[1.0, 2.0])
    total = total_stats([one, one])
    assert total_stats([one]) is one and total.step_seconds == [2.0, 4.0]
    for name in EngineStats.__struct_fields__[:15]:
        assert getattr(total, name) == 2 * getattr(one, name), name


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"data_parallel_size": 1 << 20}, "--data-parallel-size 1048576: there are"),
        (
            {"data_parallel_size_local": 1},
            "--data-parallel-size-local 1: all engines of --data-parallel-size 2",
        ),
        ({"data_parallel_size": 0}, "--data-parallel-size must be at least 1"),
    ],
)
async def test_a_wrong_number_of_engines_is_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_config(**options)


async def test_the_processor_and_the_cache_are_divided() -> None:
    def resolved(engines: int) -> EngineConfig:
        options = {"cpu_threads": 2, "num_gpu_blocks_override": None, "data_parallel_size": engines}
        return make_config(**options, max_model_len=4096, kv_cache_memory_bytes=1 << 26)

    one, two = resolved(1), resolved(2)
    assert (one.cpu_threads, two.cpu_threads) == (2, 1)
    assert one.num_blocks == 2 * two.num_blocks
    assert make_config(data_parallel_size_local=2) == make_config()


async def test_each_engine_has_a_seed_of_its_own() -> None:
    """Else the first of two equal requests without a seed would get the same answer from both engines."""
    engines = _configs(make_config(seed=5))
    assert [(each.data_parallel_rank, each.seed) for each in engines] == [(0, 5), (1, 6)]


@pytest.mark.parametrize(
    ("names", "ranks", "problem"),
    [
        (["H200"] * 2, 1, None),
        (["H200"] * 4, 2, None),
        (["H200"], 1, "--data-parallel-size 2: there is one GPU"),
        (["H200"] * 3, 2, "--data-parallel-size 2 of --tensor-parallel-size 2 each: there are 3 GPUs"),
        (["H200", "L4"], 1, "--data-parallel-size 2: the GPUs are of different kinds: H200, L4"),
    ],
)
async def test_each_engine_needs_its_own_gpus(
    names: list[str], ranks: int, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_checks, "gpu_names", lambda: names)
    if problem is None:
        rank_checks.check_engines(2, 2, ranks, "cuda")
        return
    with pytest.raises(ConfigError, match=problem):
        rank_checks.check_engines(2, None, ranks, "cuda")


async def test_one_process_runs_one_engine() -> None:
    with pytest.raises(ConfigError, match="data_parallel_size 2"):
        LLM(str(long_folder()), data_parallel_size=2)


@pytest.mark.parametrize(
    ("listed", "seen"),
    [(None, "2,3"), ("", "2,3"), ("4,5,6,7", "6,7"), ("GPU-a, GPU-b,GPU-c,GPU-d", "GPU-c,GPU-d")],
)
async def test_each_engine_sees_its_own_gpus(
    listed: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert device_environment(2, 2) == {"CUDA_VISIBLE_DEVICES": seen}
