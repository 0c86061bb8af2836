"""`make_core`: the engine core, which publishes its KV events if that is configured."""

from __future__ import annotations

import weakref
from typing import Protocol

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.drafts import Drafter
from microvllm.runtime.core.engine_core import EngineCore, Runner, StepT
from microvllm.runtime.kv_events.config import KVEventsConfig
from microvllm.runtime.kv_events.events import AllBlocksCleared, KVEvent
from microvllm.runtime.kv_events.recorder import CacheRecorder
from microvllm.runtime.options import vllm_environment
from microvllm.runtime.request import StepOutput

INT_HASHES = "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"


class Publisher(Protocol):
    """Takes the events of each step; `config` has the addresses where they are published."""

    config: KVEventsConfig

    def publish(self, events: list[KVEvent]) -> None: ...

    def close(self) -> None: ...


def make_core(config: EngineConfig, runner: Runner[StepT]) -> EngineCore[StepT]:
    """Return the core of a runner. Raises `ConfigError` if its events cannot be published."""
    if config.kv_events is None:
        return EngineCore(config, runner)
    from microvllm.runtime.kv_events.publisher import EventPublisher  # needs pyzmq

    return PublishingCore(config, runner, EventPublisher(config.kv_events, config.data_parallel_rank))


def event_source(core: EngineCore[StepT]) -> KVEventsConfig | None:
    """Return where a core publishes its events; None if it does not."""
    return core.publisher.config if isinstance(core, PublishingCore) else None


class PublishingCore(EngineCore[StepT]):
    """Publishes the events of each step behind it, and closes the publisher when it is dropped.

    The first event clears the cache: subscribers may have known an engine before this one.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner[StepT],
        publisher: Publisher,
        drafter: Drafter | None = None,
    ) -> None:
        weakref.finalize(self, publisher.close)
        super().__init__(config, runner, drafter)
        self.publisher = publisher
        self._recorder = CacheRecorder(self.kv, int_hashes=vllm_environment.is_on(INT_HASHES, default=True))
        publisher.publish([AllBlocksCleared()])

    def step(self) -> list[StepOutput]:
        outputs = super().step()
        self.publisher.publish(self._recorder.take_events())
        return outputs

    def drain(self) -> list[StepOutput]:
        outputs = super().drain()
        self.publisher.publish(self._recorder.take_events())
        return outputs

    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        self.publisher.publish(self._recorder.take_events())

    def _collect(self, done: StepT) -> list[StepOutput]:
        outputs = super()._collect(done)
        self._recorder.describe(done.plan.scheduled)
        return outputs
