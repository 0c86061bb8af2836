"""The GPU's gated delta rule beside plain torch: decodes, chunks, padding; interpreted without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

from attention_case import segment_table

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.delta_rule import DeltaConfig, DeltaWeights, RowStates, TorchDeltaRule
from microvllm.ops.gpu.delta_rule import GpuDeltaRule

ROWS = 5
# Of keys and values; not powers of two, and those of the real models.
SIZES = {"odd": (1, 2, 12, 20, 3), "real": (1, 1, 128, 128, 4)}


def make_config(name: str, device: torch.device) -> DeltaConfig:
    key_heads, heads, key_dim, value_dim, size = SIZES[name]
    generator = torch.Generator().manual_seed(3)
    channels = 2 * key_heads * key_dim + heads * value_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    layers = tuple(
        DeltaWeights(random(channels, size), random(heads), random(heads), 1 + 0.2 * random(value_dim))
        for _ in range(2)
    )
    return DeltaConfig(key_heads, heads, key_dim, value_dim, 1e-6, ROWS, layers)


def make_batch(items: list[tuple[int, int, int]], device: torch.device) -> AttentionBatch:
    """items: row, position of the first new token, and number of new tokens; decodes first; 0 is padding."""
    kind = torch.int32 if device.type == "cuda" else torch.int64
    decodes = sum(count == 1 for _, _, count in items)
    positions = torch.cat([torch.arange(start, start + count) for _, start, count in items])
    segments = [(count, start + count, [0]) for _, start, count in items[decodes:]]
    nothing = torch.zeros(len(positions), dtype=kind, device=device)
    return AttentionBatch(
        positions.to(device, kind),
        nothing,
        decodes,
        torch.zeros(decodes, 1, dtype=kind, device=device),
        torch.tensor([start + count for _, start, count in items[:decodes]], dtype=kind, device=device),
        segment_table(segments, device) if segments else None,
        torch.tensor([row for row, _, _ in items], dtype=kind, device=device),
    )


STEPS = [
    [(1, 0, 1), (3, 0, 40), (0, 0, 5)],  # a decode that begins, a prompt of two chunks, a short one
    [(3, 40, 1), (1, 1, 1), (0, 5, 2), (2, 0, 33)],  # a segment shorter than the window
    [(2, 33, 3), (0, 7, 32)],
    [(0, 39, 1), (1, 2, 1), (2, 36, 1), (3, 41, 1)],
    [(3, 0, 3)],  # another request in a row that was used
]


@pytest.mark.parametrize("name", SIZES)
def test_outputs_and_states_are_those_of_plain_torch(name: str) -> None:
    config = make_config(name, torch.device("cpu"))
    expected = TorchDeltaRule(config, torch.float32)
    found = GpuDeltaRule(make_config(name, DEVICE), torch.float32, pdl=False)
    for states in (expected, found):
        states.delta.fill_(torch.nan)
        states.conv.fill_(torch.nan)
    generator = torch.Generator().manual_seed(5)
    width = config.channels + config.values + 2 * config.num_value_heads
    for items in STEPS:
        x = torch.randn(sum(count for _, _, count in items), width, generator=generator)
        theirs = expected.begin_step(make_batch(items, torch.device("cpu")))
        ours = found.begin_step(make_batch(items, DEVICE))
        a, b = theirs(1, x), ours(1, x.to(DEVICE)).cpu()
        assert (a - b).abs().max() < 2e-4 * a.abs().max()
        rows = [row for row, _, _ in items]
        assert_same_states(expected, found, rows)


def assert_same_states(expected: RowStates, found: RowStates, rows: list[int]) -> None:
    for kind in ("conv", "delta"):
        a, b = (getattr(states, kind)[1, rows].cpu() for states in (expected, found))
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(a.abs().max())), kind


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


def test_sixteen_bits() -> None:
    config = make_config("real", torch.device("cpu"))
    expected = TorchDeltaRule(config, torch.float32)
    found = GpuDeltaRule(make_config("real", DEVICE), torch.bfloat16, pdl=False)
    width = config.channels + config.values + 2 * config.num_value_heads
    for items in STEPS[:2]:
        x = torch.randn(sum(count for _, _, count in items), width).bfloat16()
        a = expected.begin_step(make_batch(items, torch.device("cpu")))(0, x.float())
        b = found.begin_step(make_batch(items, DEVICE))(0, x.to(DEVICE)).float().cpu()
        assert (a - b).norm() / a.norm() < 2e-2
