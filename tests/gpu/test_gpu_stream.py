"""Products by the copy engine and tensor cores (`ops.gpu.stream`) against float32, and when they are used."""

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
from microvllm.ops.gpu.tunings import STREAM

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and Levers.of(DEVICE).stream),
        reason="needs compute capability 9.0 and Triton 3.6",
    ),
]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check(m: int, n: int, k: int, tiling: Tiling, dtype: torch.dtype, *, gated: bool, fused: bool) -> None:
    """fused: with bias and residual. Three calls give the same bits and leave no arrivals behind."""
    from microvllm.ops.gpu.stream import StreamedWeight

    x, weight = random(m, k, seed=1, dtype=dtype), random(2 * n if gated else n, k, seed=2, dtype=dtype) / 9
    bias = random(len(weight), seed=3, dtype=dtype) if fused else None
    residual = random(m, n, seed=4, dtype=dtype) if fused else None
    expected = linear(x.float(), weight.float(), None if bias is None else bias.float())
    expected = silu_and_mul(expected) if gated else expected
    expected = expected if residual is None else expected + residual.float()
    arrivals = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    for pdl in (False, True):
        product = StreamedWeight(weight, arrivals, {}, gated=gated, pdl=pdl)
        first, *others = (product(x, tiling, bias, residual) for _ in range(3))
        assert relative_error(first, expected) < TOLERANCE[dtype]
        assert all(torch.equal(first, other) for other in others)
    assert not arrivals.any()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 9, 35, 64])
def test_a_streamed_product(rows: int, gated: bool, fused: bool) -> None:
    """Sizes that are no multiple of a tile's; one split and several, fewer steps than stages and more."""
    for n, k, tiling in (
        (104, 88, Tiling(64, 64, 4, 4)),
        (200, 1032, Tiling(64, 128, 4, 3, splits=3)),
        (200, 1032, Tiling(128, 64, 8, 2, splits=100)),
        (72, 2048, Tiling(64, 64, 4, 5, splits=2)),
    ):
        check(rows, n, k, tiling, torch.bfloat16, gated=gated, fused=fused)
    check(rows, 136, 520, Tiling(64, 64, 4, 3, splits=2), torch.float16, gated=gated, fused=fused)


def test_every_tiling_of_this_device() -> None:
    tilings = STREAM.get(torch.cuda.get_device_name(DEVICE), {})
    if not tilings:
        pytest.skip("none was measured on this device")
    for (n, k, gated), by_rows in tilings.items():
        for rows, tiling in by_rows.items():
            if tiling is None:
                continue
            check(rows, min(n, 1024), k, tiling, torch.bfloat16, gated=gated, fused=not gated)


def test_a_decoder_uses_them_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the other kernels, with the same result; and not where they are switched off."""
    monkeypatch.setitem(
        STREAM,  # type: ignore[arg-type]
        torch.cuda.get_device_name(DEVICE),
        {(64, 96, True): {2: None, 4: Tiling(64, 64, 4, 2)}},
    )
    norm, weight = random(96, seed=1, dtype=torch.bfloat16), random(128, 96, seed=2, dtype=torch.bfloat16)
    x = random(3, 96, seed=3, dtype=torch.bfloat16)
    product = GpuOperators(torch.bfloat16, DEVICE, "triton").norm_gate_up(norm, 1e-5, weight)
    monkeypatch.setenv(VARIABLE, "stream")
    other = GpuOperators(torch.bfloat16, DEVICE, "triton").norm_gate_up(norm, 1e-5, weight)
    streamed = product._streamed  # type: ignore[attr-defined]
    assert [rows for rows in range(7) if streamed.tiling(rows)] == [3, 4]
    assert other._streamed is None  # type: ignore[attr-defined]
    assert relative_error(product(x), other(x)) < 1e-2
