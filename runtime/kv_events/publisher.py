"""Publishes batches of events over ZeroMQ, and repeats those that a subscriber has missed.

The sockets speak vLLM 0.33's protocol. A PUB socket sends [topic, sequence, batch]; the sequence counts
batches from 0 in 8 bytes, most significant first. A ROUTER socket takes [empty, first sequence], and answers
each batch from there on that is kept as [empty, topic, sequence, batch], then [empty, empty, -1, empty].
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
from collections import deque
from contextlib import closing
from queue import Queue

import msgspec
import zmq

from microvllm.runtime.errors import ConfigError, reason_of
from microvllm.runtime.kv_events.config import OPTION, KVEventsConfig
from microvllm.runtime.kv_events.events import EventBatch, KVEvent

logger = logging.getLogger("microvllm.engine")

SEQUENCE_BYTES = 8
MAX_RECEIVED_BYTES = 1 << 16  # of a frame: a topic, or the number of a batch
END = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
LINGER_MS = 500  # at the end, for what was sent and not yet written
CLOSE_S = 2.0
ANY_PORT = "tcp://*:0"
ANYWHERE = ("192.0.2.1", 9)  # of a net for documentation: nothing is sent there


class EventPublisher:
    """Owns the sockets and a thread for each. `config` has the addresses in use.

    rank: data-parallel, in every batch. Raises `ConfigError` with one line if an address cannot be used.
    """

    def __init__(self, config: KVEventsConfig, rank: int) -> None:
        self._rank = rank
        self._topic = config.topic.encode()
        self._queue: Queue[EventBatch | None] = Queue(config.max_queue_size)
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._lock = threading.Lock()  # of `_kept`
        self._context = zmq.Context()
        config = config.at_rank(rank)
        try:
            self._pub = self._context.socket(zmq.PUB)
            self._pub.set_hwm(config.hwm)
            self._pub.linger = LINGER_MS
            endpoint = _open(self._pub, "endpoint", config.endpoint)
            replay_endpoint = config.replay_endpoint
            threads = [threading.Thread(target=self._send, name="kv-events", daemon=True)]
            if replay_endpoint is not None:
                replay = self._context.socket(zmq.ROUTER)
                replay.linger = 0
                # A whole replay and its end, twice: ZeroMQ may know of half the reads only.
                replay.sndhwm = 2 * (config.buffer_steps + 1)
                replay_endpoint = _open(replay, "replay_endpoint", replay_endpoint, bind=True)
                threads.append(threading.Thread(target=self._replay, args=(replay,), daemon=True))
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.config = msgspec.structs.replace(config, endpoint=endpoint, replay_endpoint=replay_endpoint)
        for thread in threads:
            thread.start()
        self._sender = threads[0]

    def publish(self, events: list[KVEvent]) -> None:
        """Send the events of one step, if there are any; the engine waits only while the queue is full."""
        if events:
            self._queue.put(EventBatch(time.time(), events, self._rank))

    def close(self) -> None:
        """Send what is queued and close the sockets."""
        self._queue.put(None)
        if threading.current_thread() is not self._sender:  # the garbage collector may run in any thread
            self._sender.join(CLOSE_S)

    def _send(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        for number in itertools.count():
            batch = self._queue.get()
            if batch is None:
                break
            sequence, payload = number.to_bytes(SEQUENCE_BYTES, "big"), encoder.encode(batch)
            with self._lock:
                self._kept.append((sequence, payload))
            try:
                self._pub.send_multipart((self._topic, sequence, payload))
            except zmq.ZMQError:  # a subscriber sees the gap, and asks for it
                logger.exception("KV events could not be sent.")
        self._pub.close()
        self._context.term()  # ends the replay

    def _replay(self, replay: zmq.Socket[bytes]) -> None:
        with closing(replay):
            while True:
                try:
                    frames = replay.recv_multipart()
                    self._answer(replay, frames)
                except zmq.ContextTerminated:
                    return
                except zmq.ZMQError:
                    logger.exception("KV events could not be repeated.")

    def _answer(self, replay: zmq.Socket[bytes], frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[2]) != SEQUENCE_BYTES:
            logger.warning("A request for KV events is not [empty, 8 bytes]; it gets no answer.")
            return
        client, first = frames[0], frames[2]
        with self._lock:
            kept = [(sequence, payload) for sequence, payload in self._kept if sequence >= first]
        for sequence, payload in kept:
            replay.send_multipart((client, b"", self._topic, sequence, payload))
        replay.send_multipart((client, b"", b"", END, b""))


def _open(sock: zmq.Socket[bytes], name: str, endpoint: str, *, bind: bool = False) -> str:
    """Bind or connect a socket -> its address, with the port that the system chose if it was left open."""
    bind = bind or "*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://")
    sock.maxmsgsize = MAX_RECEIVED_BYTES  # else whoever connects fills the memory with one
    try:
        if not bind:
            sock.connect(endpoint)
            return endpoint
        given = f"tcp://{_own_host()}:*" if endpoint == ANY_PORT else endpoint
        sock.ipv6 = "[" in given
        sock.bind(given)
    except zmq.ZMQError as error:
        raise ConfigError(f"{OPTION}: {name} {endpoint}: {reason_of(error)}") from None
    if not given.endswith((":*", ":0")):
        return endpoint
    bound = sock.getsockopt_string(zmq.LAST_ENDPOINT)
    return f"{given.rpartition(':')[0]}:{bound.rpartition(':')[2]}"


def _own_host() -> str:
    """Return the address of this machine that others reach, as `tcp://` wants it; vLLM's variable first."""
    host = os.environ.get("VLLM_HOST_IP", "")
    if not host:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(ANYWHERE)
                host = probe.getsockname()[0]
            except OSError:  # no network: there is nobody else
                host = "127.0.0.1"
    return f"[{host}]" if ":" in host else host
