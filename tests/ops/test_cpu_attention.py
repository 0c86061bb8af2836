"""The compiled attention of a step, decodes and segments, against the torch backend in float32."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from attention_case import Case, check_in_pages
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_case import EMULATED, EXACT_LEVELS, SANITIZERS, examples, library_of
from latent_case import LatentCase
from test_cpu_kernels import DTYPES, seeds
from torch import Tensor

from microvllm.ops.attention import AttentionConfig, AttentionShape
from microvllm.ops.attention.latent import LatentShape, TorchLatentAttention
from microvllm.ops.attention.torch_backend import TorchAttention, TorchStep
from microvllm.ops.cpu.operators import CpuOperators

CPU = torch.device("cpu")
HEADS = [(1, 1), (3, 1), (9, 3), (4, 4), (14, 2), (71, 1)]


@pytest.fixture(scope="module", params=[*EXACT_LEVELS, EMULATED], ids=lambda level: level.name)
def operators(request: pytest.FixtureRequest) -> CpuOperators:
    """Of every level with an attention of its own, and with the matrix unit in plain C."""
    return CpuOperators(library_of(request.param), 3)


def check(operators: CpuOperators, case: Case, *, int32: bool = False) -> None:
    """The last layer's output, row by row, and the cache after it."""
    layer, exact = case.shape.num_layers - 1, case.dtype == torch.float32
    ours = operators.attention(case.config(norms_dtype=torch.float32))
    ours.cache.copy_(case.cache.transpose(2, 3).reshape(ours.cache.shape))
    out = ours.begin_step(case.batch(CPU, int32=int32))(layer, case.qkv.float().clone())

    def rounding(step: TorchStep, layer: int, qkv: Tensor) -> Tensor:
        q = rotate_and_cache(step, layer, qkv)
        cache = step._backend.cache[layer]
        cache.copy_(cache.to(case.dtype))
        return q

    rotate_and_cache = TorchStep._rotate_and_cache
    with patch.object(TorchStep, "_rotate_and_cache", rounding):
        expected, cache = case.expected(layer)
    # One unit of bfloat16's last place: a rotated key is rounded from sums that differ in float32's last.
    tolerance = 2e-5 if exact else 8e-3
    cache = cache.transpose(2, 3).reshape(ours.cache.shape)
    assert float((ours.cache.float() - cache).abs().max() / cache.abs().max()) < tolerance
    assert out.shape == expected.shape
    # Values of size 1 are averaged, and may cancel out, but not how weights are rounded to bfloat16.
    least = 0.1 if exact or not operators.multiplies_bf16 else 1.0
    errors, sizes = (out.float() - expected).norm(dim=1), expected.float().norm(dim=1).clamp(min=least)
    assert (errors < tolerance * sizes).all()


@examples(80)
@given(
    st.lists(st.integers(1, 300), max_size=3),
    st.lists(st.tuples(st.integers(1, 150), st.integers(0, 400)), max_size=5),
    st.sampled_from(HEADS),
    st.sampled_from([2, 10, 32, 64, 80, 130]),
    st.sampled_from([1, 7, 16, 256]),
    st.sampled_from([None, 1, 50, 300, 2**40]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES),
    seeds,
)
def test_a_mixed_step(
    operators: CpuOperators,
    decodes: list[int],
    chunks: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    window: int | None,
    with_norms: bool,
    with_sinks: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """chunks: new tokens, and those that were cached before."""
    segments = [(new, new + before) for new, before in chunks]
    if decodes or segments:
        shape = AttentionShape(2, *heads, dim, window)
        options = {"with_norms": with_norms, "with_sinks": with_sinks}
        check(operators, Case(shape, block_size, decodes, segments, dtype, **options, seed=seed))


@pytest.mark.parametrize("segments", [[], [(0, 0)], [(0, 0), (5, 5), (0, 0), (0, 0), (40, 90), (0, 0)]])
@pytest.mark.parametrize("decodes", [[], [30]])
def test_segments_of_nothing(
    operators: CpuOperators, decodes: list[int], segments: list[tuple[int, int]]
) -> None:
    """Also a step of nothing, and indices of 32 bits."""
    shape = AttentionShape(1, 9, 3, 64, None)
    if not decodes and not segments:
        segments = [(0, 0)]
    check(operators, Case(shape, 16, decodes, segments, torch.float32), int32=True)


@pytest.mark.parametrize("window", [None, 700])
def test_a_chunk_of_a_long_sequence_beside_many_short_ones(
    operators: CpuOperators, window: int | None
) -> None:
    shape = AttentionShape(1, 9, 3, 64, window)
    count, new, longest = (40, 130, 450) if SANITIZERS else (100, 300, 2500)
    segments = [(8, 8)] * count + [(new, longest)] + [(2, 1000)] * 3
    check(operators, Case(shape, 16, [900], segments, torch.bfloat16))


@pytest.mark.parametrize("step", [5.0, -5.0])
def test_scores_that_grow_from_block_to_block(operators: CpuOperators, step: float) -> None:
    """By more, in all, than there is between the largest weight and the one that the first block's are."""
    case = Case(AttentionShape(1, 6, 2, 64), 16, [300], [], torch.float32)
    case.inv_freq = torch.zeros(32)  # queries are not rotated
    case.qkv[:] = 1.0
    for index, block in enumerate(case.decodes[0].blocks):
        case.cache[0, 0, block] = index * step / 8
    check(operators, case)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_sequence(operators: CpuOperators, broken: float) -> None:
    """And in what follows it there."""
    shape = AttentionShape(1, 4, 2, 8)
    case = Case(shape, 4, [], [(150, 150), (20, 20)], torch.float32)
    case.qkv[130] = broken
    attention = operators.attention(
        AttentionConfig(shape, case.num_blocks, 4, case.inv_freq, 200, torch.float32)
    )
    clean = case.qkv.clone()
    clean[130] = 0
    true = attention.begin_step(case.batch(CPU))(0, clean)
    out = attention.begin_step(case.batch(CPU))(0, case.qkv)
    assert out[130:150].isnan().all()
    others = [*range(100), *range(150, 170)]
    torch.testing.assert_close(out[others], true[others])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_key_that_is_any_nan_is_seen_in_what_follows(operators: CpuOperators, bits: int) -> None:
    """Though all values are numbers: a weight does not become one by the bits of the NaN."""
    shape = AttentionShape(1, 4, 2, 8)
    case = Case(shape, 4, [], [(90, 90)], torch.float32)
    keys = slice(4 * 8, 6 * 8)
    case.qkv[30, keys] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    attention = operators.attention(
        AttentionConfig(shape, case.num_blocks, 4, case.inv_freq, 200, torch.float32)
    )
    out = attention.begin_step(case.batch(CPU))(0, case.qkv)
    assert out[:30].isfinite().all() and out[30:].isnan().all()


@examples(10)
@given(
    st.lists(st.integers(1, 600), max_size=2),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), max_size=2),
    st.sampled_from([1, 3, 20, 33]),
    st.sampled_from([(16, 2), (20, 12), (40, 10), (64, 64)]),
    st.sampled_from(DTYPES),
    seeds,
)
@example([530], [(2, 40)], 20, (512, 64), torch.float32, 0)
@example([530], [(2, 40)], 20, (512, 64), torch.bfloat16, 0)
def test_latent_attention(
    operators: CpuOperators,
    decodes: list[int],
    chunks: list[tuple[int, int]],
    heads: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """chunks: as in `test_a_mixed_step`; sizes: of the latent, and of what is rotated."""
    segments = [(new, new + before) for new, before in chunks if new + before]
    if not decodes and not segments:
        return
    case = LatentCase(LatentShape(2, heads, *sizes, 0.2, 1.2), decodes, segments, seed=seed)
    config = case.config(dtype, CPU)
    backends = operators.latent_attention(config), TorchLatentAttention(config, torch.float32)
    outs = []
    for backend in backends:
        backend.cache.copy_(case.cache)
        outs.append(backend.begin_step(case.batch(CPU, is_gpu=False))(1, case.qkv.clone()))
    rounds = dtype == torch.bfloat16 and operators.multiplies_bf16
    errors, scale = (outs[0] - outs[1]).norm(dim=1), outs[1].norm(dim=1).clamp(min=0.1)
    assert (errors < (8e-3 if rounds else 1e-5) * scale).all()
    ours, theirs = (backend.cache.float() for backend in backends)
    assert ours[0].equal(theirs[0])
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < (
        8e-3 if dtype == torch.bfloat16 else 1e-6
    )


def test_what_is_not_a_number_stays_in_its_sequence_of_latents(operators: CpuOperators) -> None:
    case = LatentCase(LatentShape(2, 3, 16, 8, 0.2), [600, 5], [(9, 9)])
    for dtype in DTYPES:
        attention = operators.latent_attention(case.config(dtype, CPU))
        attention.cache.copy_(case.cache)
        table = case.tables[0]
        attention.cache[1, table[550 // 16], 550 % 16, 3] = torch.nan
        out = attention.begin_step(case.batch(CPU, is_gpu=False))(1, case.qkv.clone())
        assert out[0].isnan().all() and out[1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_that_layers_of_other_heads_share(operators: CpuOperators, dtype: torch.dtype) -> None:
    case = Case(AttentionShape(2, 6, 2, 32, 24), 4, [50, 1, 17], [(3, 40), (30, 30)], dtype)
    case.qkv = case.qkv.float()
    check_in_pages(case, operators.attention, case.batch(CPU))
    check_in_pages(case, lambda config: TorchAttention(config, torch.float32), case.batch(CPU))
