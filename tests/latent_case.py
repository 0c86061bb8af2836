"""Steps of latent attention with random inputs, for every backend of it."""

from __future__ import annotations

import torch
from attention_case import segment_table

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.attention.latent import LatentConfig, LatentShape

BLOCK, LAYERS = 16, 2


class LatentCase:
    """Random inputs: contexts of decodes, of which 0 is padding, and (new, context) of segments."""

    def __init__(
        self,
        shape: LatentShape,
        decodes: list[int],
        segments: list[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        contexts = [*decodes, *(context for _, context in segments)]
        counts = [-(-context // BLOCK) for context in contexts]
        free = torch.randperm(sum(counts), generator=random).tolist()
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.num_blocks = sum(counts) + 1
        self.shape, self.dtype, self.decodes, self.segments = shape, dtype, decodes, segments
        self.n = len(decodes) + sum(new for new, _ in segments)
        width = (shape.num_heads + 1) * shape.key_dim
        self.qkv = torch.randn(self.n, width, generator=random).to(dtype)
        self.cache = torch.randn(LAYERS, self.num_blocks, BLOCK, shape.key_dim, generator=random).to(dtype)
        self.inv_freq = 100.0 ** -(torch.arange(0, shape.rope_dim, 2) / shape.rope_dim)
        self.max_position = max(contexts) + 1

    def config(self, dtype: torch.dtype, device: torch.device) -> LatentConfig:
        sizes = self.num_blocks, BLOCK, self.inv_freq.to(device), self.max_position
        return LatentConfig(self.shape, *sizes, dtype)

    def batch(self, device: torch.device, *, is_gpu: bool) -> AttentionBatch:
        index = torch.int32 if is_gpu else torch.int64
        positions, slots = [], []
        news = [min(1, context) for context in self.decodes] + [new for new, _ in self.segments]
        contexts = self.decodes + [context for _, context in self.segments]
        for place, (new, context, table) in enumerate(zip(news, contexts, self.tables, strict=True)):
            if not new and place < len(self.decodes):
                # A padding row writes nothing; plain torch has none, and writes into the padding's block.
                positions.append(0)
                slots.append(-1 if is_gpu else (self.num_blocks - 1) * BLOCK)
            for position in range(context - new, context):
                positions.append(position)
                slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
        count = len(self.decodes)
        width = max((len(table) for table in self.tables[:count]), default=0)
        padded = [table + [0] * (width - len(table)) for table in self.tables[:count]]
        segments = [
            (new, context, table)
            for (new, context), table in zip(self.segments, self.tables[count:], strict=True)
        ]
        return AttentionBatch(
            torch.tensor(positions, dtype=index, device=device),
            torch.tensor(slots, dtype=index, device=device),
            count,
            torch.tensor(padded, dtype=index, device=device).view(count, width),
            torch.tensor(self.decodes, dtype=index, device=device),
            segment_table(segments, device, int32=is_gpu) if segments else None,
        )
