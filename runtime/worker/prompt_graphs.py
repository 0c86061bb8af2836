"""Small steps with prompts in them as CUDA graphs.

Launching a model's kernels one by one takes the host some 10 ms, and the GPU computes a short prompt in a
tenth of that. So the model up to its last hidden states is captured for a few sizes; a step takes the
smallest that it fits into. What is too much is padding: tokens that write no keys and that nobody reads,
sequences of context length 0, segments without tokens. Larger steps keep the GPU busier than the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel
from microvllm.ops.attention import AttentionBackend, AttentionBatch, SegmentTable
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.progress import Stage
from microvllm.runtime.worker.step_inputs import UNKNOWN, DeviceInputs, StepArrays

PROMPT_TOKENS = (16, 64, 128, 256, 512, 1024)
DECODES = (0, 32)  # and as many as there can be
SEGMENTS = 8
ALIGNMENT = 4  # int32 numbers in 16 bytes: Triton compiles a kernel anew for pointers that are not multiples


@dataclass(frozen=True, slots=True)
class StepSize:
    """How many decodes, and tokens of prompts, a captured step has room for."""

    decodes: int
    tokens: int

    def fits(self, arrays: StepArrays) -> bool:
        decodes = arrays.num_decodes
        return (
            decodes <= self.decodes
            and len(arrays.ids) - decodes <= self.tokens
            and len(arrays.lengths) - decodes <= SEGMENTS
        )

    def fields(self) -> list[slice]:
        """Where in the staged inputs are: ids, rows, positions and slots of the tokens; context lengths and
        rows of the requests; starts of the segments."""
        tokens, requests = self.decodes + self.tokens, self.decodes + SEGMENTS
        found, start = [], 0
        for length in (tokens, tokens, tokens, tokens, requests, requests, SEGMENTS + 1):
            found.append(slice(start, start + length))
            start += -(-length // ALIGNMENT) * ALIGNMENT
        return found

    def staged(self, arrays: StepArrays, padding_row: int) -> np.ndarray:
        """The inputs of a step that fits, padded with tokens of the padding row: int32, as `fields` says."""
        fields = self.fields()
        staged = np.zeros(fields[-1].stop, dtype=np.int32)
        ids, rows, positions, slots, context, request_rows, starts = (staged[field] for field in fields)
        slots[:], rows[:], request_rows[:] = -1, padding_row, padding_row
        decodes = arrays.num_decodes
        for padded, values in (
            (ids, arrays.ids),
            (rows, arrays.rows),
            (positions, arrays.positions),
            (slots, arrays.slots),
            (context, arrays.context),
            (request_rows, arrays.request_rows),
        ):
            padded[:decodes] = values[:decodes]
            padded[self.decodes : self.decodes + len(values) - decodes] = values[decodes:]
        ends = np.cumsum(arrays.lengths[decodes:])
        starts[1 : len(ends) + 1] = ends
        starts[len(ends) + 1 :] = starts[len(ends)]
        return staged


@dataclass(frozen=True, slots=True)
class _Captured:
    """ids: [decodes + tokens], what went in; hidden: [decodes + tokens, hidden], until the next replay."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    hidden: Tensor


def step_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> list[StepSize]:
    """The smaller before the larger."""
    decodes = sorted({min(count, max_num_seqs) for count in (*DECODES, max_num_seqs)})
    tokens = [count for count in PROMPT_TOKENS if count <= max_num_batched_tokens]
    return [StepSize(d, t) for d in decodes for t in tokens]


class PromptGraphs:
    """`tables`: the block tables of all rows on the device, [rows, width] int32; the last is the padding row.
    `pool`: the memory that the graphs share with others, which means that a replay overwrites their results.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: DecoderModel,
        attention: AttentionBackend,
        inputs: DeviceInputs,
        tables: Tensor,
        pool: torch.cuda._POOL_HANDLE,
    ) -> None:
        self._model = model
        self._attention = attention
        self._inputs = inputs
        self._tables = tables
        self._pool = pool
        self._padding_row = config.max_num_seqs
        self.sizes = step_sizes(config.max_num_seqs, config.max_num_batched_tokens)
        self._captured: dict[StepSize, _Captured] = {}
        longest = max((size.fields()[-1].stop for size in self.sizes), default=0)
        self._staged = torch.zeros(longest, dtype=torch.int32, device=tables.device)
        self.replays = 0
        self.padded_tokens = 0

    @torch.inference_mode()
    def capture(self, stage: Stage) -> None:
        """Capture all sizes, the largest first, so that the smaller ones fit into the memory it took.

        Each is a part of the stage.
        """
        nothing = np.zeros(0, dtype=np.int64)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for size in sorted(self.sizes, key=lambda size: size.decodes + size.tokens, reverse=True):
            self.send(size, StepArrays(nothing, nothing, nothing, nothing, nothing, nothing, nothing, 0))
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

    def size_for(self, arrays: StepArrays) -> StepSize | None:
        """The smallest size that has room for a step."""
        return next((size for size in self.sizes if size.fits(arrays)), None)

    def send(self, size: StepSize, arrays: StepArrays) -> None:
        """Bring a step's inputs to the graph of this size, which `forward` then replays."""
        staged = size.staged(arrays, self._padding_row)
        self._inputs.stager.send_into(self._staged[: len(staged)], staged)

    def forward(self, size: StepSize, arrays: StepArrays) -> tuple[Tensor, Tensor]:
        """The id and the hidden state of every token of the step: [n], [n, hidden], until the next replay."""
        captured = self._captured[size]
        captured.graph.replay()
        count, decodes = len(arrays.ids), arrays.num_decodes
        self.replays += 1
        self.padded_tokens += size.decodes + size.tokens - count

        def without_padding(padded: Tensor) -> Tensor:
            prompts = padded[size.decodes : size.decodes + count - decodes]
            return torch.cat((padded[:decodes], prompts)) if decodes else prompts

        return without_padding(captured.ids), without_padding(captured.hidden)

    def _step(self, size: StepSize) -> tuple[Tensor, Tensor]:
        ids, rows, positions, slots, context, request_rows, starts = (
            self._staged[field] for field in size.fields()
        )
        ids = torch.where(ids == UNKNOWN, self._inputs.newest[rows], ids)
        blocks = self._tables.index_select(0, request_rows)
        decodes = size.decodes
        segments = SegmentTable(starts, context[decodes:], blocks[decodes:], size.tokens)
        batch = AttentionBatch(positions, slots, decodes, blocks[:decodes], context[:decodes], segments)
        return ids, self._model.forward(ids, self._attention.begin_step(batch))
