"""The kernels of latent attention against plain torch in float32; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from latent_case import LAYERS, LatentCase
from model_tools import relative_error
from triton_interpreter import DEVICE

from microvllm.ops.attention.latent import LatentShape, TorchLatentAttention
from microvllm.ops.attention.triton_latent import LatentTiling, TritonLatentAttention
from microvllm.ops.gpu.operators import GpuOperators

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TILING = LatentTiling(16, 16, 16, 1, 4)


def check(case: LatentCase, tiling: LatentTiling | None = TILING, *, pdl: bool = False) -> None:
    """The output, and the cache, where nothing but this step's slots of this layer may change."""
    backend = TritonLatentAttention(case.config(case.dtype, DEVICE), pdl=pdl, tiling=tiling)
    backend.cache.copy_(case.cache)
    out = backend.begin_step(case.batch(DEVICE, is_gpu=True))(1, case.qkv.to(DEVICE).clone()).cpu()
    cpu = torch.device("cpu")
    reference = TorchLatentAttention(case.config(torch.float32, cpu), torch.float32)
    reference.cache.copy_(case.cache)
    expected = reference.begin_step(case.batch(cpu, is_gpu=False))(1, case.qkv.float())
    padding = torch.tensor(
        [context == 0 for context in case.decodes] + [False] * (case.n - len(case.decodes))
    )
    assert not out[padding].any()
    expected[padding] = 0.0
    assert relative_error(out.float(), expected) < TOLERANCE[case.dtype]
    cache, last = backend.cache.cpu().float(), case.num_blocks - 1
    assert torch.equal(cache[0], case.cache[0].float())
    assert torch.equal(cache[1, last], case.cache[1, last].float())
    assert relative_error(cache[1, :last], reference.cache[1, :last]) < TOLERANCE[case.dtype]


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
    check(LatentCase(SHAPES[name], *STEPS[step]))


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])])
def test_numbers_of_16_bits(dtype: torch.dtype) -> None:
    check(LatentCase(SHAPES["odd sizes"], *STEPS["mixed"], dtype))


def test_a_long_decode_is_shared_by_programs() -> None:
    """Some of them find no key of a shorter one."""
    case = LatentCase(SHAPES["plain"], [700, 20], [])
    backend = TritonLatentAttention(case.config(torch.float32, DEVICE), tiling=TILING)
    assert backend.splits(2, 44) > 1
    check(case)


def test_tiles_fit_into_smaller_shared_memory() -> None:
    shape = replace(SHAPES["plain"], num_heads=128, rank=512, rope_dim=64)
    large, small = (LatentTiling.of(shape, torch.bfloat16, size << 10) for size in (227, 99))
    assert (large.decode_rows, large.segment_rows) == (32, 64)
    assert (small.decode_rows, small.segment_rows) == (16, 16)


def test_the_sizes_of_a_real_model_fit() -> None:
    """The latents of DeepSeek-V3, with the tiles that are chosen for them."""
    shape = replace(SHAPES["plain"], num_heads=16, rank=512, rope_dim=64)
    check(LatentCase(shape, [19], [(3, 30)], torch.float16), None)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter has no programmatic dependent launch")
def test_with_programmatic_dependent_launch() -> None:
    check(LatentCase(SHAPES["odd sizes"], *STEPS["mixed"]), pdl=torch.cuda.get_device_capability() >= (9, 0))


def test_the_operators_have_it() -> None:
    config = LatentCase(SHAPES["plain"], [1], []).config(torch.float32, DEVICE)
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
