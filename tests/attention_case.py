"""One mixed step for an attention backend under test and for the torch backend in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, AttentionConfig, AttentionShape, QKNorms, SegmentTable
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.pages import CachePages, LayerPages
from microvllm.ops.attention.torch_backend import TorchAttention


def segment_table(
    segments: list[tuple[int, int, list[int]]], device: str | torch.device = "cpu", *, int32: bool = False
) -> SegmentTable:
    """Of (new tokens, context length, blocks) of each."""
    index = torch.int32 if int32 else torch.int64
    lengths = [new for new, _, _ in segments]
    width = max((len(blocks) for _, _, blocks in segments), default=0)
    padded = [blocks + [0] * (width - len(blocks)) for _, _, blocks in segments]
    return SegmentTable(
        torch.tensor([0, *accumulate(lengths)], dtype=index, device=device),
        torch.tensor([context for _, context, _ in segments], dtype=index, device=device),
        torch.tensor(padded, dtype=index, device=device).view(len(segments), width),
        max(lengths, default=0),
    )


@dataclass
class Sequence:
    """`new` tokens of a sequence of `context`, in `blocks`; (0, 0) pads a captured batch."""

    new: int
    context: int
    blocks: list[int] = field(default_factory=list)


class Case:
    """Random inputs, exact in `dtype`: contexts of the decodes, (new, context) of the segments.

    The cache is of `cache_dtype`, the same if not given. qkv: [n, (heads + 2 * kv_heads) * d]; cache:
    [layers, 2, blocks, kv_heads, block_size, d]; the last block of the pool is the only one that no sequence
    has.
    """

    def __init__(
        self,
        shape: AttentionShape,
        block_size: int,
        decodes: list[int],
        segments: list[tuple[int, int]],
        dtype: torch.dtype,
        *,
        with_norms: bool = False,
        with_sinks: bool = False,
        scales: tuple[KVScales, ...] = (),
        cache_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def rounded(*size: int) -> Tensor:
            return torch.randn(*size, generator=random).to(dtype)

        self.shape, self.block_size, self.dtype = shape, block_size, dtype
        self.decodes = [Sequence(min(1, context), context) for context in decodes]
        self.segments = [Sequence(new, context) for new, context in segments]
        sequences = self.decodes + self.segments
        self.num_blocks = sum(-(-s.context // block_size) for s in sequences) + 1
        free = torch.randperm(self.num_blocks - 1, generator=random).tolist()
        for sequence in sequences:
            sequence.blocks = [free.pop() for _ in range(-(-sequence.context // block_size))]
        dim, kv_heads = shape.head_dim, shape.num_kv_heads
        self.num_tokens = len(decodes) + sum(new for new, _ in segments)
        self.qkv = rounded(self.num_tokens, (shape.num_heads + 2 * kv_heads) * dim)
        self.cache_dtype, self.scales = cache_dtype or dtype, scales
        self.cache = rounded(shape.num_layers, 2, self.num_blocks, kv_heads, block_size, dim)
        self.cache = self.cache.to(self.cache_dtype)
        self.inv_freq = 100.0 ** -(torch.arange(0, dim, 2) / dim)
        self.max_position = max(s.context for s in sequences) + 1
        weights = [(rounded(dim) * 0.2 + 1, rounded(dim) * 0.2 + 1) for _ in range(shape.num_layers)]
        self.norms = QKNorms(tuple(weights), 1e-3) if with_norms else None
        # From those that take nothing to those that take nearly all.
        sinks = (torch.randn(shape.num_heads, generator=random) * 4 for _ in range(shape.num_layers))
        self.sinks = tuple(sinks) if with_sinks else ()

    def norms_on(self, device: str | torch.device, dtype: torch.dtype) -> QKNorms | None:
        if self.norms is None:
            return None
        pairs = ((q.to(device, dtype), k.to(device, dtype)) for q, k in self.norms.weights)
        return QKNorms(tuple(pairs), self.norms.eps)

    def config(
        self, device: str | torch.device = "cpu", norms_dtype: torch.dtype | None = None
    ) -> AttentionConfig:
        """For a backend on the device whose cache is of this case's dtype."""
        return AttentionConfig(
            self.shape,
            self.num_blocks,
            self.block_size,
            self.inv_freq.to(device),
            self.max_position,
            self.cache_dtype,
            self.norms_on(device, norms_dtype or self.dtype),
            self.scales,
            tuple(sink.to(device) for sink in self.sinks),
        )

    def batch(self, device: str | torch.device, *, int32: bool = False) -> AttentionBatch:
        """With the padding; the indices are int32 if asked for, else as on a CPU."""
        index = torch.int32 if int32 else torch.int64

        def tensor(values: list[int] | list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=index, device=device)

        positions, slots = [], []
        for sequence in self.decodes + self.segments:
            for at in range(sequence.context - sequence.new, sequence.context):
                positions.append(at)
                block = sequence.blocks[at // self.block_size]
                slots.append(block * self.block_size + at % self.block_size)
            if any(sequence is s for s in self.decodes) and not sequence.context:
                positions.append(0)
                slots.append(-1)
        width = max((len(s.blocks) for s in self.decodes), default=0) + 2
        padding = [self.num_blocks - 1] * width
        return AttentionBatch(
            tensor(positions),
            tensor(slots),
            len(self.decodes),
            tensor([(s.blocks + padding)[:width] for s in self.decodes]).view(-1, width),
            tensor([s.context for s in self.decodes]),
            segment_table([(s.new, s.context, s.blocks) for s in self.segments], device, int32=int32),
        )

    def behind_windows(self) -> list[int]:
        """Blocks of the tables that no token of the step sees."""
        window = self.shape.window or self.max_position
        found = []
        for sequence in self.decodes + self.segments:
            first = max(0, sequence.context - sequence.new - window + 1) // self.block_size
            found += sequence.blocks[:first]
        return found

    def expected(self, layer: int) -> tuple[Tensor, Tensor]:
        """The torch backend's output in float32, zeros for padding, [n, heads * d]; and its cache."""
        shape = self.shape
        config = self.config(norms_dtype=torch.float32)
        if self.cache_dtype == self.dtype:
            config = replace(config, dtype=torch.float32)
        backend = TorchAttention(config, torch.float32)
        layers, kv_heads = shape.num_layers, shape.num_kv_heads
        cache = self.cache.transpose(2, 3).reshape(layers, 2 * kv_heads, -1, *self.cache.shape[-2:])
        backend.cache = cache.to(config.dtype).contiguous()
        batch = self.batch("cpu")
        real = torch.ones(self.num_tokens, dtype=torch.bool)
        real[: batch.num_decodes] = batch.decode_lens > 0
        padding = int((~real).sum())
        kept = AttentionBatch(
            batch.positions[real],
            batch.slots[real],
            batch.num_decodes - padding,
            batch.decode_blocks[real[: batch.num_decodes]],
            batch.decode_lens[real[: batch.num_decodes]],
            batch.segment_table,
        )
        out = torch.zeros(self.num_tokens, shape.num_heads * shape.head_dim)
        if real.any():
            out[real] = backend.begin_step(kept)(layer, self.qkv.float()[real])
        return out, backend.cache.view(
            layers, 2, kv_heads, self.num_blocks, *self.cache.shape[-2:]
        ).transpose(2, 3)


def check_in_pages(case: Case, make: Callable[[AttentionConfig], Any], batch: AttentionBatch) -> None:
    """The same bits in pages in which other layers lie, too; nothing of these changes."""
    plain, places = case.config(batch.slots.device), (2, 0)
    shape, dim = case.shape, case.shape.head_dim
    slot = 2 * (shape.num_kv_heads + 1) * dim
    sizes = plain.num_blocks, plain.block_size, 3 * slot + dim
    pages = CachePages(*sizes, is_uniform=False, dtype=plain.dtype, device=plain.inv_freq.device)
    backends = make(plain), make(replace(plain, pages=LayerPages(pages, slot, places)))
    expected, shared = (backend.cache for backend in backends)
    expected.copy_(torch.randn(expected.shape, generator=torch.Generator().manual_seed(4)))
    whole = pages.blocks(dim, 1, (plain.block_size, dim))
    whole.copy_(torch.full(whole.shape, 99.0))
    for layer, place in enumerate(places):
        shared[place].copy_(expected[layer])
    before = (whole.float() == 99).sum()
    for layer, place in enumerate(places):
        qkv = case.qkv.to(batch.slots.device)
        one, other = (backend.begin_step(batch)(layer, qkv.clone()) for backend in backends)
        assert torch.equal(one, other)
        assert torch.equal(shared[place].float(), expected[layer].float())
    assert (whole.float() == 99).sum() == before


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """‖ours - reference‖ / ‖reference‖ in float32; NaN if anything is."""
    difference = (ours.float().cpu() - reference.float().cpu()).norm()
    return float(difference / reference.float().cpu().norm().clamp(min=1e-6))
