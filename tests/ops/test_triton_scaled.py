"""Products with 8-bit codes and scales on a GPU against float32; interpreted where there is no GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

from microvllm.ops.activation import silu_and_mul
from microvllm.ops.gpu import scaled as scaled_products
from microvllm.ops.gpu.e4m3 import round_rows, widen
from microvllm.ops.gpu.levers import Levers
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.scaled import ScaledProduct
from microvllm.ops.gpu.scaled_gemv import scaled_gemv
from microvllm.ops.gpu.scaled_skinny import scaled_skinny
from microvllm.ops.gpu.skinny import MAX_SPLIT_TILES
from microvllm.ops.gpu.tiling import MAX_STREAMED_ROWS, Tiling
from microvllm.ops.norm import rms_norm
from microvllm.ops.scaled import ScaledTensor, expand, quantize

# As in test_triton_ops.py: of a result that is rounded once, after sums in float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
BLOCKS = {"channel": (1, 0), "block": (32, 32), "row-block": (1, 32)}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|a - b| / |b|; NaN is infinite."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return math.inf if math.isnan(error) else error


def scaled(rows: int, columns: int, kind: str, seed: int) -> ScaledTensor:
    """Rows of very different sizes, so that a wrong scale is seen."""
    block = BLOCKS[kind]
    weight = random(rows, columns, seed=seed) * random(rows, 1, seed=seed + 100).exp()
    codes, scales = quantize(weight, block)
    return ScaledTensor.of(codes, scales, (block[0], block[1] or columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_a_product(rows: int, fused: bool, gated: bool, kind: str, dtype: torch.dtype) -> None:
    """Sizes that are no multiple of a tile's or of a block's; fused: with norm, bias and residual."""
    n, k = 45, 88
    x, weight = random(rows, k, seed=1, dtype=dtype), scaled(2 * n if gated else n, k, kind, seed=2)
    bias = norm = residual = None
    reference = x.float()
    if fused:
        bias = random(weight.shape[0], seed=3, dtype=dtype)
        residual = random(rows, n, seed=5, dtype=dtype)
    if fused and rows <= 2:
        norm = random(k, seed=4, dtype=dtype)
        reference = rms_norm(reference, norm.float(), 1e-3)
    reference = linear(reference, weight.dequantized(torch.float32), None if bias is None else bias.float())
    reference = silu_and_mul(reference) if gated else reference
    reference = reference if residual is None else reference + residual.float()
    if rows <= 2:
        y = scaled_gemv(x, weight, bias, norm, 1e-3, residual, Tiling(4, 64, 4), gated=gated)
    else:
        arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
        tiling = Tiling(16, 32, 4, 2, splits=2 if fused else 1)
        y = scaled_skinny(x, weight, arrivals, bias, residual, tiling, gated=gated)
        assert not arrivals.any()
    assert y.dtype == dtype and y.shape == (rows, n)
    assert relative_error(y, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_is_widened(kind: str, dtype: torch.dtype) -> None:
    weight = scaled(45, 88, kind, seed=1)
    assert torch.equal(widen(weight, dtype), weight.dequantized(dtype))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("scale", [None, 0.01])
def test_rows_are_rounded(scale: float | None, normed: bool) -> None:
    """Each by its largest, one of zeros too, or all by one scale, which cuts off what is beyond."""
    x, norm = random(5, 88, seed=1) * 3, random(88, seed=2)
    x[3] = 0.0
    codes, scales = round_rows(x, scale, norm=norm if normed else None, eps=1e-3)
    expected = rms_norm(x, norm, 1e-3) if normed else x
    wanted = (
        torch.full((5, 1), scale) if scale else expected.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    )
    assert torch.allclose(scales, wanted.to(DEVICE), rtol=1e-6)
    rounded = (expected / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    found = codes.float()
    if DEVICE.type == "cpu":
        # The interpreter loses the carry of what is rounded up to a power of two.
        carries = (found * 2 == rounded) & (rounded != 0)
        assert carries.sum() < 0.03 * carries.numel() and (rounded[carries].abs().log2() % 1 == 0).all()
        found[carries] *= 2
    # Where the last bit of a norm or of a quotient differs, a code may be the next one.
    assert (found != rounded).float().mean() < 0.02
    assert relative_error(found * scales, rounded * scales) < 0.01


@pytest.mark.parametrize(("columns", "normed"), [(88, True), (128, True), (300, True), (4200, False)])
def test_groups_of_columns_are_rounded(columns: int, normed: bool) -> None:
    x, norm = random(3, columns, seed=1), random(columns, seed=2) if normed else None
    codes, scales = round_rows(x, group=64, norm=norm, eps=1e-3)
    expected = x if norm is None else rms_norm(x, norm, 1e-3)
    groups = -(-columns // 64)
    padded = torch.nn.functional.pad(expected, (0, groups * 64 - columns)).view(3, groups, 64)
    assert scales.stride() == (1, 3)
    assert torch.allclose(scales, padded.abs().amax(2) / 448, rtol=1e-5)
    values = codes.float() * scales.repeat_interleave(64, 1)[:, :columns]
    # The interpreter loses the carry of what is rounded up to a power of two.
    near = (values - expected).abs() < 0.07 * expected.abs() + scales.max() * 2**-9
    assert near.float().mean() > (0.999 if DEVICE.type == "cuda" else 0.95)


@pytest.mark.parametrize("group", [0, 64])
def test_copies_of_the_last_row_fill_rows_up(group: int) -> None:
    x = random(5, 192, seed=1)
    codes, scales = round_rows(x, group=group, multiple=4)
    plain, plain_scales = round_rows(x, group=group)
    assert codes.shape == (8, 192) and (group == 0 or scales.stride() == (1, 8))
    for found, wanted in ((codes.float(), plain.float()), (scales, plain_scales)):
        assert torch.equal(found[:5], wanted) and torch.equal(found[5:], wanted[4:].expand(3, -1))


def scaled_mm_of_blocks(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: Any) -> Tensor:
    """`torch._scaled_mm` by its definition in float32, of what cuBLAS takes with scales of blocks."""
    (m, k), n = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn and a.is_contiguous() and b.t().is_contiguous()
    assert m % 4 == 0 and k % 512 == 0 and n % 16 == 0
    assert scale_a.shape == (m, k // 128) and scale_a.stride() == (1, m)
    assert scale_b.shape == (k // 128, -(-n // 128)) and scale_b.stride(0) == 1
    wide = expand(scale_b.t(), (128, 128), n, k)
    rows = a.float() * expand(scale_a, (1, 128), m, k)
    return (rows @ (b.t().float() * wide).t()).to(out_dtype)


@pytest.mark.parametrize(
    ("rows", "columns", "lever", "expected"),
    [
        (6, 512, True, True),
        (6, 512, False, False),
        (6, 640, True, False),  # five blocks of columns
        (0, 512, True, False),
    ],
)
def test_many_rows_and_blocks_of_codes(
    rows: int, columns: int, lever: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded by groups, with norm, bias, SwiGLU and residual, where torch multiplies them; else widened."""
    called = []

    def multiply(*given: Tensor, **options: Any) -> Tensor:
        called.append(given)
        return scaled_mm_of_blocks(*given, **options)

    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    monkeypatch.setattr(scaled_products, "_cuda_version", lambda: (13, 0))
    monkeypatch.setattr(scaled_products, "MAX_STREAMED_ROWS", 4)
    weight = random(288, columns, seed=2) * random(288, 1, seed=3).exp() / 16
    made = ScaledTensor.of(*quantize(weight, (128, 128)), (128, 128), "token")
    x, norm, bias = (random(*shape, seed=4).bfloat16() for shape in ((rows, columns), (columns,), (288,)))
    arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    levers = Levers(w8a8=True, block_w8a8=lever)
    options: dict[str, Any] = {"norm": norm, "eps": 1e-3, "pdl": False}
    y = ScaledProduct(made, bias, arrivals, levers, gated=True, **options)(x)
    normed = rms_norm(x.float(), norm.float(), 1e-3)
    if expected:
        codes, scales = round_rows(x, group=128, norm=norm, eps=1e-3)
        normed = codes.float() * expand(scales, (1, 128), *codes.shape)
    product = linear(normed, made.dequantized(torch.float32), bias.float())
    assert y.shape == (rows, 144) and bool(called) == expected
    # The interpreter cuts numbers off to bfloat16, a norm's and an activation's.
    if rows:
        assert relative_error(y, silu_and_mul(product)) < 0.02
    residual = random(rows, 288, seed=5).bfloat16()
    added = residual.float()
    y = ScaledProduct(made, bias, arrivals, levers, **options)(x, residual)
    assert y.is_contiguous() and len(called) == 2 * expected
    if rows:
        assert relative_error(y, product + added) < 0.02


def test_batch_invariance_keeps_no_matrix_in_codes() -> None:
    """How many rows run together decides whether they are rounded, by default of blocks of weights, too."""
    assert Levers().packed and not GpuOperators(torch.bfloat16, DEVICE, "triton", batch_invariant=True).packed


@pytest.mark.parametrize("activations", ["none", "token"])
@pytest.mark.parametrize("rows", [1, 2, 6, MAX_STREAMED_ROWS + 1])
def test_what_a_decoder_calls(rows: int, activations: str) -> None:
    """Whichever way a number of rows goes, with the tilings that are chosen for it."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    ops, hidden, width = GpuOperators(dtype, DEVICE, "triton"), 96, 64
    assert ScaledTensor in ops.packed
    # A product of codes on both sides rounds x to 4 bits.
    rounds = DEVICE.type == "cuda" and rows > MAX_STREAMED_ROWS and activations == "token"
    tolerance = 0.06 if rounds else TOLERANCE[dtype]
    x, norm = random(rows, hidden, seed=1, dtype=dtype), random(hidden, seed=2, dtype=dtype)
    up, down = scaled(2 * width, hidden, "channel", seed=3), scaled(hidden, width, "channel", seed=4)
    up.activations = down.activations = activations
    bias = random(2 * width, seed=5, dtype=dtype)
    before = x.clone()
    normed = rms_norm(x.float(), norm.float(), 1e-5)
    plain = linear(normed, up.dequantized(torch.float32), bias.float())
    assert relative_error(ops.norm_linear(norm, 1e-5, up, bias)(x), plain) < tolerance
    act = ops.norm_gate_up(norm, 1e-5, up)(x)
    assert relative_error(act, silu_and_mul(linear(normed, up.dequantized(torch.float32)))) < 2 * tolerance
    assert torch.equal(x, before)
    product = linear(act.float(), down.dequantized(torch.float32))
    assert relative_error(ops.linear(down)(act), product) < tolerance
    assert relative_error(ops.linear(down)(act, x.clone()), product + x.float()) < tolerance
    assert ops.linear(down)(act[:0]).shape == (0, hidden)


@pytest.mark.parametrize("columns", [100, 8])
def test_blocks_that_no_kernel_of_few_rows_takes(columns: int) -> None:
    """They are widened; as are columns of a block that are no power of two."""
    weight = random(40, 200, seed=2)
    codes, scales = quantize(weight, (16, columns))
    made = ScaledTensor.of(codes, scales, (16, columns))
    x = random(3, 200, seed=1)
    ops = GpuOperators(torch.float32, DEVICE, "triton")
    assert relative_error(ops.linear(made)(x), linear(x, made.dequantized(torch.float32))) < 1e-5
