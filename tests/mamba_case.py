"""Steps of layers of Mamba-2 on two backends, for the tests of every device."""

from __future__ import annotations

import torch
from delta_case import ROWS, STEPS, make_batch
from torch import Tensor

from microvllm.ops.attention import AttentionBackend
from microvllm.ops.mamba2 import Mamba2Config, Mamba2States, Mamba2Weights

# Heads, their size, groups, of states, of the convolution; its bias. The second are those of real models.
SIZES = {"odd": (6, 20, 3, 12, 3, True), "real": (2, 80, 1, 128, 4, False)}


def make_config(name: str, device: torch.device) -> Mamba2Config:
    heads, head_dim, groups, state_size, size, has_bias = SIZES[name]
    generator = torch.Generator().manual_seed(3)
    channels = heads * head_dim + 2 * groups * state_size

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    layers = tuple(
        Mamba2Weights(
            random(channels, size),
            random(channels) if has_bias else None,
            *(random(heads) for _ in range(3)),
            1 + 0.2 * random(heads * head_dim),
        )
        for _ in range(2)
    )
    return Mamba2Config(heads, head_dim, groups, state_size, 1e-5, ROWS, layers)


def width_of(config: Mamba2Config) -> int:
    """Of what the product in front gives."""
    return config.channels + config.inner + config.num_heads


def assert_same_steps(expected: AttentionBackend, found: AttentionBackend, device: torch.device) -> None:
    """Outputs and states of `STEPS` and of a prompt of several chunks, the first backend on a CPU.

    Rows begin full of NaN.
    """
    assert isinstance(expected, Mamba2States) and isinstance(found, Mamba2States)
    for states in (expected, found):
        states.ssm.fill_(torch.nan)
        states.conv.fill_(torch.nan)
    generator = torch.Generator().manual_seed(5)
    width = width_of(expected.config)
    for items in [*STEPS, [(1, 0, 70)], [(1, 70, 64), (0, 40, 5)]]:
        x = torch.randn(sum(count for _, _, count in items), width, generator=generator)
        theirs = expected.begin_step(make_batch(items, torch.device("cpu")))
        ours = found.begin_step(make_batch(items, device))
        a, b = theirs(1, x), ours(1, x.to(device)).cpu()
        assert (a - b).abs().max() < 2e-4 * a.abs().max()
        rows = [row for row, _, _ in items]
        for kind in ("conv", "ssm"):
            a, b = (getattr(states, kind)[1, rows].cpu() for states in (expected, found))
            assert (a - b).abs().max() < 1e-5 * max(1.0, float(a.abs().max())), kind
