"""The CPU's gated delta rule beside plain torch, and its bits in any batch, chunk and number of threads."""

from __future__ import annotations

import pytest
import torch
from delta_case import SIZES, assert_same_steps, make_batch, make_config

from microvllm.ops.backends import make_operators
from microvllm.ops.delta_rule import TorchDeltaRule

CPU = torch.device("cpu")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", SIZES)
def test_outputs_and_states_are_those_of_plain_torch(name: str, threads: int) -> None:
    config = make_config(name, CPU)
    found = make_operators("cpu", torch.float32, threads).recurrence(config)
    assert_same_steps(TorchDeltaRule(config, torch.float32), found, CPU)


@pytest.mark.parametrize("name", SIZES)
def test_a_sequence_has_the_same_bits_however_it_is_cut(name: str) -> None:
    config = make_config(name, CPU)
    x = torch.randn(40, config.channels + config.values + 2 * config.num_value_heads)

    def outputs(cuts: list[int], others: list[tuple[int, int, int]], threads: int) -> torch.Tensor:
        backend = make_operators("cpu", torch.float32, threads).recurrence(config)
        found, done = [], 0
        for count in cuts:
            # Single tokens come first.
            items = sorted([(2, done, count), *others], key=lambda item: item[2] > 1)
            at = sum(new for _, _, new in items[: items.index((2, done, count))])
            total = sum(new for _, _, new in items)
            step = torch.randn(total, x.shape[1])
            step[at : at + count] = x[done : done + count]
            found.append(backend.begin_step(make_batch(items, CPU))(0, step)[at : at + count])
            done += count
        return torch.cat(found)

    whole = outputs([40], [], 1)
    assert outputs([1] * 40, [], 2).equal(whole)
    assert outputs([7, 1, 30, 2], [(0, 0, 9), (3, 4, 1), (1, 2, 1)], 3).equal(whole)
