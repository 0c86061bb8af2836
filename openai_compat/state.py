"""Holds what the endpoints share: the engine's client, the options, the counters."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

import microvllm
from microvllm.openai_compat.api.formats import Formats
from microvllm.openai_compat.api.responses.store import ResponseStore
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.metrics import Exposition, HttpMetrics
from microvllm.openai_compat.transport.body import BodyReader
from microvllm.openai_compat.transport.lifecycle import Lifecycle
from microvllm.runtime.metrics.engine_metrics import EngineMetrics

if TYPE_CHECKING:
    from microvllm.runtime.process.client import EngineClient


@dataclass
class ServerState:
    """The state of one server. `model_names` are the accepted names, the first of which is echoed.

    `metrics` has those of each engine, none with --disable-log-stats. `exposition` is None until the metrics
    are first read, `openapi` until the document is.
    """

    client: EngineClient
    args: ServerArgs
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    created: int = field(default_factory=lambda: int(time.time()))
    model_names: tuple[str, ...] = ()
    http_metrics: HttpMetrics = field(default_factory=HttpMetrics)
    metrics: list[EngineMetrics] = field(default_factory=list)
    exposition: Exposition | None = None
    num_generations: int = 0  # requests in progress that generate
    fingerprint: str | None = None
    openapi: bytes | None = None
    bodies: BodyReader = field(init=False)
    responses: ResponseStore = field(init=False)
    background: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # by the id of the response

    def __post_init__(self) -> None:
        self.bodies = BodyReader(self.args.max_body_bytes, self.client.run_blocking)
        self.responses = ResponseStore(self.args.max_response_store_bytes, self.args.max_body_bytes)
        if not self.args.disable_log_stats:
            longest = self.client.config.max_model_len
            self.metrics = [EngineMetrics(longest, replica.stats) for replica in self.client.replicas]
            for replica, metrics in zip(self.client.replicas, self.metrics, strict=True):
                replica.observer = metrics
        self.model_names = self.args.served_model_names or (self.client.config.model,)
        self.fingerprint = _fingerprint(self.client, self.args)

    @functools.cached_property
    def formats(self) -> Formats:
        """The formats in which the model writes calls and reasoning."""
        return Formats.of(self.client, self.args)


def _fingerprint(client: EngineClient, args: ServerArgs) -> str | None:
    """Return OpenAI's `system_fingerprint`: the same for the same engine configuration.

    "full" adds the numbers of ranks and of engines where there are several, as in vLLM.
    """
    if args.fingerprint_mode in ("custom", "none"):
        return args.fingerprint_value
    digest = hashlib.sha256(msgspec.json.encode(client.config)).hexdigest()
    sizes = {"tp": client.config.tensor_parallel_size, "dp": client.config.data_parallel_size}
    several = [f"-{name}{size}" for name, size in sizes.items() if size > 1]
    parallel = "".join(several) if args.fingerprint_mode == "full" else ""
    return f"microvllm-{microvllm.__version__}{parallel}-{digest[:8]}"
