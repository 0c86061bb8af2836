"""The compiled attention of a step, decodes and segments, against the torch backend in float32."""

from __future__ import annotations

import pytest
import torch
from attention_case import Case, relative_error
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_kernels import DTYPES, examples, seeds

from microvllm.ops.attention import AttentionBatch, AttentionShape
from microvllm.ops.cpu.build import load_kernels
from microvllm.ops.cpu.operators import CpuOperators

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def operators() -> CpuOperators:
    return CpuOperators(load_kernels(), 3)


def check(operators: CpuOperators, case: Case, batch: AttentionBatch | None = None) -> None:
    """The last layer's output, and the cache after it."""
    shape = case.shape
    ours = operators.attention(
        shape,
        case.num_blocks,
        case.block_size,
        case.inv_freq,
        case.max_position,
        case.dtype,
        case.norms_on(CPU, torch.float32),
    )
    ours.cache.copy_(case.cache.transpose(2, 3).reshape(ours.cache.shape))
    layer = shape.num_layers - 1
    out = ours.begin_step(batch or case.batch(CPU))(layer, case.qkv.float().clone())
    expected, cache = case.expected(layer)
    exact = case.dtype == torch.float32
    # The reference keeps in float32 what goes to the cache in bfloat16 here.
    for row, reference in zip(out, expected, strict=True):
        assert relative_error(row, reference) < (2e-5 if exact else 2e-2)
    assert relative_error(ours.cache, cache.transpose(2, 3).reshape(ours.cache.shape)) < (
        1e-6 if exact else 3e-3
    )


@examples(200)
@given(
    st.lists(st.integers(1, 300), max_size=3),
    st.lists(st.tuples(st.integers(2, 150), st.integers(0, 400)), max_size=5),
    st.sampled_from([(1, 1), (3, 1), (9, 3), (4, 4), (14, 2), (10, 2)]),
    st.sampled_from([2, 10, 32, 64, 80, 130]),
    st.sampled_from([1, 7, 16, 256]),
    st.sampled_from([None, 1, 50, 300]),
    st.booleans(),
    st.sampled_from(DTYPES),
    seeds,
)
def test_a_mixed_step(
    operators: CpuOperators,
    decodes: list[int],
    segments: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    window: int | None,
    with_norms: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Segments are (new tokens, tokens before them)."""
    if not decodes and not segments:
        return
    shape = AttentionShape(2, *heads, dim, window)
    news = [(new, new + before) for new, before in segments]
    check(operators, Case(shape, block_size, decodes, news, dtype, with_norms=with_norms, seed=seed))
