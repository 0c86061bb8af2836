"""Makes vectors of texts instead of tokens: the model runner of a model with `spec.pooling`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel
from microvllm.ops.sharding import Ranks
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import NO_TOKEN, ScheduledRequest, StepPlan, StepResult
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner
from microvllm.runtime.worker.transfers import on_device


def make_runner(
    config: EngineConfig,
    on_progress: OnProgress | None = None,
    ranks: Ranks | None = None,
    model: DecoderModel | None = None,
) -> ModelGraphRunner:
    """The runner that the model needs on one device; it is loaded unless it is given.

    Raises `ConfigError` as `load_model` does.
    """
    kind = ModelGraphRunner if config.spec.pooling is None else PoolingRunner
    return kind(config, on_progress, ranks, model)


@dataclass(slots=True)
class PooledStep(LaunchedStep):
    """`read_vectors` waits for the device -> [len(order), hidden] float32."""

    read_vectors: Callable[[], np.ndarray] | None = None


class PoolingRunner(ModelGraphRunner):
    """Computes prompts alone. A request "samples" in the step that ends its prompt: it gets a vector then.

    Of a prompt that several steps compute, the sum of the hidden states so far, or the first of them, is kept
    in its row. The step with the prompt's first token overwrites what was there, also after a preemption.
    """

    def __init__(self, config: EngineConfig, *loading: Any) -> None:
        super().__init__(config, *loading)
        pooling, rows = config.spec.pooling, config.max_num_seqs
        self._method = "last" if pooling is None else pooling.method
        kept = (rows, config.spec.hidden_size) if self._method != "last" else (0, 0)
        self._kept = torch.zeros(kept, dtype=torch.float32, device=config.device)

    def collect(self, step: LaunchedStep) -> StepResult:
        """Waits for the device. A vector that is not finite counts as no token, which ends its request."""
        pooled: dict[int, bytes] = {}
        tokens: list[Sequence[int]] = [()] * len(step.plan.scheduled)
        if isinstance(step, PooledStep) and step.read_vectors is not None:
            vectors = step.read_vectors()
            finite = np.isfinite(vectors).all(axis=1).tolist()
            for index, vector, usable in zip(step.order, vectors, finite, strict=True):
                if usable:
                    pooled[index] = vector.tobytes()
                else:
                    tokens[index] = (NO_TOKEN,)
        if self.device_clock is not None:
            self.device_clock.collect()
        return StepResult(tokens, pooled=pooled)

    def _choose(self, plan: StepPlan, order: Sequence[int], ids: Tensor, hidden: Tensor) -> LaunchedStep:
        self.clock.enter("sample")
        items = [plan.scheduled[i] for i in order]
        ends = np.cumsum([item.num_new for item in items])
        ending = [j for j, item in enumerate(items) if item.samples]
        if self._method == "last":
            vectors = None
            if ending:
                vectors = self.model.logits(hidden[on_device(ends[ending] - 1, torch.int64, hidden.device)])
        else:
            pooled = self._pool(items, ends, self.model.logits(hidden))
            vectors = torch.stack(pooled) if pooled else None
        if vectors is None:
            return LaunchedStep(plan)
        return PooledStep(plan, [order[j] for j in ending], read_vectors=_read_later(vectors))

    def _pool(self, items: Sequence[ScheduledRequest], ends: np.ndarray, states: Tensor) -> list[Tensor]:
        """states: [n, hidden] float32, of all tokens of the step -> the vectors of prompts that end in it."""
        found = []
        for item, end in zip(items, ends.tolist(), strict=True):
            row, own = item.request.row, states[end - item.num_new : end]
            if self._method == "mean":
                # Request by request, so that a vector does not depend on what is computed beside it.
                own = own.sum(0) if item.start == 0 else self._kept[row] + own.sum(0)
            else:
                own = own[0] if item.start == 0 else self._kept[row]
            if not item.samples:
                self._kept[row] = own
            elif self._method == "mean":
                found.append(own / item.request.prompt_len)
            else:
                found.append(own)
        return found


def as_tensor(vector: np.ndarray) -> Tensor:
    """A vector on the host as a tensor of its own."""
    return torch.from_numpy(vector.copy())


def _read_later(vectors: Tensor) -> Callable[[], np.ndarray]:
    """Start to bring vectors to the host -> what waits for them and returns them."""
    if vectors.device.type == "cpu":
        return vectors.numpy
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def read() -> np.ndarray:
        arrived.synchronize()
        return host.numpy()

    return read
