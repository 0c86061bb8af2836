"""The CPU's Mamba-2 beside plain torch, its bits in any batch and chunk, and the chunks of plain torch."""

from __future__ import annotations

import pytest
import torch
from delta_case import make_batch
from mamba_case import SIZES, assert_same_steps, make_config, width_of

from microvllm.ops.backends import make_operators
from microvllm.ops.mamba2 import TorchMamba2, chunked_scan

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunks_give_what_the_recurrence_gives(size: int) -> None:
    torch.manual_seed(1)
    x, b, c = torch.randn(45, 4, 5), torch.randn(45, 2, 3), torch.randn(45, 2, 3)
    dt, first = torch.rand(45, 4) * 9, torch.randn(4, 5, 3)
    g, state, expected = -dt * torch.rand(4) * 9, first, []
    for t in range(45):
        own, seen = (each[t].repeat_interleave(2, 0) for each in (b, c))
        state = state * g[t].exp()[:, None, None] + (dt[t, :, None] * x[t])[..., None] * own[:, None]
        expected.append((state @ seen[..., None])[..., 0])
    found, last = chunked_scan(x, b, c, g, dt, first, size)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_outputs_and_states_are_those_of_plain_torch(name: str) -> None:
    config = make_config(name, CPU)
    found = make_operators("cpu", torch.float32, 2).recurrence(config)
    assert_same_steps(TorchMamba2(config, torch.float32), found, CPU)


def test_a_sequence_has_the_same_bits_however_it_is_cut() -> None:
    config = make_config("odd", CPU)
    x = torch.randn(40, width_of(config))

    def outputs(cuts: list[int], other: int, threads: int) -> torch.Tensor:
        backend = make_operators("cpu", torch.float32, threads).recurrence(config)
        found, done = [], 0
        for count in cuts:
            # Another sequence, of single tokens that come first.
            items = [(0, done, 1)] * other + [(2, done, count)]
            step = torch.cat((torch.randn(other, x.shape[1]), x[done : done + count]))
            found.append(backend.begin_step(make_batch(items, CPU))(0, step)[other:])
            done += count
        return torch.cat(found)

    whole = outputs([40], 0, 1)
    assert outputs([1] * 40, 0, 2).equal(whole)
    assert outputs([7, 1, 30, 2], 1, 3).equal(whole)
