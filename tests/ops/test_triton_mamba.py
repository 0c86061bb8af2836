"""The GPU's Mamba-2 beside plain torch: decodes, chunks, padding; interpreted without a GPU."""

from __future__ import annotations

import pytest
import torch

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

from delta_case import STEPS, make_batch
from mamba_case import SIZES, assert_same_steps, make_config, width_of

from microvllm.ops.attention import AttentionBatch, SegmentTable
from microvllm.ops.gpu.mamba2 import GpuMamba2
from microvllm.ops.mamba2 import TorchMamba2


@pytest.mark.parametrize("name", SIZES)
def test_outputs_and_states_are_those_of_plain_torch(name: str) -> None:
    expected = TorchMamba2(make_config(name, torch.device("cpu")), torch.float32)
    assert_same_steps(expected, GpuMamba2(make_config(name, DEVICE), torch.float32, pdl=False), DEVICE)


def test_padding_writes_no_state_and_is_zero() -> None:
    """Of captured steps: decodes of context length 0, empty segments, tokens behind the last segment."""
    config = make_config("odd", DEVICE)
    states = GpuMamba2(config, torch.float32, pdl=False)
    states.ssm.fill_(7.0)
    states.conv.fill_(7.0)
    x = torch.randn(2 + 20, width_of(config)).to(DEVICE)
    batch = make_batch([(0, 3, 1), (4, 0, 1), (1, 0, 9)], DEVICE)
    batch.decode_lens[1] = 0
    starts = torch.tensor([0, 9, 9, 9], dtype=torch.int32, device=DEVICE)
    table = SegmentTable(starts, starts[1:], batch.decode_blocks[:1].repeat(3, 1), 20)
    rows = torch.tensor([0, 4, 1, 4, 4], dtype=torch.int32, device=DEVICE)
    positions = torch.cat((batch.positions, batch.positions.new_zeros(11)))
    padded = AttentionBatch(positions, positions, 2, batch.decode_blocks, batch.decode_lens, table, rows)
    out = states.begin_step(padded)(0, x)
    assert out.isfinite().all()
    assert not out[1].any() and not out[2 + 9 :].any() and out[0].any() and out[2 : 2 + 9].any()
    for kept in (states.ssm, states.conv):
        assert (kept[0, 4] == 7.0).all() and (kept[0, 2] == 7.0).all() and (kept[1] == 7.0).all()
        assert not (kept[0, 0] == 7.0).all() and not (kept[0, 1] == 7.0).any()


def test_sixteen_bits() -> None:
    config = make_config("real", torch.device("cpu"))
    expected = TorchMamba2(config, torch.float32)
    found = GpuMamba2(make_config("real", DEVICE), torch.bfloat16, pdl=False)
    for items in STEPS[:2]:
        x = torch.randn(sum(count for _, _, count in items), width_of(config)).bfloat16()
        a = expected.begin_step(make_batch(items, torch.device("cpu")))(0, x.float())
        b = found.begin_step(make_batch(items, DEVICE))(0, x.to(DEVICE)).float().cpu()
        assert (a - b).norm() / a.norm() < 2e-2
