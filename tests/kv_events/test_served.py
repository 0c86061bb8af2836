"""Events of a real engine: in its own process, after it has died, and in the caller's process."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import closing
from typing import Any

import msgspec
import pytest
import zmq
from http_tools import in_process
from mirror import Mirror
from model_tools import variant_folder
from process_tools import PATIENCE_S, wait_until, wait_until_async

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.request import SamplingParams

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "cpu_threads": 1,
    "num_gpu_blocks_override": 16,
    "block_size": 16,
}


def events_config(endpoint: str = "tcp://127.0.0.1:*") -> dict[str, Any]:
    return {"enable_kv_cache_events": True, "endpoint": endpoint, "replay_endpoint": "tcp://127.0.0.1:*"}


class Subscriber:
    """Follows an engine by the replay alone, which misses nothing: asks for what it does not have yet."""

    def __init__(self, endpoint: str) -> None:
        self.mirror, self._next = Mirror(), 0
        self._context = zmq.Context()
        self._sock = self._context.socket(zmq.DEALER)
        self._sock.linger, self._sock.rcvtimeo = 0, int(PATIENCE_S * 1000)
        self._sock.connect(endpoint)
        self.kinds: list[str] = []

    def close(self) -> None:
        self._context.destroy(linger=0)

    def follow(self) -> set[int]:
        """The hashes that the cache holds now."""
        self._sock.send_multipart((b"", self._next.to_bytes(8, "big")))
        while True:
            _, _, sequence, payload = self._sock.recv_multipart()
            if not payload:
                return set(self.mirror.blocks)
            assert int.from_bytes(sequence, "big") == self._next
            self._next += 1
            _, events, rank = msgspec.msgpack.decode(payload)
            assert rank == 0
            self.mirror.apply(events)
            self.kinds += [event["type"] for event in events]


def prompt(number: int) -> list[int]:
    return [number + 10] * 40


async def generate(client: EngineClient, number: int) -> None:
    (stream,) = client.submit(prompt(number), SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    async for _ in stream:
        pass


async def test_a_server_says_where_it_publishes_and_a_mirror_follows() -> None:
    args = EngineArgs(model=str(variant_folder("llama-tied")), kv_events_config=events_config(), **OPTIONS)
    client = await EngineClient.start(args.resolve())
    try:
        async with in_process(client) as http:
            sources = (await http.get("/kv_event_sources")).json()
        assert sources.keys() == {"0"} and sources["0"].keys() == {
            *("enable_kv_cache_events", "publisher", "endpoint", "replay_endpoint", "buffer_steps", "hwm"),
            *("max_queue_size", "topic"),
        }
        endpoint, replay = sources["0"]["endpoint"], sources["0"]["replay_endpoint"]
        assert sources["0"]["publisher"] == "zmq" and "*" not in endpoint + replay and endpoint != replay
        subscriber = Subscriber(replay)  # what a thread of the engine publishes comes a moment later

        def tokens() -> set[tuple[int, ...]]:
            subscriber.follow()
            return {block.tokens for block in subscriber.mirror.blocks.values()}

        with closing(subscriber):
            await wait_until_async(lambda: bool(tokens() or subscriber.kinds), "events are published")
            assert not subscriber.mirror.blocks and subscriber.kinds == ["AllBlocksCleared"]
            for number in range(12):  # 2 full blocks each, of which 16 are held: the last evict the first
                await generate(client, number)
            await wait_until_async(lambda: (21,) * 16 in tokens(), "the last blocks are published")
            assert 8 <= len(subscriber.follow()) <= 16 and "BlockRemoved" in subscriber.kinds
            assert (10,) * 16 not in tokens()
            client.reset_prefix_cache()
            await wait_until_async(lambda: not subscriber.follow(), "the reset is published")
        os.kill(client.replicas[0].process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        await wait_until_async(lambda: not client.healthy(), "the engine is gone")
        await wait_until_async(client.healthy, "the engine is back")
        await generate(client, 0)
        with closing(Subscriber(client.kv_event_sources()[0].replay_endpoint or "")) as again:
            await wait_until_async(lambda: len(again.follow()) == 2, "the new engine's events are there")
            assert again.kinds[0] == "AllBlocksCleared"
    finally:
        await client.close()


async def test_a_server_without_events_has_no_sources() -> None:
    config = EngineArgs(model=str(variant_folder("llama-tied")), **OPTIONS).resolve()
    assert config.kv_events is None


def test_an_engine_in_this_process() -> None:
    folder, address = str(variant_folder("llama-tied")), "tcp://127.0.0.1:*"
    engine = InferenceEngine(folder, kv_events_config=events_config(address), **OPTIONS)
    source = engine.core.publisher.config  # type: ignore[attr-defined]
    subscriber = Subscriber(source.replay_endpoint)
    engine.generate("a text of some length, of which two blocks are full, " * 4, 4)
    wait_until(lambda: bool(subscriber.follow()), "events are published")
    with pytest.raises(
        ConfigError, match=r"--kv-events-config: endpoint tcp://\*:\d+: Address already in use"
    ):
        taken = source.endpoint.replace("127.0.0.1", "*")
        InferenceEngine(folder, kv_events_config=events_config(taken), **OPTIONS)
    subscriber.close()
    del engine
    port = int(source.endpoint.rpartition(":")[2])
    with socket.socket() as sock:
        wait_until(lambda: sock.connect_ex(("127.0.0.1", port)) != 0, "the sockets are closed")
