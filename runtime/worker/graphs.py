"""Decode steps as CUDA graphs: one replay for the whole model, from staged inputs to chosen tokens.

A graph is captured for each of some batch sizes; a step takes the next larger one, and what is too much
is padding: a row of its own, of context length 0, which writes no keys and whose token goes nowhere.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel
from microvllm.ops.attention import AttentionBackend, AttentionBatch
from microvllm.ops.gpu.launch import can_launch_early
from microvllm.ops.gpu.sampling import Delivery
from microvllm.ops.gpu.step_inputs import STAGED, prepare_decode
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.progress import Stage
from microvllm.runtime.worker.gpu_sampler import GPUSampler
from microvllm.runtime.worker.step_inputs import UNKNOWN, DeviceInputs
from microvllm.runtime.worker.transfer import Readback


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then multiples of 8 up to 256 and of 16 beyond, and the largest."""
    sizes = {1, 2, 4, *range(8, min(largest, 256) + 1, 8), *range(272, largest + 1, 16), largest}
    return sorted(size for size in sizes if size <= largest)


@dataclass(frozen=True, slots=True)
class _Captured:
    """ids: [size] int32, what went in; logits: [size, vocab] in the model's dtype; tokens: [size] int64.

    They live in the graphs' common memory: the next replay overwrites them.
    """

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    logits: Tensor
    tokens: Tensor


class DecodeGraphs:
    """Owns the graphs, and `tables`, the block tables on the device, [rows, width] int32.

    Of a row's table only the blocks below its context length are read, so it need not be zeroed.
    `pool`: the memory that the graphs share with others.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: DecoderModel,
        attention: AttentionBackend,
        inputs: DeviceInputs,
        sampler: GPUSampler,
        readback: Readback,
        pool: torch.cuda._POOL_HANDLE,
    ) -> None:
        self._config = config
        self._model = model
        self._attention = attention
        self._inputs = inputs
        self._sampler = sampler
        self._readback = readback
        self._pool = pool
        self._padding_row = config.max_num_seqs
        self.sizes = batch_sizes(config.max_num_seqs)
        self._captured: dict[int, _Captured] = {}
        device = inputs.newest.device
        self._staged = torch.zeros(STAGED * config.max_num_seqs, dtype=torch.int32, device=device)
        self.tables = torch.zeros(
            config.max_num_seqs + 1, config.max_blocks, dtype=torch.int32, device=device
        )
        self.replays = 0
        self.padded_tokens = 0

    # ---- capture -------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, stage: Stage) -> None:
        """Capture all sizes, the largest first, so that the smaller ones fit into the memory it took.

        Each is a part of the stage.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for size in reversed(self.sizes):
            self._inputs.stager.send_into(self._view(size), self._padding(size))
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                self._step(size)  # compiles kernels, which a capture cannot
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                made = self._step(size)
            self._captured[size] = _Captured(graph, *made)
            stage.advance()
        torch.cuda.synchronize()

    def _step(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        newest = self._inputs.newest
        inputs = prepare_decode(
            *(self._view(size), self.tables, newest, self._config.block_size),
            pdl=can_launch_early(newest.device),
        )
        batch = AttentionBatch(inputs.positions, inputs.slots, size, inputs.blocks, inputs.lens)
        hidden = self._model.forward(inputs.ids, self._attention.begin_step(batch))
        logits = self._model.head(hidden)
        # A sequence's length is the index of its next token.
        delivery = Delivery(newest, self._readback.memory, inputs.places)
        tokens = self._sampler.choose_plain(logits, inputs.rows, inputs.lens, delivery)
        return inputs.ids, logits, tokens

    def _view(self, size: int) -> Tensor:
        return self._staged[: STAGED * size].view(STAGED, size)

    def _padding(self, size: int) -> np.ndarray:
        staged = np.zeros((STAGED, size), dtype=np.int32)
        staged[0], staged[4], staged[6] = self._padding_row, -1, -1
        return staged

    # ---- a step --------------------------------------------------------------------------------

    def covers(self, items: Sequence[ScheduledRequest]) -> bool:
        """Whether every request computes one token and samples the next."""
        return all(item.num_new == 1 and item.samples for item in items)

    def note_blocks(self, items: Sequence[ScheduledRequest]) -> None:
        """Take over the new blocks of a step that is not replayed."""
        places: list[int] = []
        blocks: list[int] = []
        for item in items:
            first = item.request.row * self._config.max_blocks + item.first_block
            places += range(first, first + len(item.new_blocks))
            blocks += item.new_blocks
        if places:
            at, values = self._inputs.stager.send(np.array(places), np.array(blocks))
            self.tables.view(-1).scatter_(0, at.long(), values)

    def chose_all(self, items: Sequence[ScheduledRequest]) -> bool:
        """Whether the graph's tokens stand: no request has rules, or asks for log probabilities.

        End tokens that may not come yet are such a rule.
        """
        return self._sampler.plain([item.request.row for item in items]) and not any(
            item.request.num_output < item.request.params.min_tokens for item in items
        )

    def send(self, items: Sequence[ScheduledRequest]) -> int:
        """Bring a step's inputs to the graph that has room for it -> the size of that graph."""
        count = len(items)
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        # A request that was just admitted may bring a whole table.
        self.note_blocks([item for item in items if len(item.new_blocks) > 1])
        staged = self._padding(size)
        staged[0, :count] = [item.request.row for item in items]
        staged[1, :count] = [
            item.request.token_ids[item.start] if item.start < len(item.request.token_ids) else UNKNOWN
            for item in items
        ]
        staged[6, :count] = np.arange(self._readback.start, self._readback.start + count)
        starts = np.array([item.start for item in items])
        staged[2, :count], staged[3, :count] = starts, starts + 1
        for i, item in enumerate(items):
            if len(item.new_blocks) == 1:
                staged[4, i], staged[5, i] = item.first_block, item.new_blocks[0]
        self._sampler.upload()
        self._inputs.stager.send_into(self._view(size), staged)
        return size

    def replay(self, size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the `count` requests that were sent to the graph of this size.

        -> the ids that went in, logits [count, vocab], and tokens [count] int64 as plain requests choose
        them. All are valid until the next replay. The tokens are on their way to the readback's memory, too.
        """
        captured = self._captured[size]
        captured.graph.replay()
        self.replays += 1
        self.padded_tokens += size - count
        return captured.ids[:count], captured.logits[:count], captured.tokens[:count]
