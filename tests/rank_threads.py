"""Ranks that are threads of one process: the same plans and exchanges, without a start of seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import torch

from microvllm.ops.sharding import Ranks
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import StepPlan
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner
from microvllm.runtime.worker.parallel.messages import PlanMessage, PlanReader, PlanWriter


class Threads:
    """Connects `size` threads, which make the same calls in the same order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._given: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=120)

    def of(self, rank: int) -> Ranks:
        return _Rank(self, rank, self._size)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What all ranks gave."""
        self._given[rank] = value
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


class _Rank:
    def __init__(self, threads: Threads, rank: int, size: int) -> None:
        self.rank, self.size, self._threads = rank, size, threads

    def sum(self, part: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        total = torch.stack(self._threads.exchange(self.rank, part)).sum(0)
        return total if residual is None else residual + total

    def join(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._threads.exchange(self.rank, part), 1)

    def agree(self, tokens: torch.Tensor) -> None:
        tokens.copy_(self._threads.exchange(self.rank, tokens.clone())[0])

    def smallest(self, number: int) -> int:
        return min(self._threads.exchange(self.rank, number))


class ThreadedRunner:
    """`ParallelRunner` whose other ranks are threads; what is no step is rank 0's."""

    def __init__(self, config: EngineConfig, kind: Callable[..., ModelGraphRunner]) -> None:
        size = config.tensor_parallel_size
        threads = Threads(size)
        self._own, *self._others = (kind(config, None, threads.of(rank)) for rank in range(size))
        self._readers = [PlanReader() for _ in self._others]
        self._writer = PlanWriter()
        self._pool = ThreadPoolExecutor(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        data = msgspec.msgpack.encode(self._writer.message(plan))
        running = [
            self._pool.submit(other.launch, reader.plan(msgspec.msgpack.decode(data, type=PlanMessage)))
            for other, reader in zip(self._others, self._readers, strict=True)
        ]
        launched = self._own.launch(plan)
        for each in running:
            each.result()
        return launched
