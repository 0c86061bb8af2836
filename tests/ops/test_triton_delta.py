"""The GPU's gated delta rule beside plain torch: decodes, chunks, padding; interpreted without a GPU."""

from __future__ import annotations

import pytest
import torch

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

from delta_case import SIZES, STEPS, assert_same_steps, make_batch, make_config

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.delta_rule import TorchDeltaRule
from microvllm.ops.gpu.delta_rule import GpuDeltaRule


@pytest.mark.parametrize("name", SIZES)
def test_outputs_and_states_are_those_of_plain_torch(name: str) -> None:
    expected = TorchDeltaRule(make_config(name, torch.device("cpu")), torch.float32)
    assert_same_steps(expected, GpuDeltaRule(make_config(name, DEVICE), torch.float32, pdl=False), DEVICE)


def test_padding_writes_no_state_and_is_finite() -> None:
    """Of captured steps: decodes of context length 0, empty segments, tokens behind the last segment."""
    config = make_config("odd", DEVICE)
    states = GpuDeltaRule(config, torch.float32, pdl=False)
    states.delta.fill_(7.0)
    states.conv.fill_(7.0)
    kind = torch.int32
    x = torch.randn(2 + 20, config.channels + config.values + 2 * config.num_value_heads).to(DEVICE)
    batch = make_batch([(0, 3, 1), (4, 0, 1), (1, 0, 9)], DEVICE)
    batch.decode_lens[1] = 0
    starts = torch.tensor([0, 9, 9, 9], dtype=kind, device=DEVICE)
    table = type(batch.segment_table)(starts, starts[1:], batch.decode_blocks[:1].repeat(3, 1), 20)  # type: ignore[misc]
    rows = torch.tensor([0, 4, 1, 4, 4], dtype=kind, device=DEVICE)
    positions = torch.cat((batch.positions, batch.positions.new_zeros(11)))
    padded = AttentionBatch(positions, positions, 2, batch.decode_blocks, batch.decode_lens, table, rows)
    out = states.begin_step(padded)(0, x)
    assert out.isfinite().all()
    assert not out[1].any() and not out[2 + 9 :].any() and out[0].any() and out[2 : 2 + 9].any()
    for kept in (states.delta, states.conv):
        assert (kept[0, 4] == 7.0).all() and (kept[0, 2] == 7.0).all() and (kept[1] == 7.0).all()
        assert not (kept[0, 0] == 7.0).all() and not (kept[0, 1] == 7.0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_cost_a_state_no_more_than_rounding_the_inputs(dtype: torch.dtype) -> None:
    """As in plain torch, which computes all behind the convolution in float32, as transformers does."""
    cpu = torch.device("cpu")
    config = make_config("real", cpu)
    exact, rounding = TorchDeltaRule(config, torch.float32), TorchDeltaRule(config, dtype)
    found = GpuDeltaRule(make_config("real", DEVICE), dtype, pdl=False)
    width = config.channels + config.values + 2 * config.num_value_heads
    generator = torch.Generator().manual_seed(7)
    for items in STEPS[:2]:
        x = torch.randn(sum(count for _, _, count in items), width, generator=generator).to(dtype)
        a = exact.begin_step(make_batch(items, cpu))(0, x.float())
        b = rounding.begin_step(make_batch(items, cpu))(0, x).float()
        c = found.begin_step(make_batch(items, DEVICE))(0, x.to(DEVICE)).float().cpu()
        rows = [row for row, _, count in items if count > 1]
        states = [each.delta[0, rows].cpu() for each in (exact, rounding, found)]
        for expected, nearest, ours in ((a, b, c), states):
            assert (ours - expected).norm() < 1.2 * (nearest - expected).norm()
