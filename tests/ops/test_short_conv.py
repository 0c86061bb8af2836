"""Gated short convolutions of steps of decodes, chunks and padding, beside whole sequences by conv1d."""

from __future__ import annotations

import pytest
import torch
from delta_case import ROWS, STEPS, make_batch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.short_conv import ConvWeights, TorchShortConv

CHANNELS, CPU = 6, torch.device("cpu")


def make_states(size: int, dtype: torch.dtype = torch.float32) -> TorchShortConv:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layers = [
        ConvWeights(random(CHANNELS, size), random(CHANNELS)),
        ConvWeights(random(CHANNELS, size), None),
    ]
    states = TorchShortConv(layers, ROWS, dtype)
    states.kept.fill_(torch.nan)
    return states


def whole(states: TorchShortConv, layer: int, bcx: Tensor) -> Tensor:
    """bcx: [t, 3 C], all tokens of a sequence -> [t, C]."""
    b, c, x = bcx.chunk(3, 1)
    weight, bias = states.layers[layer]
    padded = pad((b * x).T, (len(weight) - 1, 0))
    return c * conv1d(padded[None], weight.T[:, None], bias, groups=CHANNELS)[0].T


@pytest.mark.parametrize("size", [2, 3, 5])
def test_outputs_are_those_of_whole_sequences(size: int) -> None:
    states, seen = make_states(size), dict[int, Tensor]()
    generator = torch.Generator().manual_seed(5)
    for items in STEPS:
        bcx = torch.randn(sum(count for _, _, count in items), 3 * CHANNELS, generator=generator)
        step = states.begin_step(make_batch(items, CPU))
        parts = bcx.split([count for _, _, count in items])
        for (row, start, _), part in zip(items, parts, strict=True):
            seen[row] = torch.cat((seen[row], part)) if start else part
        for layer in range(2):
            found = step(layer, bcx).split([count for _, _, count in items])
            for (row, start, _), part in zip(items, found, strict=True):
                assert part.allclose(whole(states, layer, seen[row])[start:], atol=1e-5)


def test_padding_writes_no_state_of_another_row_and_is_finite() -> None:
    """Of captured steps: decodes of context length 0, empty segments, tokens behind the last segment."""
    states, plain = make_states(3), make_states(3)
    for each in (states, plain):
        each.kept.fill_(7.0)
    bcx = torch.randn(2 + 20, 3 * CHANNELS)
    batch = make_batch([(0, 3, 1), (4, 0, 1), (1, 0, 9)], CPU)
    expected = plain.begin_step(batch)(0, bcx[:11])
    batch.decode_lens[1] = 0
    starts = torch.tensor([0, 9, 9, 9])
    table = type(batch.segment_table)(starts, starts[1:], batch.decode_blocks[:1].repeat(3, 1), 20)  # type: ignore[misc]
    rows, positions = torch.tensor([0, 4, 1, 4, 4]), torch.cat((batch.positions, torch.zeros(11).long()))
    padded = AttentionBatch(positions, positions, 2, batch.decode_blocks, batch.decode_lens, table, rows)
    out = states.begin_step(padded)(0, bcx)
    assert out.isfinite().all() and out[:11].equal(expected)
    assert states.kept[0, :4].equal(plain.kept[0, :4]) and (states.kept[1] == 7.0).all()
    # A captured step of nothing but padding.
    only = torch.zeros(4, dtype=torch.long)
    none = type(table)(only[:3], only[:2], batch.decode_blocks[:1].repeat(2, 1), 3)
    idle = AttentionBatch(only, only, 1, batch.decode_blocks[:1], only[:1], none, torch.tensor([4, 4, 4]))
    before = states.kept[:, :4].clone()
    assert states.begin_step(idle)(0, bcx[:4]).isfinite().all() and states.kept[:, :4].equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_any_chunk(dtype: torch.dtype) -> None:
    bcx = torch.randn(37, 3 * CHANNELS).to(dtype)
    expected = make_states(4, dtype).begin_step(make_batch([(0, 0, 37)], CPU))(0, bcx)
    for sizes in ([1] * 37, [2, 3, 17, 1, 14]):
        states, start = make_states(4, dtype), 0
        for count in sizes:
            part = slice(start, start + count)
            found = states.begin_step(make_batch([(3, start, count)], CPU))(0, bcx[part])
            assert found.equal(expected[part])
            start += count


def test_a_copied_row_goes_on_as_the_other() -> None:
    states, bcx = make_states(3), torch.randn(9, 3 * CHANNELS)
    states.begin_step(make_batch([(0, 0, 8)], CPU))(1, bcx[:8])
    states.copy_row(0, 2)
    last = [states.begin_step(make_batch([(row, 8, 1)], CPU))(1, bcx[8:]) for row in (0, 2)]
    assert last[0].equal(last[1]) and last[0].isfinite().all()
