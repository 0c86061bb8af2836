"""What a CPU and a GPU do differently in a step: inputs, forward pass, graphs, sampling, clocks, faults.

`make_device` decides between them once, at the start; the model runner never branches on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel
from microvllm.ops.attention import AttentionBackend
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.errors import EngineError
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.worker.bitmask import ChooseMasked, ReadTokens
from microvllm.runtime.worker.gpu_memory import capture_graphs
from microvllm.runtime.worker.logprobs import needed_rows
from microvllm.runtime.worker.sampler import GPUSampler, Sampler
from microvllm.runtime.worker.step_inputs import DeviceInputs, HostInputs, StepArrays, StepInputs
from microvllm.runtime.worker.step_times import DeviceClock, StepClock, time_forward
from microvllm.runtime.worker.warm_up import warm_up

if TYPE_CHECKING:
    from microvllm.runtime.worker.graphs import DecodeGraphs, PromptGraphs

S = TypeVar("S")
T = TypeVar("T")


class Replay(NamedTuple):
    """A step of single tokens by a captured graph, whose memory the next replay overwrites.

    ids: [m], what went in; logits: [m, vocab]. read_tokens: there if the graph's own choice of tokens stands,
    which no sampler has to make any more. choose: there if masks alone are left to apply.
    """

    ids: Tensor
    logits: Tensor
    read_tokens: ReadTokens | None
    choose: ChooseMasked | None


class Device(ABC):
    """One device with a model, its KV cache, and the newest token and sampling parameters of every row.

    `device_clock`: there if the times of steps are logged and the host does not compute them.
    """

    inputs: StepInputs
    sampler: Sampler

    def __init__(self) -> None:
        self.clock = StepClock()
        self.device_clock: DeviceClock | None = None

    @property
    def graph_replays(self) -> int:
        return 0

    @property
    def padded_tokens(self) -> int:
        return 0

    def run(self, launch: Callable[[S], T], step: S) -> T:
        """Launch a step or a part of it. Raises `EngineError` if the device is unusable from here on."""
        launched = launch(step)
        if self.device_clock is not None:
            self.device_clock.end()
        return launched

    def replay(self, items: Sequence[ScheduledRequest]) -> Replay | None:
        """Launch a step by a captured graph, if one covers it."""
        return None

    @abstractmethod
    def forward(self, items: Sequence[ScheduledRequest], block_tables: np.ndarray) -> tuple[Tensor, Tensor]:
        """Launch the model -> the id and the hidden state of every token of the step: [n], [n, hidden].

        On a CPU only of those behind which a token is sampled, unless others are needed.
        """

    @abstractmethod
    def read_later(self, tokens: Tensor) -> ReadTokens:
        """Start to bring tokens: [m] int64 to the host."""

    def begin_sampling(self) -> None:
        """The masks that a step has waited for are there."""
        if self.device_clock is not None:
            self.device_clock.resume()

    def _begin_forward(self) -> None:
        self.clock.enter("forward")
        if self.device_clock is not None:
            self.device_clock.begin()


def make_device(
    config: EngineConfig, model: DecoderModel, attention: AttentionBackend, on_progress: OnProgress | None
) -> Device:
    """The device of a loaded model, ready for its first step."""
    if config.device == "cpu":
        return CpuDevice(config, model, attention)
    return GpuDevice(config, model, attention, on_progress)


class CpuDevice(Device):
    """The host itself: every call has done its work when it returns.

    Steps do not enter torch's inference mode: no weight asks for gradients, and to enter it takes 0.1 ms.
    """

    inputs: HostInputs

    def __init__(self, config: EngineConfig, model: DecoderModel, attention: AttentionBackend) -> None:
        super().__init__()
        rows = config.max_num_seqs
        self.inputs = HostInputs(rows, config.block_size)
        self.sampler = Sampler(rows, config.spec.vocab_size, config.seed, config.logprobs_mode)
        self._block_size = config.block_size
        self._model = model
        self._attention = time_forward(model, attention, self.clock) if config.log_step_times else attention
        if config.attention_backend == "cpu":
            # What torch still does is too small to share, and its threads wait for each other
            # at every operator, however long one of them is kept from its core.
            torch.set_num_threads(1)

    def forward(self, items: Sequence[ScheduledRequest], block_tables: np.ndarray) -> tuple[Tensor, Tensor]:
        ids, batch = self.inputs.advance(items) or self.inputs.make(
            StepArrays.of(items, block_tables, self._block_size), block_tables
        )
        needed = needed_rows(items, self._model.spec)
        self._begin_forward()
        hidden = self._model.forward(ids, self._attention.begin_step(batch), needed)
        return ids if needed is None else ids[needed], hidden

    def read_later(self, tokens: Tensor) -> ReadTokens:
        return tokens.tolist


class GpuDevice(Device):
    """An NVIDIA GPU: calls launch work on the current stream and wait for nothing."""

    inputs: DeviceInputs
    sampler: GPUSampler

    def __init__(
        self,
        config: EngineConfig,
        model: DecoderModel,
        attention: AttentionBackend,
        on_progress: OnProgress | None,
    ) -> None:
        # Here, because a machine without a GPU need not have Triton.
        from microvllm.runtime.worker.graphs import GpuParts

        self._parts = parts = GpuParts.make(config, model, attention)
        self.inputs, self.sampler = parts.inputs, parts.sampler
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        if not config.enforce_eager:
            self._prompt_graphs, self._graphs = capture_graphs(parts, on_progress)
        warm_up(parts, on_progress)
        super().__init__()  # the clock begins after the captures
        if config.log_step_times:
            self.device_clock = DeviceClock(self.clock)

    @property
    def graph_replays(self) -> int:
        return sum(each.replays for each in (self._graphs, self._prompt_graphs) if each is not None)

    @property
    def padded_tokens(self) -> int:
        return sum(each.padded_tokens for each in (self._graphs, self._prompt_graphs) if each is not None)

    def run(self, launch: Callable[[S], T], step: S) -> T:
        try:
            with torch.inference_mode():
                return super().run(launch, step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EngineError(f"the GPU failed: {next(iter(str(error).splitlines()), '')}") from error

    def replay(self, items: Sequence[ScheduledRequest]) -> Replay | None:
        graphs = self._graphs
        if graphs is None:
            return None
        if not graphs.covers(items):
            graphs.note_blocks(items)
            return None
        size = graphs.send(items)
        self._begin_forward()
        ids, logits, _ = graphs.replay(size, len(items))
        return Replay(ids, logits, *graphs.choose(size, items))

    def forward(self, items: Sequence[ScheduledRequest], block_tables: np.ndarray) -> tuple[Tensor, Tensor]:
        parts, graphs = self._parts, self._prompt_graphs
        arrays = StepArrays.of(items, block_tables, parts.config.block_size)
        if graphs is not None and (size := graphs.size_for(arrays)) is not None:
            graphs.send(size, arrays)
            self._begin_forward()
            return graphs.forward(size, arrays)
        ids, batch = parts.inputs.make(arrays, block_tables)
        self._begin_forward()
        return ids, parts.model.forward(ids, parts.attention.begin_step(batch))

    def read_later(self, tokens: Tensor) -> ReadTokens:
        return self._parts.readback.begin(tokens)
