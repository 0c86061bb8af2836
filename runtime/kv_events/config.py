"""Reads `--kv-events-config`: where events of the KV cache are published. Imports no ZeroMQ."""

from __future__ import annotations

import importlib.util
import logging
import re
from typing import Annotated, Any, Literal

import msgspec

from microvllm.runtime.errors import ConfigError

logger = logging.getLogger("microvllm.config")

OPTION = "--kv-events-config"
INSTALL = "pip install 'microvllm[kv-events]'"
# A host is a name, an address (of IPv6 in brackets), or * for all; a port 0 or * is the system's to choose.
TCP = re.compile(r"tcp://(?P<host>[^\s/]+):(?P<port>\d{1,5}|\*)")
IPC = re.compile(r"ipc://\S+")
CHOSEN_BY_SYSTEM = ("0", "*")
LAST_PORT = 65535

Count = Annotated[int, msgspec.Meta(ge=1)]


class KVEventsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of vLLM's `--kv-events-config`, with its defaults.

    `endpoint` is bound if it holds * or :: or begins with ipc://, and connected to otherwise;
    `replay_endpoint` is bound. `buffer_steps`: batches that are kept for the replay. `hwm`: batches that wait
    for a slow subscriber before it misses some. `max_queue_size`: batches that may wait to be sent.
    """

    enable_kv_cache_events: bool = False
    publisher: Literal["null", "zmq"] | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: Count = 10_000
    hwm: Count = 100_000
    max_queue_size: Count = 100_000
    topic: str = ""

    def at_rank(self, rank: int) -> KVEventsConfig:
        """Return the configuration of one data-parallel rank: ports are counted up, as in vLLM."""
        replay = self.replay_endpoint
        return msgspec.structs.replace(
            self,
            endpoint=_offset(self.endpoint, rank),
            replay_endpoint=None if replay is None else _offset(replay, rank),
        )


def read_kv_events(values: dict[str, Any] | None, caching: bool, ranks: int = 1) -> KVEventsConfig | None:
    """Return the configuration, None if nothing is to be published.

    caching: whether there is a prefix cache. ranks: data-parallel ones. Raises `ConfigError` naming the key
    that is unknown or wrong, or what is missing.
    """
    try:
        config = msgspec.convert(values or {}, KVEventsConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{OPTION}: {error}") from None
    publisher = config.publisher or ("zmq" if config.enable_kv_cache_events else "null")
    if publisher == "null" or not config.enable_kv_cache_events:
        unused = config not in (KVEventsConfig(), KVEventsConfig(publisher="null"))
        if unused and not config.enable_kv_cache_events:
            logger.warning("%s: nothing is published without enable_kv_cache_events true", OPTION)
        return None
    for name in ("endpoint", "replay_endpoint"):
        _check(name, getattr(config, name), ranks)
    if config.replay_endpoint == config.endpoint and _port(config.endpoint) not in CHOSEN_BY_SYSTEM:
        raise ConfigError(f"{OPTION}: endpoint and replay_endpoint are both {config.endpoint}")
    _check_overlap(config, ranks)
    if not caching:
        raise ConfigError(f"{OPTION}: without prefix caching there are no events", remedy="leave it out")
    if importlib.util.find_spec("zmq") is None:
        raise ConfigError(f"{OPTION} needs the package pyzmq", remedy=INSTALL)
    return msgspec.structs.replace(config, publisher="zmq")


def _check(name: str, endpoint: str | None, ranks: int) -> None:
    """Raise `ConfigError` for an address that no process outside could use, or whose last port is none."""
    if endpoint is None or IPC.fullmatch(endpoint):
        return
    port = _port(endpoint)
    if port is None:
        raise ConfigError(f"{OPTION}: {name} must be tcp://HOST:PORT or ipc://PATH, got {endpoint!r:.100}")
    if port not in CHOSEN_BY_SYSTEM and int(port) + ranks - 1 > LAST_PORT:
        raise ConfigError(f"{OPTION}: {name} {endpoint}: a port, also a rank's, is at most {LAST_PORT}")


def _check_overlap(config: KVEventsConfig, ranks: int) -> None:
    """Raise `ConfigError` if one rank's endpoint would have the port of another's replay endpoint."""
    ports = [_port(config.endpoint), _port(config.replay_endpoint or "")]
    first, replay = [int(port) if port and port not in CHOSEN_BY_SYSTEM else None for port in ports]
    bound = "*" in config.endpoint or "::" in config.endpoint
    if bound and first is not None and replay is not None and abs(first - replay) < ranks:
        raise ConfigError(
            f"{OPTION}: the ports of endpoint and replay_endpoint, {first} and {replay}, must be {ranks} "
            "apart or more: each data-parallel rank takes the next"
        )


def _port(endpoint: str) -> str | None:
    found = TCP.fullmatch(endpoint)
    return None if found is None else found["port"]


def _offset(endpoint: str, rank: int) -> str:
    port = _port(endpoint)
    if rank == 0 or port in CHOSEN_BY_SYSTEM:
        return endpoint
    if port is None:
        return f"{endpoint}_dp{rank}"
    return f"{endpoint.removesuffix(port)}{int(port) + rank}"
