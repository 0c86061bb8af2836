"""Steps of layers of a gated delta rule: decodes and chunks of prompts, for the tests of every device."""

from __future__ import annotations

import torch
from attention_case import segment_table
from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionBatch
from microvllm.ops.delta_rule import DeltaConfig, DeltaWeights, RowStates

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


def assert_same_steps(expected: AttentionBackend, found: AttentionBackend, device: torch.device) -> None:
    """Outputs and states of `STEPS` on two backends, the first on a CPU, whose rows begin full of NaN."""
    assert isinstance(expected, RowStates) and isinstance(found, RowStates)
    config = expected.config
    for states in (expected, found):
        states.delta.fill_(torch.nan)
        states.conv.fill_(torch.nan)
    generator = torch.Generator().manual_seed(5)
    width = config.channels + config.values + 2 * config.num_value_heads
    for items in STEPS:
        x = torch.randn(sum(count for _, _, count in items), width, generator=generator)
        theirs = expected.begin_step(make_batch(items, torch.device("cpu")))
        ours = found.begin_step(make_batch(items, device))
        a, b = theirs(1, x), ours(1, x.to(device)).cpu()
        assert (a - b).abs().max() < 2e-4 * a.abs().max()
        rows = [row for row, _, _ in items]
        for kind in ("conv", "delta"):
            a, b = (getattr(states, kind)[1, rows].cpu() for states in (expected, found))
            assert (a - b).abs().max() < 1e-5 * max(1.0, float(a.abs().max())), kind
