"""The GPU's Mamba-2 beside plain torch: decodes, chunks, padding; interpreted without a GPU."""

from __future__ import annotations

from dataclasses import replace

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


def assert_close_with(x: torch.Tensor, dtype: torch.dtype, tolerance: float, **weights: float) -> None:
    """Of a prompt and then a single token, where all numbers of these weights are the same."""
    count, outputs = len(x) - 1, []
    for kind, device in ((TorchMamba2, torch.device("cpu")), (GpuMamba2, DEVICE)):
        config = make_config("real", device)
        layer = config.layers[0]
        filled = {name: torch.full_like(getattr(layer, name), value) for name, value in weights.items()}
        config = replace(config, layers=(layer._replace(**filled),))
        backend = kind(config, torch.float32) if kind is TorchMamba2 else kind(config, dtype, pdl=False)
        inputs = x.to(device, torch.float32 if kind is TorchMamba2 else dtype)
        steps = (inputs[:count], (0, 0, count)), (inputs[count:], (0, count, 1))
        parts = [backend.begin_step(make_batch([item], device))(0, part) for part, item in steps]
        outputs.append(torch.cat(parts).float().cpu())
    expected, found = outputs
    assert (found - expected).norm() < tolerance * expected.norm()


def test_small_time_steps_keep_their_bits() -> None:
    """Of states alone, whose norm shows the relative error of a step of 1e-6."""
    x = torch.randn(7, width_of(make_config("real", torch.device("cpu"))))
    assert_close_with(x, torch.float32, 1e-4, dt_bias=-14.0, skip=0.0)


def test_products_above_the_largest_number_of_float16() -> None:
    """B and C of 60 each, whose products of 128 numbers are 460,800."""
    x = torch.full((7, width_of(make_config("real", torch.device("cpu")))), 15.0)
    assert_close_with(x, torch.float16, 2e-2, conv=1.0, dt_bias=-26.0, a_log=-9.0)
