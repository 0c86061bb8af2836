"""Captures steps as CUDA graphs, for some sizes each, and replays the smallest that a step fits into.

A decode step is one replay for the whole model, from staged inputs to chosen tokens. A small step with
prompts in it is captured up to its last hidden states: launching a model's kernels one by one takes the host
some 10 ms, and the GPU computes a short prompt, or any of a small model, in less. Larger steps keep the GPU
busier than the host.

Unused capacity is padded: rows and tokens that write no keys and that are never read, sequences of context
length 0, segments without tokens.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.cuda import CUDAGraph

from microvllm.adapters.decoder import DecoderModel
from microvllm.ops.attention import AttentionBackend, SegmentTable
from microvllm.ops.attention.mixed import batch_of_groups
from microvllm.ops.gpu.launch import can_launch_early
from microvllm.ops.gpu.sampling import Delivery
from microvllm.ops.gpu.step_inputs import STAGED, DecodeInputs, Staged, prepare_decode
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.progress import Stage
from microvllm.runtime.worker.bitmask import Choice, ReadTokens
from microvllm.runtime.worker.graph_levers import graph_levers
from microvllm.runtime.worker.sampler import GPUSampler
from microvllm.runtime.worker.step_inputs import UNKNOWN, DeviceInputs, StepArrays
from microvllm.runtime.worker.step_sizes import StepSize, batch_sizes, step_sizes
from microvllm.runtime.worker.transfers import Readback

T = TypeVar("T")
SizeT = TypeVar("SizeT")
InPool: TypeAlias = Callable[[Callable[[], Any]], tuple[CUDAGraph, Any]]  # `capture`, but for the step


def capture(
    step: Callable[[], T], pool: torch.cuda._POOL_HANDLE, stream: torch.cuda.Stream
) -> tuple[CUDAGraph, T]:
    """The graph of a step whose inputs were sent, in memory of the pool, and what the step gives."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        step()  # compiles kernels, which a capture cannot
    torch.cuda.synchronize()
    graph = CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        made = step()
    return graph, made


class _Borrowed:
    """Memory of a tensor by its address, as NumPy's array interface describes it, without owning it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def borrowed(tensor: Tensor) -> Tensor:
    """The same values in memory that others may take: the next capture shall use it again.

    A tensor that owns what a graph writes keeps it from the pool: 1 GB for the logits of all sizes.
    """
    memory = torch.as_tensor(_Borrowed(tensor), device=tensor.device)
    return memory.view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True, slots=True)
class GpuParts:
    """What steps on a GPU are computed with; its last row is the padding row of captured steps."""

    config: EngineConfig
    model: DecoderModel
    attention: AttentionBackend
    inputs: DeviceInputs
    sampler: GPUSampler
    readback: Readback

    @classmethod
    def make(cls, config: EngineConfig, model: DecoderModel, attention: AttentionBackend) -> GpuParts:
        """Of a loaded model and its KV cache."""
        device, rows = torch.device(config.device), config.max_num_seqs + 1
        inputs = DeviceInputs(rows, config.block_size, device)
        sampler = GPUSampler(rows, config.spec.vocab_size, config.seed, config.logprobs_mode, device)
        if graph_levers(config).rules:
            sampler.rules.use_tables()
        return cls(config, model, attention, inputs, sampler, Readback(config.max_num_seqs))


class Graphs(ABC, Generic[SizeT]):
    """One kind of step, captured for each of `sizes`, the smaller before the larger.

    `pool`: the memory in which the results of all graphs live: the next replay of any overwrites them.
    """

    def __init__(self, parts: GpuParts, pool: torch.cuda._POOL_HANDLE, sizes: Sequence[SizeT]) -> None:
        self._parts = parts
        self._pool = pool
        self.sizes = sizes
        self._padding_row = parts.config.max_num_seqs
        self._captured: dict[SizeT, tuple[CUDAGraph, tuple[Tensor, ...]]] = {}
        self.replays = 0
        self.padded_tokens = 0

    @torch.inference_mode()
    def capture(self, stage: Stage, number: int) -> None:
        """Capture the `number` largest sizes, the largest first, so that others fit into its memory.

        Each is a part of the stage.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        in_pool = partial(capture, pool=self._pool, stream=stream)
        for size in sorted(self.sizes, key=self._num_tokens, reverse=True)[:number]:
            graph, results = self._capture(size, in_pool)
            self._captured[size] = graph, tuple(map(borrowed, results))
            stage.advance()
        torch.cuda.synchronize()

    @abstractmethod
    def _num_tokens(self, size: SizeT) -> int:
        """What a step of this size has room for."""

    @abstractmethod
    def _capture(self, size: SizeT, capture_in_pool: InPool) -> tuple[CUDAGraph, Iterable[Tensor]]:
        """Send inputs that are padding alone, and capture the step."""

    def _replay(self, size: SizeT, count: int) -> tuple[Tensor, ...]:
        """Compute the `count` tokens that were sent to the graph of this size -> its results, padding too."""
        graph, results = self._captured[size]
        graph.replay()
        self.replays += 1
        self.padded_tokens += self._num_tokens(size) - count
        return results


class DecodeGraphs(Graphs[int]):
    """Owns `tables`, the block tables on the device, [groups, rows, width] int32.

    Of a row's table only the blocks below its context length are read, so it need not be zeroed.
    """

    def __init__(self, parts: GpuParts, pool: torch.cuda._POOL_HANDLE) -> None:
        config = parts.config
        super().__init__(parts, pool, batch_sizes(config.max_num_seqs))
        device = parts.inputs.newest.device
        self._groups = config.num_groups
        self._height = STAGED + self._groups
        self._staged = torch.zeros(self._height * config.max_num_seqs, dtype=torch.int32, device=device)
        sizes = self._groups, config.max_num_seqs + 1, config.max_blocks
        self.tables = torch.zeros(sizes, dtype=torch.int32, device=device)

    # ---- capture -------------------------------------------------------------------------------

    def _num_tokens(self, size: int) -> int:
        return size

    def _capture(self, size: int, capture_in_pool: InPool) -> tuple[CUDAGraph, Iterable[Tensor]]:
        self._parts.inputs.stager.send_into(self._view(size), self._padding(size))
        graph, (inputs, *made) = capture_in_pool(partial(self._step, size))
        choose = partial(self._choose, inputs)
        self._parts.sampler.rules.capture(graph, capture_in_pool, choose, made[1], inputs.rows)
        return graph, made

    def _choose(self, inputs: DecodeInputs, logits: Tensor) -> Tensor:
        # A sequence's length is the index of its next token.
        delivery = Delivery(self._parts.inputs.newest, self._parts.readback.memory, inputs.places)
        return self._parts.sampler.choose_plain(logits, inputs.rows, inputs.lens, delivery)

    def _step(self, size: int) -> tuple[DecodeInputs, Tensor, Tensor, Tensor]:
        parts, newest = self._parts, self._parts.inputs.newest
        inputs = prepare_decode(
            *(self._view(size), self.tables, newest, parts.config.block_size),
            pdl=can_launch_early(newest.device),
        )
        decoding = inputs.positions, inputs.slots, inputs.blocks, inputs.lens
        batch = batch_of_groups(*decoding, rows=inputs.rows)
        hidden = parts.model.forward(inputs.ids, parts.attention.begin_step(batch))
        logits = parts.model.head(hidden)
        return inputs, inputs.ids, logits, self._choose(inputs, logits)

    def _view(self, size: int) -> Tensor:
        return self._staged[: self._height * size].view(self._height, size)

    def _padding(self, size: int) -> np.ndarray:
        staged = np.zeros((self._height, size), dtype=np.int32)
        staged[Staged.ROW], staged[Staged.COLUMN], staged[Staged.PLACE] = self._padding_row, -1, -1
        return staged

    # ---- a step --------------------------------------------------------------------------------

    def covers(self, items: Sequence[ScheduledRequest]) -> bool:
        """Whether every request computes one token and samples the next."""
        return all(item.num_new == 1 and item.samples for item in items)

    def note_blocks(self, items: Sequence[ScheduledRequest]) -> None:
        """Take over the new blocks of a step that is not replayed."""
        places: list[int] = []
        blocks: list[int] = []
        _, rows, width = self.tables.shape
        for item in items:
            for group in range(self._groups):
                first = (group * rows + item.request.row) * width + item.first_block
                places += range(first, first + len(item.new_blocks) // self._groups)
            blocks += item.new_blocks
        if places:
            at, values = self._parts.inputs.stager.send(np.array(places), np.array(blocks))
            self.tables.view(-1).scatter_(0, at.long(), values)

    def choose(self, size: int, items: Sequence[ScheduledRequest]) -> Choice:
        """What reads the graphs' tokens, if no request has rules but those that a graph applies.

        End tokens that may not come yet are such a rule, and so are log probabilities. Masks are applied by a
        graph, too, but come later: what then chooses the tokens is the second.
        """
        sampler, readback, rows = self._parts.sampler, self._parts.readback, [i.request.row for i in items]
        if any(item.may_not_end for item in items):
            return None, None
        if sampler.plain(rows):
            sampler.rules.replay(size, rows)
            return readback.written(len(rows)), None
        if not sampler.masked(rows):
            return None, None

        def masked(at: Sequence[int], bits: Sequence[np.ndarray]) -> ReadTokens:
            sampler.rules.replay_masked(size, len(rows), at, bits)
            return readback.written(len(rows))

        return None, masked

    def send(self, items: Sequence[ScheduledRequest]) -> int:
        """Bring a step's inputs to the graph that has room for it -> the size of that graph."""
        count, start = len(items), self._parts.readback.start
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        # A request that was just admitted may bring a whole table.
        self.note_blocks([item for item in items if len(item.new_blocks) > self._groups])
        staged = self._padding(size)
        staged[Staged.ROW, :count] = [item.request.row for item in items]
        staged[Staged.TOKEN, :count] = [
            item.request.token_ids[item.start] if item.start < len(item.request.token_ids) else UNKNOWN
            for item in items
        ]
        staged[Staged.PLACE, :count] = np.arange(start, start + count)
        starts = np.array([item.start for item in items])
        staged[Staged.POSITION, :count], staged[Staged.LENGTH, :count] = starts, starts + 1
        for i, item in enumerate(items):
            if len(item.new_blocks) == self._groups:
                staged[Staged.COLUMN, i], staged[STAGED:, i] = item.first_block, item.new_blocks
        self._parts.sampler.upload()
        self._parts.inputs.stager.send_into(self._view(size), staged)
        return size

    def replay(self, size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the `count` requests that were sent to the graph of this size.

        -> the ids that went in, logits [count, vocab], and tokens [count] int64 as plain requests choose
        them. All are valid until the next replay. The tokens are on their way to the readback's memory, too.
        """
        ids, logits, tokens = self._replay(size, count)
        return ids[:count], logits[:count], tokens[:count]


# ---- steps with prompts ----------------------------------------------------------------------------


class PromptGraphs(Graphs[StepSize]):
    """Steps with prompts in them; `tables`: those of `DecodeGraphs`, whose last row is the padding row."""

    def __init__(self, parts: GpuParts, tables: Tensor, pool: torch.cuda._POOL_HANDLE) -> None:
        config = parts.config
        longest = graph_levers(config).prompt_tokens(config.spec.num_products)
        limits = config.max_num_seqs, config.max_num_batched_tokens
        super().__init__(parts, pool, step_sizes(*limits, longest, config.num_groups))
        self._tables = tables
        longest = max((size.fields()[-1].stop for size in self.sizes), default=0)
        self._staged = torch.zeros(longest, dtype=torch.int32, device=tables.device)

    def _num_tokens(self, size: StepSize) -> int:
        return size.decodes + size.tokens

    def _capture(self, size: StepSize, capture_in_pool: InPool) -> tuple[CUDAGraph, Iterable[Tensor]]:
        nothing, slots = np.zeros(0, dtype=np.int64), np.zeros((size.groups, 0), dtype=np.int64)
        self.send(size, StepArrays(nothing, nothing, nothing, slots, nothing, nothing, nothing, 0))
        return capture_in_pool(partial(self._step, size))

    def size_for(self, arrays: StepArrays) -> StepSize | None:
        """The smallest size that has room for a step."""
        return next((size for size in self.sizes if size.fits(arrays)), None)

    def send(self, size: StepSize, arrays: StepArrays) -> None:
        """Bring a step's inputs to the graph of this size, which `forward` then replays."""
        staged = size.staged(arrays, self._padding_row)
        self._parts.inputs.stager.send_into(self._staged[: len(staged)], staged)

    def forward(self, size: StepSize, arrays: StepArrays) -> tuple[Tensor, Tensor]:
        """The id and the hidden state of every token of the step: [n], [n, hidden], until the next replay."""
        count, decodes = len(arrays.ids), arrays.num_decodes
        ids, hidden = self._replay(size, count)

        def without_padding(padded: Tensor) -> Tensor:
            prompts = padded[size.decodes : size.decodes + count - decodes]
            return torch.cat((padded[:decodes], prompts)) if decodes else prompts

        return without_padding(ids), without_padding(hidden)

    def _step(self, size: StepSize) -> tuple[Tensor, Tensor]:
        ids, rows, positions, context, request_rows, starts, *slots = (
            self._staged[field] for field in size.fields()
        )
        ids = torch.where(ids == UNKNOWN, self._parts.inputs.newest[rows], ids)
        blocks = self._tables.index_select(1, request_rows)
        decodes = size.decodes
        segments = [SegmentTable(starts, context[decodes:], each[decodes:], size.tokens) for each in blocks]
        decoding = blocks[:, :decodes], context[:decodes]
        batch = batch_of_groups(positions, slots, *decoding, segments, request_rows)
        return ids, self._parts.model.forward(ids, self._parts.attention.begin_step(batch))


def make_graphs(parts: GpuParts) -> tuple[PromptGraphs, DecodeGraphs]:
    """Both kinds, in one pool of memory, in the order in which they are to be captured."""
    pool = torch.cuda.graph_pool_handle()
    graphs = DecodeGraphs(parts, pool)
    return PromptGraphs(parts, graphs.tables, pool), graphs
