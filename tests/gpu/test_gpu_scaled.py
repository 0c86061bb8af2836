"""Products with 8-bit codes by the copy engine and tensor cores, and by `_scaled_mm`, against float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

from microvllm.ops.activation import silu_and_mul
from microvllm.ops.gpu.levers import VARIABLE, Levers
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.tiling import Tiling
from microvllm.ops.scaled import ScaledTensor, quantize

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and Levers.of(DEVICE).stream),
        reason="needs compute capability 9.0 and Triton 3.6",
    ),
]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
BLOCKS = {"channel": (1, 0), "block": (128, 128), "row-block": (1, 64)}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def scaled(rows: int, columns: int, kind: str, seed: int, activations: str = "none") -> ScaledTensor:
    block = BLOCKS[kind]
    weight = random(rows, columns, seed=seed, dtype=torch.float32)
    codes, scales = quantize(weight * random(rows, 1, seed=seed + 100, dtype=torch.float32).exp() / 9, block)
    return ScaledTensor.of(codes, scales, (block[0], block[1] or columns), activations, 0.03)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rows", [3, 8, 35, 64, 100])
def test_a_streamed_product(rows: int, kind: str, gated: bool, fused: bool) -> None:
    """Sizes that are no multiple of a tile's; one split and several, fewer steps than stages and more."""
    from microvllm.ops.gpu.stream import StreamedWeight

    step = 64 if kind == "row-block" else 128
    cases = [
        (200, 1040, Tiling(64, step, 4, 3, splits=3), torch.bfloat16),
        (72, 2048, Tiling(64, 64, 4, 4, splits=2), torch.bfloat16),
        (104, 96, Tiling(64, 64, 4, 3), torch.float16),
    ]
    for n, k, tiling, dtype in cases:
        x, weight = random(rows, k, seed=1, dtype=dtype), scaled(2 * n if gated else n, k, kind, seed=2)
        bias = random(len(weight), seed=3, dtype=dtype) if fused else None
        residual = random(rows, n, seed=4, dtype=dtype) if fused else None
        expected = linear(
            x.float(), weight.dequantized(torch.float32), None if bias is None else bias.float()
        )
        expected = silu_and_mul(expected) if gated else expected
        expected = expected if residual is None else expected + residual.float()
        arrivals = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
        product = StreamedWeight(weight, arrivals, {}, gated=gated, pdl=True)
        first, *others = (product(x, tiling, bias, residual) for _ in range(3))
        assert relative_error(first, expected) < TOLERANCE[dtype]
        assert all(torch.equal(first, other) for other in others)
        assert not arrivals.any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [8, 35, 100])
def test_a_streamed_product_of_codes(rows: int, gated: bool) -> None:
    """On both sides: the product of what they stand for, added up with fewer bits."""
    from microvllm.ops.gpu.stream import StreamedWeight

    for n, k, tiling in (
        (200, 1040, Tiling(64, 128, 4, 3, splits=3)),
        (72, 2048, Tiling(64, 256, 4, 3)),
    ):
        x, weight = (
            random(rows, k, seed=1, dtype=torch.float32),
            scaled(2 * n if gated else n, k, "channel", 2),
        )
        codes, scales = quantize(x, (1, 0))
        bias, residual = random(len(weight), seed=3), random(rows, n, seed=4)
        expected = linear(codes.float() * scales, weight.dequantized(torch.float32), bias.float())
        expected = (silu_and_mul(expected) if gated else expected) + residual.float()
        arrivals = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
        product = StreamedWeight(weight, arrivals, {}, gated=gated, pdl=True)
        first, *others = (product(codes, tiling, bias, residual, scales, torch.bfloat16) for _ in range(3))
        assert first.dtype == torch.bfloat16
        assert relative_error(first, expected) < 6e-3
        assert all(torch.equal(first, other) for other in others)
        assert not arrivals.any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("rows", [9, 35, 64, 100])
def test_a_streamed_product_of_codes_in_blocks(rows: int, ahead: bool, gated: bool) -> None:
    """Each group of 128 columns of a row has a scale, each block of the weight another."""
    from microvllm.ops.gpu.e4m3 import round_rows
    from microvllm.ops.gpu.stream import StreamedWeight

    for n, k, splits in ((200, 1040, 3), (136, 2048, 1), (192, 1920, 2), (192, 3712, 1)):
        x, weight = random(rows, k, seed=1), scaled(2 * n if gated else n, k, "block", 2)
        codes, scales = round_rows(x, group=128)
        bias, residual = random(len(weight), seed=3), random(rows, n, seed=4)
        rounded = codes.float() * scales.repeat_interleave(128, 1)[:, :k]
        assert relative_error(rounded, x) < 0.03
        expected = linear(rounded, weight.dequantized(torch.float32), bias.float())
        expected = (silu_and_mul(expected) if gated else expected) + residual.float()
        arrivals = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
        product = StreamedWeight(weight, arrivals, {}, gated=gated, pdl=True, ahead=ahead)
        registers = 168 if gated and rows <= 64 else None
        tiling = Tiling(64, 128, 4, 3, splits=splits, max_registers=registers)
        y = product(codes, tiling, bias, residual, scales, torch.bfloat16)
        assert relative_error(y, expected) < 6e-3
        assert not arrivals.any()


@pytest.mark.parametrize("rows", [129, 132, 258, 1000])
@pytest.mark.parametrize(("n", "k"), [(272, 1024), (64, 512), (576, 1536), (272, 1152)])
def test_many_rows_and_blocks(n: int, k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `_scaled_mm` with scales of groups and blocks; 1,152 are nine blocks of columns: widened."""
    from microvllm.ops.gpu.e4m3 import round_rows

    monkeypatch.delenv(VARIABLE, raising=False)
    x, norm, bias = random(rows, k, seed=1), random(k, seed=2), random(n, seed=3)
    weight, residual = scaled(n, k, "block", 4, "token"), random(rows, n, seed=5)
    ops = GpuOperators(torch.bfloat16, DEVICE, "triton")
    plain = x.float() * (x.float().square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm.float()
    inputs = []
    for gain, wide in ((norm, plain), (None, x.float())):
        codes, scales = round_rows(x, group=128, norm=gain, eps=1e-5)
        rounded = codes.float() * scales.repeat_interleave(128, 1)[:, :k]
        inputs.append(rounded if k % 512 == 0 else wide)
    matrix = weight.dequantized(torch.float32)
    normed = linear(inputs[0], matrix, bias.float())
    assert relative_error(ops.norm_linear(norm, 1e-5, weight, bias)(x), normed) < 8e-3
    added = linear(inputs[1], matrix) + residual.float()
    y = ops.linear(weight)(x, residual.clone())
    assert y.is_contiguous() and relative_error(y, added) < 8e-3
    gated = silu_and_mul(linear(inputs[0], matrix))
    assert relative_error(ops.norm_gate_up(norm, 1e-5, weight)(x), gated) < 2e-2


@pytest.mark.parametrize("activations", ["none", "token", "tensor"])
@pytest.mark.parametrize("rows", [20, 129, 1000])
def test_a_product_of_many_rows(rows: int, activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded activations cost about what rounded weights cost; without them it is the exact product."""
    n, k = 272, 1040
    x, norm, bias = random(rows, k, seed=1), random(k, seed=2), random(n, seed=3)
    weight, residual = scaled(n, k, "channel", 4, activations), random(rows, n, seed=5)
    normed = x.float() * (x.float().square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm.float()
    expected = linear(normed, weight.dequantized(torch.float32), bias.float())
    ops = GpuOperators(torch.bfloat16, DEVICE, "triton")
    error = relative_error(ops.norm_linear(norm, 1e-5, weight, bias)(x), expected)
    print(f"{rows} rows, {activations}: {error:.4f}")
    assert error < (5e-3 if activations == "none" else 0.04)
    if activations == "tensor":
        scale = weight.input_scale
        rounded = (normed / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    elif activations == "token":
        scales = normed.abs().amax(1, keepdim=True) / 448
        rounded = (normed / scales).to(torch.float8_e4m3fn).float() * scales
    else:
        rounded = normed
    of_rounded = linear(rounded, weight.dequantized(torch.float32), bias.float())
    found = relative_error(ops.norm_linear(norm, 1e-5, weight, bias)(x), of_rounded)
    print(f"{rows} rows, {activations}: {found:.4f} beside the same rounding in float32")
    assert found < 8e-3
    added = ops.linear(weight, bias)(x, residual.clone())
    plain = linear(x.float(), weight.dequantized(torch.float32), bias.float()) + residual.float()
    assert relative_error(added, plain) < (5e-3 if activations == "none" else 0.04)
    monkeypatch.setenv(VARIABLE, "w8a8")
    exact = GpuOperators(torch.bfloat16, DEVICE, "triton").norm_linear(norm, 1e-5, weight, bias)(x)
    assert relative_error(exact, expected) < 6e-3
