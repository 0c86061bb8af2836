"""Batch-invariant kernels: right everywhere, and on a GPU with the same bits for a row in any company."""

from __future__ import annotations

import pytest
import torch
from attention_case import Case, relative_error
from torch import Tensor
from torch.nn.functional import linear
from triton_interpreter import DEVICE

from microvllm.ops.attention import AttentionShape
from microvllm.ops.attention.triton_backend import TritonAttention
from microvllm.ops.attention.triton_prefill import PrefillTiling
from microvllm.ops.gpu.fixed_order import FEW, MANY, fixed_order_linear
from microvllm.ops.gpu.skinny import MAX_SPLIT_TILES

ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="the interpreter's sums are numpy's")


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def arrivals() -> Tensor:
    return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, FEW.rows, FEW.rows + 1, MANY.rows + 3])
@pytest.mark.parametrize(("n", "k"), [(70, 1100), (13, 88)])
def test_a_product(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    """Sizes that are no multiple of a tile's, in one run and in several."""
    x, weight = random(rows, k, seed=1, dtype=dtype), random(n, k, seed=2, dtype=dtype)
    bias, residual = random(n, seed=3, dtype=dtype), random(rows, n, seed=4, dtype=dtype)
    counters = arrivals()
    plain = linear(x.float(), weight.float())
    assert relative_error(fixed_order_linear(x, weight, counters), plain) < TOLERANCE[dtype]
    both = fixed_order_linear(x, weight, counters, bias, residual)
    assert relative_error(both, plain + bias.float() + residual.float()) < TOLERANCE[dtype]
    assert not counters.any()


def test_no_rows() -> None:
    weight = random(8, 64, seed=1, dtype=torch.float32)
    assert fixed_order_linear(weight[:0], weight, arrivals()).shape == (0, 8)


@only_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (1024, 3072), (3584, 18944), (70, 1100), (20000, 1024)])
def test_a_row_of_a_product_keeps_its_bits(n: int, k: int, dtype: torch.dtype) -> None:
    """Sums of terms of very different size, so that another order shows."""
    x = random(300, k, seed=1, dtype=dtype) * torch.logspace(-2, 2, k, device=DEVICE).to(dtype)
    weight, bias = random(n, k, seed=2, dtype=dtype), random(n, seed=3, dtype=dtype)
    counters = arrivals()
    together = fixed_order_linear(x, weight, counters, bias)
    for rows in (1, 2, 7, 63, 64, 65, 129, 257):
        for first in (0, 300 - rows):
            part = x[first : first + rows].contiguous()
            found = fixed_order_linear(part, weight, counters, bias)
            assert torch.equal(found, together[first : first + rows]), rows


SHAPES = {
    "grouped": AttentionShape(2, 7, 1, 64),
    "window": AttentionShape(2, 4, 2, 32, 24),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else [])], ids=str)
def test_attention_of_a_mixed_step(shape: str, dtype: torch.dtype) -> None:
    decodes, segments = [50, 1, 0, 17, 2], [(3, 40), (0, 20), (0, 0), (7, 21), (2, 2)]
    case = Case(SHAPES[shape], 16, decodes, segments, dtype, with_norms=True)
    backend = TritonAttention(
        case.config(DEVICE), prefill_tiling=PrefillTiling(16, 16, 2, 4), fixed_order=True
    )
    backend.cache.copy_(case.cache)
    out = backend.begin_step(case.batch(DEVICE, int32=True))(1, case.qkv.to(DEVICE))
    expected, cache = case.expected(1)
    assert relative_error(out, expected) < (1.5e-2 if dtype is torch.bfloat16 else 1e-5)
    assert not out[2].any(), "a row that only pads"
    assert relative_error(backend.cache, cache) < (1.5e-2 if dtype is torch.bfloat16 else 1e-5)
