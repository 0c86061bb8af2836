"""Products with codes of 4 and 8 bits on a GPU against float32; interpreted where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

from microvllm.ops.activation import silu_and_mul
from microvllm.ops.coded import NARROW_PLANE, PLANE, CodedTensor, pack
from microvllm.ops.gpu import coded as products
from microvllm.ops.gpu.coded_gemv import coded_gemv
from microvllm.ops.gpu.coded_skinny import coded_skinny, widened
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.skinny import MAX_SPLIT_TILES
from microvllm.ops.gpu.tiling import MAX_CODED_ROWS, MAX_GATED_CODED_ROWS, Tiling
from microvllm.ops.norm import rms_norm

# As in test_triton_scaled.py.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|a - b| / |b|; NaN is infinite."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return math.inf if math.isnan(error) else error


def codes_of(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)


def coded(rows: int, columns: int, bits: int, group: int, *, zeros: bool | str, seed: int) -> CodedTensor:
    """Groups of very different scales, so that a wrong one is seen; zeros: or "offsets"."""
    groups = -(-columns // group)
    points = codes_of(groups, rows, bits, seed + 2).to(DEVICE) if zeros else None
    if zeros == "offsets":
        points = random(groups, rows, seed=seed + 3) * 0.05
    scales = (random(groups, rows, seed=seed + 1).exp() * (0.1 / (1 << bits))).half()
    plane = NARROW_PLANE if group % PLANE and group < columns else PLANE
    words = pack(codes_of(rows, columns, bits, seed).to(DEVICE), bits, plane)
    return CodedTensor.of(words, bits, columns, group, scales, points, plane=plane)


@pytest.mark.parametrize("plane", [PLANE, NARROW_PLANE])
@pytest.mark.parametrize(("bits", "columns"), [(4, 7), (4, 256), (4, 300), (8, 128), (8, 129), (8, 31)])
def test_codes_are_where_they_are_said_to_be(bits: int, columns: int, plane: int) -> None:
    """A thread of a warp has four words of a block together: of two rows 8 apart, two neighbours each."""
    codes, places = codes_of(32, columns, bits, 1), 32 // bits
    words = pack(codes, bits, plane)
    runs = -(-columns // (plane * places))
    assert words.shape == (32, runs * plane) and words.dtype == torch.int32
    fragments = words.view(2, runs, plane // 8, 32, 4)
    for row in (0, 7, 8, 21, 31):
        for column in range(columns):
            run, word = column // (plane * places), column % plane
            thread = row % 8 * 4 + word % 8 // 2
            found = fragments[row // 16, run, word // 8, thread, row % 16 // 8 * 2 + word % 2].long()
            assert found >> bits * (column // plane % places) & (1 << bits) - 1 == codes[row, column]
    plain = CodedTensor.of(words, bits, columns, columns, torch.ones(1, 32), plane=plane)
    assert plain.dequantized(torch.float32).equal(codes.float() - (1 << bits - 1))


def test_values_are_those_of_the_definition() -> None:
    """Also in another order of columns."""
    codes, order = codes_of(16, 5, 4, 1), torch.tensor([3, 0, 4, 1, 2])
    scales, zeros = random(3, 16, seed=1).cpu(), codes_of(3, 16, 4, 2)
    tensor = CodedTensor.of(pack(codes, 4), 4, 5, 2, scales, zeros, order)
    values = tensor.dequantized(torch.float32)
    for row in range(16):
        for at, column in enumerate(order.tolist()):
            expected = (codes[row, at].float() - zeros[at // 2, row].float()) * scales[at // 2, row]
            assert values[row, column] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "zeros"),
    [
        (4, 128, False),
        (4, 32, True),
        (4, 1000, True),
        (8, 64, False),
        (8, 1000, True),
        (4, 32, "offsets"),
        (4, 1000, "offsets"),
        (8, 16, False),
        (4, 16, "offsets"),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (5, 2), (33, 1), (70, 2)])
def test_a_product(
    rows: int, splits: int, gated: bool, bits: int, group: int, zeros: bool | str, dtype: torch.dtype
) -> None:
    """Sizes that are no multiple of a tile's, of a step's or of a group's."""
    n, k = 48, 350
    x = random(rows, k, seed=1, dtype=dtype)
    weight = coded(2 * n if gated else n, k, bits, group, zeros=zeros, seed=2)
    bias = random(weight.shape[0], seed=3, dtype=dtype)
    residual = None if gated else random(rows, n, seed=4, dtype=dtype)
    expected = linear(x.float(), weight.dequantized(torch.float32), bias.float())
    expected = silu_and_mul(expected) if gated else expected + random(rows, n, seed=4, dtype=dtype).float()
    arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    tiling = Tiling(64 if DEVICE.type == "cuda" else 16, 0, 4, 3, splits)
    y = coded_skinny(x, weight, arrivals, bias, residual, tiling, gated=gated)
    assert y.dtype == dtype and relative_error(y, expected) < TOLERANCE[dtype]
    assert not arrivals.any()
    if zeros is True and rows > 16:  # only when bytes come
        residual = None if gated else random(rows, n, seed=4, dtype=dtype)
        fetched = coded_skinny(x, weight, arrivals, bias, residual, tiling, gated=gated, fetch=True)
        assert torch.equal(fetched, y)


@pytest.mark.parametrize("dtype", [DTYPES[-1]], ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "zeros"),
    [(4, 128, False), (4, 32, True), (4, 1000, True), (8, 64, False), (4, 16, "offsets")],
)
@pytest.mark.parametrize(("gated", "rows", "parts", "ahead"), [(True, 1, 4, 2), (False, 2, 2, 1)])
def test_a_product_of_whole_sums(
    gated: bool,
    rows: int,
    parts: int,
    ahead: int,
    bits: int,
    group: int,
    zeros: bool | str,
    dtype: torch.dtype,
) -> None:
    """By `coded_gemv`: rows that a tile has too many of, and parts without words."""
    n, k = 48, 700
    x = random(rows, k, seed=1, dtype=dtype)
    weight = coded(2 * n if gated else n, k, bits, group, zeros=zeros, seed=2)
    bias = random(weight.shape[0], seed=3, dtype=dtype)
    residual = None if gated else random(rows, n, seed=4, dtype=dtype)
    expected = linear(x.float(), weight.dequantized(torch.float32), bias.float())
    expected = silu_and_mul(expected) if gated else expected + random(rows, n, seed=4, dtype=dtype).float()
    y = coded_gemv(x, weight, bias, residual, Tiling(32, 0, parts, ahead, parts), gated=gated)
    assert y.dtype == dtype and relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "zeros"),
    [(4, 64, True), (4, 512, False), (8, 32, False), (4, 32, "offsets"), (8, 16, "offsets"), (4, 16, False)],
)
def test_the_values_of_the_codes_are_written_as_they_are(
    bits: int, group: int, zeros: bool | str, dtype: torch.dtype
) -> None:
    weight = coded(80, 300, bits, group, zeros=zeros, seed=5)
    out = torch.full((80, 300), torch.nan, dtype=dtype, device=DEVICE)
    assert widened(weight, out).equal(weight.dequantized(dtype))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 20, MAX_GATED_CODED_ROWS + 1, MAX_CODED_ROWS + 1])
def test_what_a_decoder_calls(rows: int, ordered: bool) -> None:
    """Whichever way a number of rows goes, with the tilings that are chosen for it."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16 if rows > 8 else torch.float32
    ops, hidden, width = GpuOperators(dtype, DEVICE, "triton"), 96, 64
    assert CodedTensor in ops.packed
    x, norm = random(rows, hidden, seed=1, dtype=dtype), random(hidden, seed=2, dtype=dtype)
    up = coded(2 * width, hidden, 4, 32, zeros=True, seed=3)
    down = coded(hidden, width, 8, 32, zeros=False, seed=4)
    if ordered:
        up.order = torch.randperm(hidden, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    bias, before = random(2 * width, seed=5, dtype=dtype), x.clone()
    normed = rms_norm(x.float(), norm.float(), 1e-5)
    plain = linear(normed, up.dequantized(torch.float32), bias.float())
    assert relative_error(ops.norm_linear(norm, 1e-5, up, bias)(x), plain) < TOLERANCE[dtype]
    act = ops.norm_gate_up(norm, 1e-5, up)(x)
    expected = silu_and_mul(linear(normed, up.dequantized(torch.float32)))
    assert relative_error(act, expected) < 2 * TOLERANCE[dtype]
    assert torch.equal(x, before)
    product = linear(act.float(), down.dequantized(torch.float32))
    assert relative_error(ops.linear(down)(act), product) < TOLERANCE[dtype]
    assert relative_error(ops.linear(down)(act, x.clone()), product + x.float()) < TOLERANCE[dtype]
    assert ops.linear(down)(act[:0]).shape == (0, hidden)


@pytest.mark.parametrize(
    ("rows", "bits", "group", "zeros", "early"),
    [
        (1, 4, 128, False, True),
        (2, 4, 1000, False, True),
        (3, 4, 128, False, False),
        (1, 4, 64, False, False),
        (1, 4, 128, True, False),
        (1, 8, 128, False, False),
    ],
)
def test_codes_come_early_where_that_was_timed(
    rows: int, bits: int, group: int, zeros: bool, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 bits without zero points, in groups of 128 or more, for one row and for two of 16 bits."""
    calls = list[str]()

    def noting(name: str) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: CodedTensor, *_: Any, gated: bool, **options: Any) -> Tensor:
            calls.append(name)
            assert options.get("fetch", False) == (ops.levers.early_zeros and name == "coded_skinny")
            return x.new_zeros(len(x), weight.shape[0] // (1 + gated))

        return call

    for name in ("coded_gemv", "coded_skinny"):
        monkeypatch.setattr(products, name, noting(name))
    ops = GpuOperators(torch.float16, DEVICE, "triton")
    weight = coded(32, 300, bits, group, zeros=zeros, seed=1)
    for switched_on, dtype in ((True, torch.float16), (False, torch.float16), (True, torch.float32)):
        ops.levers = replace(ops.levers, early_codes=switched_on, early_zeros=switched_on)
        assert ops.linear(weight)(torch.zeros(rows, 300, dtype=dtype, device=DEVICE)).shape == (rows, 32)
    assert calls == ["coded_gemv" if early else "coded_skinny", "coded_skinny", "coded_skinny"]


@pytest.mark.parametrize("rows", [1, 2])
def test_what_a_decoder_calls_for_codes_that_come_early(rows: int) -> None:
    """With the tilings that are chosen, of few columns and of many, in another order, too."""
    dtype, hidden, width = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16, 300, 16
    ops = GpuOperators(dtype, DEVICE, "triton")
    ops.levers = replace(ops.levers, early_codes=True)
    up = coded(2 * width, hidden, 4, 128, zeros=False, seed=3)
    up.order = torch.randperm(hidden, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    down = coded(32, width, 4, 1000, zeros=False, seed=4)
    x, norm = random(rows, hidden, seed=1, dtype=dtype), random(hidden, seed=2, dtype=dtype)
    act = ops.norm_gate_up(norm, 1e-5, up)(x)
    normed = rms_norm(x.float(), norm.float(), 1e-5)
    expected = silu_and_mul(linear(normed, up.dequantized(torch.float32)))
    assert relative_error(act, expected) < 2 * TOLERANCE[dtype]
    residual = random(rows, 32, seed=6, dtype=dtype)
    expected = linear(act.float(), down.dequantized(torch.float32)) + residual.float()
    assert relative_error(ops.linear(down)(act, residual), expected) < TOLERANCE[dtype]
