"""The kernels of latent attention against plain torch in float32; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_case import segment_table
from model_tools import relative_error
from triton_interpreter import DEVICE

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.attention.latent import LatentConfig, LatentShape, TorchLatentAttention
from microvllm.ops.attention.triton_latent import LatentTiling, TritonLatentAttention
from microvllm.ops.gpu.operators import GpuOperators

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
BLOCK, LAYERS = 16, 2
TILING = LatentTiling(16, 16, 16, 1, 4)


class Case:
    """Random inputs: contexts of decodes, of which 0 is padding, and (new, context) of segments."""

    def __init__(
        self,
        shape: LatentShape,
        decodes: list[int],
        segments: list[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        random = torch.Generator().manual_seed(0)
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

    def check(self, tiling: LatentTiling | None = TILING, *, pdl: bool = False) -> None:
        """The output, and the cache, where nothing but this step's slots of this layer may change."""
        backend = TritonLatentAttention(self.config(self.dtype, DEVICE), pdl=pdl, tiling=tiling)
        backend.cache.copy_(self.cache)
        out = backend.begin_step(self.batch(DEVICE, is_gpu=True))(1, self.qkv.to(DEVICE).clone()).cpu()
        cpu = torch.device("cpu")
        reference = TorchLatentAttention(self.config(torch.float32, cpu), torch.float32)
        reference.cache.copy_(self.cache)
        expected = reference.begin_step(self.batch(cpu, is_gpu=False))(1, self.qkv.float())
        padding = torch.tensor(
            [context == 0 for context in self.decodes] + [False] * (self.n - len(self.decodes))
        )
        assert not out[padding].any()
        expected[padding] = 0.0
        assert relative_error(out.float(), expected) < TOLERANCE[self.dtype]
        cache, last = backend.cache.cpu().float(), self.num_blocks - 1
        assert torch.equal(cache[0], self.cache[0].float())
        assert torch.equal(cache[1, last], self.cache[1, last].float())
        assert relative_error(cache[1, :last], reference.cache[1, :last]) < TOLERANCE[self.dtype]


SHAPES = {
    "plain": LatentShape(LAYERS, 4, 32, 16, 0.2),
    "odd sizes": LatentShape(LAYERS, 9, 20, 12, 0.3, 1.2),
    "one head": LatentShape(LAYERS, 1, 16, 2, 0.2),
    "many heads": LatentShape(LAYERS, 21, 16, 8, 0.2),
}
STEPS = {
    "decodes": ([1, 17, 0, 40, 33], []),
    "segments": ([], [(5, 5), (1, 20), (9, 37), (0, 3)]),
    "mixed": ([18, 0, 3], [(20, 20), (3, 50)]),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SHAPES)
def test_steps(name: str, step: str) -> None:
    Case(SHAPES[name], *STEPS[step]).check()


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])])
def test_numbers_of_16_bits(dtype: torch.dtype) -> None:
    Case(SHAPES["odd sizes"], *STEPS["mixed"], dtype).check()


def test_a_long_decode_is_shared_by_programs() -> None:
    """Some of them find no key of a shorter one."""
    case = Case(SHAPES["plain"], [700, 20], [])
    backend = TritonLatentAttention(case.config(torch.float32, DEVICE), tiling=TILING)
    assert backend.splits(2, 44) > 1
    case.check()


def test_tiles_fit_into_smaller_shared_memory() -> None:
    shape = replace(SHAPES["plain"], num_heads=128, rank=512, rope_dim=64)
    large, small = (LatentTiling.of(shape, torch.bfloat16, size << 10) for size in (227, 99))
    assert (large.decode_rows, large.segment_rows) == (32, 64)
    assert (small.decode_rows, small.segment_rows) == (16, 16)


def test_the_sizes_of_a_real_model_fit() -> None:
    """The latents of DeepSeek-V3, with the tiles that are chosen for them."""
    shape = replace(SHAPES["plain"], num_heads=16, rank=512, rope_dim=64)
    Case(shape, [19], [(3, 30)], torch.float16).check(None)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter has no programmatic dependent launch")
def test_with_programmatic_dependent_launch() -> None:
    Case(SHAPES["odd sizes"], *STEPS["mixed"]).check(pdl=torch.cuda.get_device_capability() >= (9, 0))


def test_the_operators_have_it() -> None:
    config = Case(SHAPES["plain"], [1], []).config(torch.float32, DEVICE)
    assert isinstance(
        GpuOperators(torch.float32, DEVICE, "triton").latent_attention(config), TritonLatentAttention
    )
    with pytest.raises(ValueError, match="flash_attn does not attend to latent keys"):
        GpuOperators(torch.float32, DEVICE, "flash_attn").latent_attention(config)
    with pytest.raises(ValueError, match="--batch-invariant"):
        invariant = GpuOperators(torch.float32, DEVICE, "triton", batch_invariant=True)
        invariant.latent_attention(config)
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8"):
        TritonLatentAttention(replace(config, dtype=torch.float8_e4m3fn))
