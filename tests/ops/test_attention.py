"""Paged attention against attention as it is defined: one query at a time, over dense keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from attention_case import segment_table
from hypothesis import given, settings
from hypothesis import strategies as st
from model_tools import BACKENDS
from torch import Tensor

from microvllm.adapters.rope_spec import RopeSpec
from microvllm.adapters.rotary import inverse_frequencies
from microvllm.ops.attention import AttentionBatch, AttentionConfig, AttentionShape
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.torch_backend import TorchAttention
from microvllm.ops.backends import make_operators
from microvllm.ops.cpu.operators import CpuAttention

INV_FREQ = {dim: inverse_frequencies(RopeSpec(theta=100.0), dim) for dim in (2, 8, 10, 32)}
MAX_POSITION = 640


def make_backend(
    name: str,
    shape: AttentionShape,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    sinks: tuple[Tensor, ...] = (),
) -> tuple[TorchAttention | CpuAttention, torch.dtype]:
    """A backend with random rubbish in its cache, and the dtype of its activations."""
    operators = make_operators(name, dtype, 2)
    inv_freq = INV_FREQ[shape.head_dim]
    backend = operators.attention(
        AttentionConfig(shape, num_blocks, block_size, inv_freq, MAX_POSITION, dtype, sinks=sinks)
    )
    assert isinstance(backend, TorchAttention | CpuAttention)
    # What earlier requests left in the blocks must not be seen.
    backend.cache.copy_(torch.randn(backend.cache.shape, generator=torch.Generator().manual_seed(9)) * 100)
    return backend, operators.activation_dtype


@dataclass
class Sequence:
    """One sequence of a test: its tokens' vectors before rotation, and the blocks that it owns."""

    qk: Tensor  # [length, heads + kv_heads, d]
    v: Tensor  # [length, kv_heads, d]
    blocks: list[int]


def rotate(x: Tensor, inv_freq: Tensor, position: int) -> Tensor:
    """By complex numbers: pair j is the number x[j] + i x[j + d/2], turned by its angle."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = inv_freq.double() * position
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


def dense(
    sequence: Sequence,
    shape: AttentionShape,
    query: int,
    scales: KVScales | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The output at one position, in float64: [heads * d]. With scales, keys and values are of e4m3."""
    inv_freq, heads = INV_FREQ[shape.head_dim], shape.num_heads
    first = 0 if shape.window is None else max(0, query - shape.window + 1)
    q = rotate(sequence.qk[query, :heads], inv_freq, query)
    keys = torch.stack([rotate(sequence.qk[p, heads:], inv_freq, p) for p in range(first, query + 1)])
    values = sequence.v[first : query + 1].double()
    if scales is not None:
        keys, values = (
            (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
            for x, scale in zip((keys, values), scales, strict=True)
        )
    outputs = []
    for head in range(heads):
        shared = head * shape.num_kv_heads // heads
        scores = keys[:, shared] @ q[head] / math.sqrt(shape.head_dim)
        total = scores.exp().sum() + (0 if sinks is None else sinks[head].double().exp())
        outputs.append(scores.exp() / total @ values[:, shared])
    return torch.cat(outputs)


def make_batch(
    work: list[tuple[Sequence, int, int]], block_size: int, padding_block: int
) -> tuple[AttentionBatch, Tensor]:
    """(sequence, start, end) of each -> the batch with single tokens first, and its qkv."""
    work = sorted(work, key=lambda item: item[2] - item[1] > 1)
    decodes = [item for item in work if item[2] - item[1] == 1]
    positions, slots, segments = [], [], []
    for sequence, start, end in work:
        if end - start > 1:
            segments.append((end - start, end, sequence.blocks[: -(-end // block_size)]))
        for position in range(start, end):
            positions.append(position)
            slots.append(sequence.blocks[position // block_size] * block_size + position % block_size)
    width = max((-(-end // block_size) for _, _, end in decodes), default=0)
    tables = [
        (sequence.blocks[: -(-end // block_size)] + [padding_block] * width)[:width]
        for sequence, _, end in decodes
    ]
    batch = AttentionBatch(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        num_decodes=len(decodes),
        decode_blocks=torch.tensor(tables, dtype=torch.int64).view(len(decodes), width),
        decode_lens=torch.tensor([end for _, _, end in decodes], dtype=torch.int64),
        segment_table=segment_table(segments),
    )
    qk = torch.cat([sequence.qk[start:end] for sequence, start, end in work])
    v = torch.cat([sequence.v[start:end] for sequence, start, end in work])
    return batch, torch.cat((qk, v), 1).flatten(1)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=20)
@given(
    data=st.data(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from(sorted(INV_FREQ)),
    block_size=st.sampled_from([1, 2, 3, 8, 16]),
    window=st.none() | st.integers(1, 20),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_mixture_of_chunks_is_dense_attention(
    name: str,
    data: st.DataObject,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    lengths: list[int],
    with_sinks: bool,
    seed: int,
) -> None:
    """Sequences grow by arbitrary chunks in arbitrary company, in blocks that lie anywhere in the pool."""
    random = torch.Generator().manual_seed(seed)
    shape = AttentionShape(2, kv_heads * group, kv_heads, head_dim, window)
    needed = sum(-(-length // block_size) for length in lengths)
    drawn = 4 * torch.randn(2, shape.num_heads, generator=random)
    sinks = tuple(drawn) if with_sinks else ()
    backend, _ = make_backend(name, shape, needed + 2, block_size, sinks=sinks)
    free = torch.randperm(needed + 2, generator=random).tolist()
    padding_block = free.pop()
    sequences = [
        Sequence(
            torch.randn(length, shape.num_heads + kv_heads, head_dim, generator=random),
            torch.randn(length, kv_heads, head_dim, generator=random),
            [free.pop() for _ in range(-(-length // block_size))],
        )
        for length in lengths
    ]
    done = [0] * len(sequences)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        chunks = [data.draw(st.integers(0, 9)) for _ in lengths]
        ends = [min(at + chunk, length) for at, chunk, length in zip(done, chunks, lengths, strict=True)]
        if ends == done:
            ends = lengths
        work = [(s, at, end) for s, at, end in zip(sequences, done, ends, strict=True) if end > at]
        batch, qkv = make_batch(work, block_size, padding_block)
        step = backend.begin_step(batch)
        first_layer, second_layer = step(0, qkv.clone()), step(1, qkv.flip(0))
        del second_layer  # writes elsewhere: must not be seen in the first layer
        order = sorted(work, key=lambda item: item[2] - item[1] > 1)
        of_layer = sinks[0] if with_sinks else None
        expected = torch.stack(
            [dense(s, shape, p, sinks=of_layer) for s, at, end in order for p in range(at, end)]
        )
        torch.testing.assert_close(first_layer.double(), expected, rtol=1e-4, atol=1e-5)
        done = ends


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_long_decode_batch_with_one_short_sequence(
    name: str, dtype: torch.dtype, window: int | None
) -> None:
    """Tables of very different widths: the padding of the short ones has no weight."""
    random = torch.Generator().manual_seed(0)
    shape = AttentionShape(1, 9, 3, 32, window)
    lengths, block_size = [600, 1, 16, 17, 513, 130], 16
    backend, activations = make_backend(name, shape, 96, block_size, dtype)
    blocks = iter(torch.randperm(96, generator=random).tolist())
    sequences = [
        Sequence(
            torch.randn(length, 12, 32, generator=random).to(dtype).to(activations),
            torch.randn(length, 3, 32, generator=random).to(dtype).to(activations),
            [next(blocks) for _ in range(-(-length // block_size))],
        )
        for length in lengths
    ]
    fill = [(s, 0, length - 1) for s, length in zip(sequences, lengths, strict=True) if length > 1]
    batch, qkv = make_batch(fill, block_size, sequences[0].blocks[0])
    backend.begin_step(batch)(0, qkv)
    last = [(s, length - 1, length) for s, length in zip(sequences, lengths, strict=True)]
    batch, qkv = make_batch(last, block_size, sequences[0].blocks[0])
    ours = backend.begin_step(batch)(0, qkv)
    assert ours.dtype == activations
    expected = torch.stack(
        [dense(s, shape, length - 1) for s, length in zip(sequences, lengths, strict=True)]
    )
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_broken_values_stay_in_their_sequence(name: str) -> None:
    """NaN keys of one sequence are NaN in its output alone, also where its block pads another's table."""
    shape, block_size = AttentionShape(1, 4, 2, 8), 4
    backend, _ = make_backend(name, shape, 8, block_size)
    good = Sequence(torch.randn(3, 6, 8), torch.randn(3, 2, 8), [5])
    bad = Sequence(torch.full((6, 6, 8), torch.nan), torch.randn(6, 2, 8), [1, 2])
    for start, end in ((0, 2), (2, 3)):
        work = [(good, start, end), (bad, 2 * start, 2 * end)] if start == 0 else [(good, 2, 3), (bad, 4, 5)]
        batch, qkv = make_batch(work, block_size, 5)
        out = backend.begin_step(batch)(0, qkv)
    torch.testing.assert_close(out[0].double(), dense(good, shape, 2), rtol=1e-4, atol=1e-5)
    assert out[1].isnan().all()


def test_unknown_operators_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no operators are called flash"):
        make_operators("flash", torch.float32, 2)


@pytest.mark.parametrize("scales", [KVScales(), KVScales(0.05, 0.3), KVScales(0.001, 1e-4)])
@pytest.mark.parametrize("window", [None, 20])
def test_a_cache_of_e4m3_is_dense_attention_to_rounded_keys_and_values(
    scales: KVScales, window: int | None
) -> None:
    """Its own token's too; with the last scales many end at 448. Whole, in chunks, decoded."""
    random = torch.Generator().manual_seed(1)
    shape, block_size, length = AttentionShape(2, 6, 3, 32, window), 4, 50
    sequence = Sequence(
        torch.randn(length, 9, 32, generator=random),
        torch.randn(length, 3, 32, generator=random),
        torch.randperm(16, generator=random).tolist()[: -(-length // block_size)],
    )
    config = AttentionConfig(
        shape, 16, block_size, INV_FREQ[32], MAX_POSITION, torch.float8_e4m3fn, None, (KVScales(), scales)
    )
    expected = torch.stack([dense(sequence, shape, at, scales) for at in range(length)])
    unrounded = torch.stack([dense(sequence, shape, at) for at in range(length)])
    for chunks in ([50], [7, 20, 1, 22], [47, 1, 1, 1]):
        backend, found, done = TorchAttention(config, torch.float32), [], 0
        for chunk in chunks:
            batch, qkv = make_batch([(sequence, done, done + chunk)], block_size, 0)
            step = backend.begin_step(batch)
            step(0, qkv.flip(0))
            found.append(step(1, qkv))
            done += chunk
        # A key that float64 rotates to the other side of a number between two of e4m3 is off by more.
        error = (torch.cat(found).double() - expected).norm() / expected.norm()
        assert error < 2e-3
        assert (expected - unrounded).norm() / expected.norm() > 10 * error
