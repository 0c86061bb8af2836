"""What goes over the sockets: frames, sequence numbers, msgpack, replays; and addresses that are refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq
from mirror import Mirror
from process_tools import wait_until
from zmq.utils.monitor import recv_monitor_message

from microvllm.runtime.errors import ConfigError
from microvllm.runtime.kv_events.config import KVEventsConfig, read_kv_events
from microvllm.runtime.kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored
from microvllm.runtime.kv_events.publisher import END, MAX_RECEIVED_BYTES, EventPublisher

STORED = BlockStored(
    [1, (1 << 64) - 1], None, [5, 6, 7, 8], 2, None, "GPU", None, [("salt",), None], 0, "full"
)
LATER = BlockStored([3], 1, [9, 10], 2, None, "GPU", None, [None], 0, "full")
REMOVED = BlockRemoved([b"\x00" * 32, 7], "GPU", 0)
FREE = "tcp://127.0.0.1:*"

try:
    from vllm.distributed.kv_events import KVEventBatch
except ImportError:  # the same from vLLM 0.33's description: names, order, and what may be missing

    class BlockStoredOfVLLM(
        msgspec.Struct, omit_defaults=True, tag="BlockStored", forbid_unknown_fields=True
    ):
        block_hashes: list[bytes | int]
        parent_block_hash: bytes | int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None
        extra_keys: list[tuple[Any, ...] | None] | None = None
        group_idx: int | None = None
        kv_cache_spec_kind: str | None = None
        kv_cache_spec_sliding_window: int | None = None
        locality: str | None = None
        ownership: str | None = None
        session_id: str | None = None
        lookahead_token_ids: list[list[int]] | None = None

    class BlockRemovedOfVLLM(
        msgspec.Struct, omit_defaults=True, tag="BlockRemoved", forbid_unknown_fields=True
    ):
        block_hashes: list[bytes | int]
        medium: str | None
        group_idx: int | None = None
        locality: str | None = None
        ownership: str | None = None

    class ClearedOfVLLM(msgspec.Struct, tag="AllBlocksCleared", forbid_unknown_fields=True):
        pass

    class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True):  # type: ignore[no-redef]
        ts: float
        events: list[BlockStoredOfVLLM | BlockRemovedOfVLLM | ClearedOfVLLM]
        data_parallel_rank: int | None = None


@contextmanager
def publishing(rank: int = 0, **keys: Any) -> Iterator[EventPublisher]:
    config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", **{"endpoint": FREE, **keys})
    publisher = EventPublisher(config, rank)
    try:
        yield publisher
    finally:
        publisher.close()
        assert publisher._context.closed


@contextmanager
def subscribed(publisher: EventPublisher, topic: bytes = b"") -> Iterator[zmq.Socket[bytes]]:
    """A subscriber whose subscription has arrived: `socket_monitor` would say so of the connection alone."""
    with zmq.Context() as context, context.socket(zmq.SUB) as sock:
        sock.linger, sock.rcvtimeo = 0, 50
        sock.subscribe(topic)
        sock.connect(publisher.config.endpoint)

        def arrives() -> bool:
            publisher.publish([AllBlocksCleared()])
            try:
                return bool(sock.recv_multipart())
            except zmq.Again:
                return False

        wait_until(arrives, "the subscription is known")
        while True:  # what was sent until then
            try:
                sock.recv_multipart()
            except zmq.Again:
                break
        sock.rcvtimeo = 30_000
        yield sock


def replay(publisher: EventPublisher, *frames: bytes) -> list[list[bytes]]:
    """Ask for batches; all frames that come back, to the end marker."""
    assert publisher.config.replay_endpoint is not None
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger, sock.rcvtimeo = 0, 30_000
        sock.connect(publisher.config.replay_endpoint)
        sock.send_multipart(frames)
        answers = []
        while not answers or answers[-1][2] != END:
            answers.append(sock.recv_multipart())
        return answers


def test_a_batch_is_three_frames_that_vllm_decodes() -> None:
    with publishing(rank=3, topic="kv@pod@model") as publisher, subscribed(publisher, b"kv@pod") as sock:
        before = time.time()
        publisher.publish([STORED, LATER, REMOVED])
        publisher.publish([])
        publisher.publish([AllBlocksCleared()])
        topic, sequence, payload = sock.recv_multipart()
        _, following, cleared = sock.recv_multipart()
    assert topic == b"kv@pod@model" and len(sequence) == 8
    assert int.from_bytes(following, "big") == int.from_bytes(sequence, "big") + 1
    ts, events, rank = msgspec.msgpack.decode(payload)
    assert before <= ts <= time.time() and rank == 3
    assert [event["type"] for event in events] == ["BlockStored", "BlockStored", "BlockRemoved"]
    # Required fields are there although they are null; optional ones are not.
    assert events[1] == {
        **{"type": "BlockStored", "block_hashes": [3], "parent_block_hash": 1, "token_ids": [9, 10]},
        **{"block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": [None]},
        **{"group_idx": 0, "kv_cache_spec_kind": "full"},
    }
    decoded = msgspec.msgpack.decode(payload, type=KVEventBatch)
    assert [type(event).__name__.removesuffix("OfVLLM") for event in decoded.events] == [
        *("BlockStored", "BlockStored", "BlockRemoved"),
    ]
    assert (
        decoded.events[0].block_hashes == [1, (1 << 64) - 1] and decoded.events[0].parent_block_hash is None
    )
    assert decoded.events[0].extra_keys == [("salt",), None] and decoded.events[2].block_hashes[0] == bytes(
        32
    )
    assert decoded.data_parallel_rank == 3
    assert len(msgspec.msgpack.decode(cleared, type=KVEventBatch).events) == 1


def test_what_was_missed_is_repeated() -> None:
    with publishing(replay_endpoint=FREE, buffer_steps=3, topic="t") as publisher:
        for number in range(5):
            publisher.publish([BlockRemoved([number], "GPU", 0)])
        wait_until(lambda: len(publisher._kept) == 3 and publisher._queue.empty(), "all are sent")

        def numbers(first: int) -> list[int]:
            *batches, end = replay(publisher, b"", first.to_bytes(8, "big"))
            assert end == [b"", b"", END, b""] and all(batch[:2] == [b"", b"t"] for batch in batches)
            found = [msgspec.msgpack.decode(batch[3])[1][0]["block_hashes"] for batch in batches]
            assert found == [[int.from_bytes(batch[2], "big")] for batch in batches]
            return [number for (number,) in found]

        assert numbers(0) == [2, 3, 4] == numbers(2)
        assert numbers(4) == [4] and numbers(5) == []


def test_a_malformed_request_for_a_replay_gets_no_answer_and_harms_no_other() -> None:
    with publishing(replay_endpoint=FREE) as publisher, zmq.Context() as context:
        publisher.publish([STORED])
        for frames in ([b"\x00" * 8], [b"", b"\x00"], [b"", b"", b"", b""], [b"x"]):
            with context.socket(zmq.DEALER) as sock:
                sock.linger = 1000
                sock.connect(publisher.config.replay_endpoint)
                sock.send_multipart(frames)
        wait_until(lambda: len(publisher._kept) == 1, "it is sent")
        assert len(replay(publisher, b"", bytes(8))) == 2


def test_a_frame_that_would_fill_the_memory_ends_its_connection() -> None:
    with publishing(replay_endpoint=FREE) as publisher, zmq.Context() as context:
        for kind, endpoint in (
            (zmq.DEALER, publisher.config.replay_endpoint),
            (zmq.XSUB, publisher.config.endpoint),
        ):
            with context.socket(kind) as sock, sock.get_monitor_socket(zmq.Event.DISCONNECTED) as monitor:
                sock.linger, monitor.linger, monitor.rcvtimeo = 0, 0, 30_000
                sock.connect(endpoint)
                sock.send(b"\x01" + bytes(MAX_RECEIVED_BYTES))
                assert recv_monitor_message(monitor)["event"] == zmq.Event.DISCONNECTED
                sock.disable_monitor()
        assert replay(publisher, b"", bytes(8))[-1][2] == END


def test_a_subscriber_that_missed_a_batch_asks_for_it() -> None:
    mirror = Mirror()

    def chained(number: int) -> BlockStored:
        parent = number - 1 or None
        return BlockStored([number], parent, [number] * 2, 2, None, "GPU", None, [None], 0, "full_attention")

    with publishing(replay_endpoint=FREE) as publisher, subscribed(publisher) as sock:
        for number in (1, 2, 3):
            publisher.publish([chained(number)])
        first, _, third = (sock.recv_multipart() for _ in range(3))
        mirror.apply(msgspec.msgpack.decode(first[2])[1])
        wanted = int.from_bytes(first[1], "big") + 1
        assert int.from_bytes(third[1], "big") == wanted + 1
        *missed, _ = replay(publisher, b"", wanted.to_bytes(8, "big"))
        for _, _, _, payload in missed:
            mirror.apply(msgspec.msgpack.decode(payload)[1])
    assert {number: block.parent for number, block in mirror.blocks.items()} == {1: None, 2: 1, 3: 2}


def test_a_publisher_may_connect() -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as sock:
        sock.linger, sock.rcvtimeo = 0, 100
        sock.subscribe(b"")
        port = sock.bind_to_random_port("tcp://127.0.0.1")
        with publishing(endpoint=f"tcp://127.0.0.1:{port}") as publisher:
            assert publisher.config.endpoint == f"tcp://127.0.0.1:{port}"

            def arrives() -> bool:
                publisher.publish([AllBlocksCleared()])
                try:
                    return len(sock.recv_multipart()) == 3
                except zmq.Again:
                    return False

            wait_until(arrives, "the publisher has connected")


def test_the_address_that_the_system_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    for endpoint in (FREE, "tcp://*:0"):
        with publishing(endpoint=endpoint) as publisher:
            host, _, port = publisher.config.endpoint.rpartition(":")
            assert host == "tcp://127.0.0.1" and int(port) > 0
    monkeypatch.delenv("VLLM_HOST_IP")
    with publishing(endpoint="tcp://*:0") as publisher:
        assert "*" not in publisher.config.endpoint


def test_an_address_in_use_is_one_line() -> None:
    with publishing() as publisher:
        taken = publisher.config.endpoint.replace("127.0.0.1", "*")
        with pytest.raises(
            ConfigError, match=r"--kv-events-config: endpoint tcp://\*:\d+: Address already in use"
        ):
            EventPublisher(KVEventsConfig(enable_kv_cache_events=True, endpoint=taken), 0)
        with pytest.raises(ConfigError, match=r"replay_endpoint tcp://192\.0\.2\.1:5: "):
            EventPublisher(KVEventsConfig(endpoint=FREE, replay_endpoint="tcp://192.0.2.1:5"), 0)


def test_each_rank_has_its_own_addresses() -> None:
    config = KVEventsConfig(endpoint="tcp://*:5557", replay_endpoint="tcp://127.0.0.1:6000")
    assert config.at_rank(0) == config
    assert (config.at_rank(2).endpoint, config.at_rank(2).replay_endpoint) == (
        "tcp://*:5559",
        "tcp://127.0.0.1:6002",
    )
    free = KVEventsConfig(endpoint="tcp://*:0", replay_endpoint="ipc:///tmp/replay")
    assert (free.at_rank(1).endpoint, free.at_rank(1).replay_endpoint) == (
        "tcp://*:0",
        "ipc:///tmp/replay_dp1",
    )


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"endpoint": "inproc://events"},
            "endpoint must be tcp://HOST:PORT or ipc://PATH, got 'inproc://events'",
        ),
        ({"endpoint": "tcp://*"}, "endpoint must be"),
        ({"endpoint": "tcp://*:99999"}, "endpoint tcp://*:99999: a port"),
        ({"endpoint": "tcp://*:65535"}, "endpoint tcp://*:65535: a port, also a rank's, is at most 65535"),
        ({"replay_endpoint": "5558"}, "replay_endpoint must be"),
        ({"replay_endpoint": "tcp://*:5557"}, "endpoint and replay_endpoint are both tcp://*:5557"),
        ({"replay_endpoint": "tcp://*:5558"}, "replay_endpoint, 5557 and 5558, must be 2 apart or more"),
        ({"publisher": "kafka"}, "Invalid enum value 'kafka' - at `$.publisher`"),
        ({"buffer_steps": 0}, "`$.buffer_steps`"),
        ({"hwm": "many"}, "`$.hwm`"),
        ({"topics": "t"}, "unknown field `topics`"),
    ],
)
def test_a_wrong_key_is_named(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_kv_events({"enable_kv_cache_events": True, **keys}, True, ranks=2)
    assert str(error.value).startswith("--kv-events-config: ") and problem in str(error.value)


def test_what_publishes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for keys in (
        None,
        {},
        {"enable_kv_cache_events": False},
        {"enable_kv_cache_events": True, "publisher": "null"},
    ):
        assert read_kv_events(keys, False) is None
    assert not caplog.text
    for keys in (
        {"publisher": "zmq"},
        {"endpoint": "tcp://*:9"},
        {"enable_kv_cache_events": False, "hwm": 1},
    ):
        caplog.clear()
        assert read_kv_events(keys, True) is None
        assert "nothing is published without enable_kv_cache_events" in caplog.text


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="without prefix caching"):
        read_kv_events({"enable_kv_cache_events": True}, False)
    config = read_kv_events({"enable_kv_cache_events": True}, True)
    assert config == KVEventsConfig(enable_kv_cache_events=True, publisher="zmq")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package pyzmq") as error:
        read_kv_events({"enable_kv_cache_events": True}, True)
    assert error.value.remedy == "pip install 'microvllm[kv-events]'"
