"""The compiled CPU kernels against plain torch in float64, over random shapes and both weight dtypes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import BY_VECTORS, EMULATED, examples, library_of
from quantized_case import dequantized, formats, quantized, random_blocks
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from microvllm.ops.attention import AttentionBatch, AttentionConfig, AttentionShape, QKNorms
from microvllm.ops.attention.torch_backend import TorchAttention
from microvllm.ops.cpu import build
from microvllm.ops.cpu.build import NoCompilerError, load_kernels
from microvllm.ops.cpu.operators import MAX_KERNEL_ROWS_BF16, CpuOperators
from microvllm.ops.cpu.tuning import Tuning
from microvllm.ops.norm import rms_norm

DTYPES = (torch.float32, torch.bfloat16)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def operators() -> CpuOperators:
    return CpuOperators(load_kernels(), 3, tuning=BY_VECTORS)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float = 2e-6, scale: Tensor | None = None
) -> None:
    """`scale`: the size of the terms that were added up, where they may cancel out."""
    assert actual.shape == expected.shape
    largest = (expected if scale is None else scale).abs().max().clamp(min=1e-20)
    assert float((actual.double() - expected.double()).abs().max() / largest) < tolerance


@examples(150)
@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 150),
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES),
    seeds,
)
def test_linear(
    operators: CpuOperators, m: int, n: int, k: int, bias: bool, residual: bool, dtype: torch.dtype, seed: int
) -> None:
    x, weight = random(m, k, seed=seed), random(n, k, seed=seed + 1).to(dtype)
    b = random(n, seed=seed + 2) if bias else None
    r = random(m, n, seed=seed + 3) if residual else None
    expected = x.double() @ weight.double().t()
    expected = expected + (0 if b is None else b) + (0 if r is None else r)
    many_in_bf16 = m > MAX_KERNEL_ROWS_BF16 and dtype == torch.bfloat16
    actual = operators.linear(weight, b)(x, r)
    terms = x.double().abs() @ weight.double().abs().t()
    terms = terms + sum(added.abs().max() for added in (b, r) if added is not None)
    assert_close(actual, expected, 3e-2 if many_in_bf16 else 2e-6, terms)


@examples(100)
@given(
    st.integers(1, 30),
    st.integers(1, 100),
    st.integers(1, 150),
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES),
    seeds,
)
def test_a_norm_before_and_swiglu_after_the_product(
    operators: CpuOperators, m: int, n: int, k: int, bias: bool, gated: bool, dtype: torch.dtype, seed: int
) -> None:
    x, norm = random(m, k, seed=seed), random(k, seed=seed + 1)
    rows = 2 * n if gated else n
    weight = random(rows, k, seed=seed + 2).to(dtype)
    b = random(rows, seed=seed + 3) if bias else None
    normed = rms_norm(x.double(), norm.double(), 1e-5)
    expected = normed @ weight.double().t() + (0 if b is None else b)
    terms = normed.abs() @ weight.double().abs().t() + (0 if b is None else b.abs())
    if gated:
        gate, up = expected.chunk(2, -1)
        expected, terms = silu(gate) * up, terms.chunk(2, -1)[0] * terms.chunk(2, -1)[1]
    make = operators.norm_gate_up if gated else operators.norm_linear
    many_in_bf16 = m > MAX_KERNEL_ROWS_BF16 and dtype == torch.bfloat16
    assert_close(make(norm, 1e-5, weight, b)(x), expected, 3e-2 if many_in_bf16 else 4e-6, terms)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (1, 1, 1), (20, 21, 30000), (700, 40, 150)])
@pytest.mark.parametrize("norm", [False, True])
def test_products_of_no_row_of_one_number_and_of_several_blocks(
    operators: CpuOperators, m: int, n: int, k: int, norm: bool
) -> None:
    x, weight, ones = random(m, k, seed=1), random(n, k, seed=2), torch.ones(k)
    expected = (rms_norm(x.double(), ones.double(), 0.0) if norm else x.double()) @ weight.double().t()
    product = operators.norm_linear(ones, 0.0, weight) if norm else operators.linear(weight)
    assert product(x).shape == (m, n)
    if m:
        assert_close(product(x), expected, 5e-6)


@examples(60)
@given(st.integers(1, 40), st.integers(1, 600), st.floats(1e-3, 1e3), seeds)
def test_rms_norm(operators: CpuOperators, n: int, d: int, scale: float, seed: int) -> None:
    x, weight = random(n, d, seed=seed) * scale, random(d, seed=seed + 1)
    assert_close(operators.rms_norm(x, weight, 1e-5), rms_norm(x.double(), weight.double(), 1e-5), 1e-5)


@examples(60)
@given(st.integers(1, 20), st.integers(1, 200), st.floats(1e-2, 200.0), seeds)
def test_silu_and_mul(operators: CpuOperators, n: int, width: int, scale: float, seed: int) -> None:
    x = random(n, 2 * width, seed=seed) * scale
    gate, up = x.double().chunk(2, -1)
    assert_close(operators.silu_and_mul(x), silu(gate) * up, 1e-5)


def test_silu_keeps_nan_and_infinity(operators: CpuOperators) -> None:
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([torch.nan, torch.inf, -1e30, 1e30])
    x[0, 32:] = 1.0
    y = operators.silu_and_mul(x)
    assert torch.isnan(y[0, 0])
    assert y[0, 1] == torch.inf
    assert y[0, 2] == 0
    assert y[0, 3] == torch.tensor(1e30)


@examples(100)
@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (3, 1), (9, 3), (4, 4)]),
    st.sampled_from([2, 10, 32, 64]),
    st.sampled_from([1, 8, 16, 256]),
    st.sampled_from([None, 1, 50, 300]),
    st.booleans(),
    st.sampled_from(DTYPES),
    seeds,
)
def test_decode_attention_reads_the_block_table(
    operators: CpuOperators,
    lens: list[int],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    window: int | None,
    qk_norm: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    num_heads, kv_heads = heads
    shape = AttentionShape(1, num_heads, kv_heads, dim, window)
    inv_freq = 100.0 ** -(torch.arange(0, dim, 2).float() / dim)
    widths = [-(-length // block_size) for length in lens]
    num_blocks = sum(widths)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
    tables = torch.zeros(len(lens), max(widths), dtype=torch.int64)
    for row, (width, mine) in enumerate(zip(widths, order.split(widths), strict=True)):
        tables[row, :width] = mine
    positions = torch.tensor(lens) - 1
    slots = tables[torch.arange(len(lens)), positions // block_size] * block_size + positions % block_size
    batch = AttentionBatch(positions, slots, len(lens), tables, torch.tensor(lens))
    contents = random(1, 2 * kv_heads, num_blocks, block_size, dim, seed=seed).to(dtype)
    qkv = random(len(lens), (num_heads + 2 * kv_heads) * dim, seed=seed)
    norms = QKNorms(((random(dim, seed=seed + 1), random(dim, seed=seed + 2)),), 1e-5) if qk_norm else None

    config = AttentionConfig(shape, num_blocks, block_size, inv_freq, 1024, dtype, norms)
    ours = operators.attention(config)
    reference = TorchAttention(config, torch.float32)
    ours.cache.copy_(contents)
    reference.cache.copy_(contents)
    out = ours.begin_step(batch)(0, qkv.clone())
    rotated = reference.begin_step(batch)._rotate_and_cache(0, qkv)
    # One unit in the last place of bfloat16: the kernel and torch round the rotated key from sums that
    # differ in float32's last bit.
    assert_close(ours.cache.float(), reference.cache.float(), 1e-6 if dtype == torch.float32 else 8e-3)
    cache = ours.cache[0].float()
    for row, length in enumerate(lens):
        gathered = cache[:, tables[row]].flatten(1, 2)[:, :length]
        if window is not None:
            gathered = gathered[:, -window:]
        keys, values = gathered.view(2, kv_heads, -1, dim).repeat_interleave(num_heads // kv_heads, 1)
        expected = scaled_dot_product_attention(rotated[row, :num_heads, None], keys, values)
        assert_close(out[row], expected.reshape(-1), 1e-4)


def test_a_sequence_without_finite_scores_spoils_no_other(operators: CpuOperators) -> None:
    shape = AttentionShape(1, 2, 1, 8, None)
    attention = operators.attention(AttentionConfig(shape, 4, 4, torch.ones(4), 16, torch.float32))
    batch = AttentionBatch(
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([0, 8]),
        2,
        torch.tensor([[0], [2]]),
        torch.tensor([1, 1]),
    )
    qkv = torch.ones(2, 4 * 8)
    qkv[0, : 3 * 8] = torch.nan
    out = attention.begin_step(batch)(0, qkv)
    assert out[0].isnan().all()
    assert torch.equal(out[1], torch.ones(16))


# ---- building ---------------------------------------------------------------------------------------


def test_building_without_a_compiler_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(NoCompilerError, match="there is no C compiler"):
        load_kernels()
    monkeypatch.setenv("CC", "false")
    with pytest.raises(NoCompilerError, match="false failed"):
        load_kernels()
    assert list((tmp_path / "microvllm").iterdir()) == []


def test_the_compiler_s_error_is_shown_and_not_what_stands_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    script = "echo 'x.s: Assembler messages:\nx.s: Fatal error: no space left' >&2; exit 1\n"
    compiler.write_text(f"#!/bin/sh\n{script}")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(NoCompilerError, match=r"failed: x\.s: Fatal error: no space left$"):
        load_kernels()


def test_building_happens_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "SOURCES", [build.FOLDER / "isa.c"])  # at once
    load_kernels()
    (library,) = (tmp_path / "microvllm").iterdir()
    built = library.stat().st_mtime_ns
    load_kernels()
    assert library.stat().st_mtime_ns == built


@pytest.fixture(scope="module", params=["here", "emulated"])
def matrix_operators(request: pytest.FixtureRequest) -> CpuOperators:
    """With products in bfloat16: by this processor, and on a matrix unit in plain C."""
    if request.param == "here":
        library = load_kernels()
        if not library.has_bf16():
            pytest.skip("this processor has no such products")
        return CpuOperators(library, 3)
    return CpuOperators(library_of(EMULATED), 3)


@examples(50)
@given(
    st.one_of(
        st.integers(Tuning().matrix_rows, MAX_KERNEL_ROWS_BF16), st.integers(MAX_KERNEL_ROWS_BF16 + 1, 1200)
    ),
    st.integers(1, 150),
    st.integers(1, 1300),
    st.booleans(),
    st.sampled_from(["plain", "normed", "gated"]),
    seeds,
)
def test_rows_on_the_matrix_unit(
    matrix_operators: CpuOperators, m: int, n: int, k: int, bias: bool, kind: str, seed: int
) -> None:
    """As exact as float32 once x is rounded to bfloat16, or, up to 32 rows, to twice as many bits."""
    operators = matrix_operators
    x, weight = random(m, k, seed=seed), random(n * (1 + (kind == "gated")), k, seed=seed + 1).bfloat16()
    b = random(len(weight), seed=seed + 2) if bias else None
    norm, residual = random(k, seed=seed + 3), random(m, n, seed=seed + 4)
    rounded = (x if kind == "plain" else operators.rms_norm(x, norm, 1e-5)).double()
    if m > MAX_KERNEL_ROWS_BF16:
        rounded = rounded.bfloat16().double()
    product = rounded @ weight.double().t() + (0 if b is None else b.double())
    scale = rounded.abs() @ weight.double().abs().t() + (0 if b is None else b.abs())
    tolerance = 2e-6 if m > MAX_KERNEL_ROWS_BF16 else 8e-6
    if kind == "plain":
        actual = operators.linear(weight, b)(x, residual.clone())
        assert_close(actual, product + residual, tolerance, scale=scale + residual.abs())
        x[m // 2, k // 2] = math.nan
        is_nan = operators.linear(weight, b)(x).isnan()
        assert is_nan[m // 2].all() and is_nan.sum() == n
    elif kind == "normed":
        assert_close(operators.norm_linear(norm, 1e-5, weight, b)(x), product, tolerance, scale=scale)
    else:
        gate, up = product.chunk(2, -1)
        actual = operators.norm_gate_up(norm, 1e-5, weight, b)(x)
        assert_close(actual, torch.nn.functional.silu(gate) * up, 1e-5 if m > MAX_KERNEL_ROWS_BF16 else 4e-5)


@pytest.mark.parametrize("m", [Tuning().matrix_rows, 40])
def test_what_is_infinite_on_the_matrix_unit(matrix_operators: CpuOperators, m: int) -> None:
    x, weight = random(m, 70, seed=0), random(40, 70, seed=1).abs().bfloat16()
    x[3, 5], x[4, 6] = math.inf, -math.inf
    y = matrix_operators.linear(weight)(x)
    assert (y[3] == math.inf).all() and (y[4] == -math.inf).all()
    assert y.isfinite().sum() == (m - 2) * 40


@examples(40)
@given(
    formats,
    st.one_of(st.integers(Tuning().matrix_rows_quantized, MAX_KERNEL_ROWS_BF16), st.integers(33, 700)),
    st.integers(1, 100),
    st.integers(1, 3),
    st.booleans(),
    seeds,
)
def test_quantised_weights_on_the_matrix_unit(
    matrix_operators: CpuOperators, name: str, m: int, n: int, blocks: int, gated: bool, seed: int
) -> None:
    """As exact as float32 once the weights are rounded to bfloat16, and x as above.

    Without the unit, few rows are not rounded.
    """
    parts = [random_blocks(name, n, blocks, seed + i) for i in range(1 + gated)]
    weights = torch.cat([dequantized(name, raw) for raw in parts]).double()
    if m > MAX_KERNEL_ROWS_BF16 or matrix_operators.kernels.library.has_amx():
        weights = weights.bfloat16().double()
    x = random(m, weights.shape[1], seed=seed)
    exact = x.double() if m <= MAX_KERNEL_ROWS_BF16 else x.bfloat16().double()
    scale = exact.abs() @ weights.abs().t()
    if not gated:
        actual = matrix_operators.linear(quantized((name, parts[0])))(x)
        # A weight in the middle of two numbers may be rounded to the other one.
        assert_close(actual, exact @ weights.t(), 5e-5, scale=scale)
        return
    operator = matrix_operators.norm_gate_up(
        torch.ones(x.shape[1]), 1e-5, quantized((name, parts[0]), (name, parts[1]))
    )
    normed = matrix_operators.rms_norm(x, torch.ones(x.shape[1]), 1e-5)
    exact = (normed if m <= MAX_KERNEL_ROWS_BF16 else normed.bfloat16()).double()
    gate, up = (exact @ weights.t()).chunk(2, -1)
    assert_close(operator(x), torch.nn.functional.silu(gate) * up, 1e-3)


@pytest.mark.parametrize("m", [9, 40])
@pytest.mark.parametrize("is_invariant", [False, True])
def test_quantised_weights_that_are_not_to_be_rounded(
    matrix_operators: CpuOperators, m: int, is_invariant: bool
) -> None:
    exact = CpuOperators(matrix_operators.kernels.library, 3, is_invariant=is_invariant, is_exact=True)
    raw = random_blocks("Q4_1", 70, 9, 0)
    weights = dequantized("Q4_1", raw).double()
    x = random(m, weights.shape[1], seed=1)
    assert_close(
        exact.linear(quantized(("Q4_1", raw)))(x),
        x.double() @ weights.t(),
        scale=x.double().abs() @ weights.abs().t(),
    )
