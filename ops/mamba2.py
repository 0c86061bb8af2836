"""Mamba-2's recurrence over states that lie at the rows of requests, in plain torch: the reference.

State space duality (Dao and Gu, 2024, arXiv:2405.21060): a head keeps a matrix S, here [P, N], and for each
token, with x of the head and B and C of its group of heads,

    S = exp(g) S + dt x B';  y = S C + D x

where dt = softplus(dt + dt_bias) and g = -exp(a_log) dt. In front of it x, B and C go through a causal
convolution over the last few tokens of their channel and SiLU; behind it y is multiplied by SiLU of a gate z,
and normalised group by group. A prompt is computed in chunks, of which each is a masked product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from microvllm.ops.attention import AttentionBackend, AttentionBatch
from microvllm.ops.causal_conv import convolve_decodes, convolve_segment
from microvllm.ops.memory import lazy_zeros
from microvllm.ops.row_states import StatesByRow, StepRows, in_chunks

CHUNK = 64  # tokens that are multiplied together


class Mamba2Weights(NamedTuple):
    """What a layer has beside its products.

    conv: [channels, size], the newest token last; conv_bias: [channels], or None; a_log, dt_bias, skip (D):
    [H] float32; norm: [H P].
    """

    conv: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    dt_bias: Tensor
    skip: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True)
class Mamba2Config:
    """What a backend is made for: the sizes of its heads, its layers, and how many rows there are.

    As many neighbouring heads, each of `head_dim` numbers x, share B and C, of `state_size` numbers, of each
    of `num_groups`, and the norm behind. rows: of states, the padding row included; eps: of the norm.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    eps: float
    rows: int
    layers: Sequence[Mamba2Weights]

    @property
    def conv_size(self) -> int:
        return self.layers[0].conv.shape[1]

    @property
    def inner(self) -> int:
        """Of x, of the gate, and of what comes out."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of x, B and C, which the convolution sees."""
        return self.inner + 2 * self.num_groups * self.state_size

    def reference(self, dtype: torch.dtype) -> AttentionBackend:
        """See `ops.row_states.Recurrence`."""
        return TorchMamba2(self, dtype)


class Mamba2States(StatesByRow):
    """What the layers keep of each row: the tokens that a convolution still sees, and the heads' matrices.

    conv: [layers, rows, size - 1, channels] of the activations' dtype, the newest last; ssm: [layers, rows,
    H, P, N] float32.
    """

    def __init__(self, config: Mamba2Config, dtype: torch.dtype) -> None:
        self.config = config
        self.layers = [
            Mamba2Weights(
                each.conv.to(dtype),
                None if each.conv_bias is None else each.conv_bias.to(dtype),
                each.a_log.float(),
                each.dt_bias.float(),
                each.skip.float(),
                each.norm.to(dtype),
            )
            for each in config.layers
        ]
        device, layers = config.layers[0].conv.device, len(config.layers)
        sizes = layers, config.rows, config.conv_size - 1, config.channels
        self.conv = lazy_zeros(sizes, dtype, device)
        heads = config.num_heads, config.head_dim, config.state_size
        self.ssm = lazy_zeros((layers, config.rows, *heads), torch.float32, device)
        super().__init__((self.conv, self.ssm))


class TorchMamba2(Mamba2States):
    """An `AttentionBackend` of layers of Mamba-2: what is between their two products."""

    def begin_step(self, batch: AttentionBatch) -> TorchMamba2Step:
        return TorchMamba2Step(self, batch)


class TorchMamba2Step:
    """Computes one step, layer by layer."""

    def __init__(self, states: Mamba2States, batch: AttentionBatch) -> None:
        self._states, self._config, self._rows = states, states.config, StepRows(batch)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, channels + inner + H], x, B, C, z and dt of each token -> [n, inner]."""
        config, weights = self._config, self._states.layers[layer]
        mixed, z, dt = torch.split(qkv, [config.channels, config.inner, config.num_heads], 1)
        dt = softplus(dt.float() + weights.dt_bias)
        g = -weights.a_log.exp() * dt
        out = torch.empty(len(qkv), config.num_heads, config.head_dim, device=qkv.device)
        count = self._rows.decodes
        if count:
            out[:count] = self._decode(layer, mixed[:count], g[:count], dt[:count])
        for start, stop, row, begins in self._rows.segments:
            part = slice(start, stop)
            out[part] = self._prefill(layer, row, begins, mixed[part], g[part], dt[part])
        gated = (out.flatten(1) * silu(z.float())).view(len(qkv), config.num_groups, -1)
        scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + config.eps)
        return (gated * scale).flatten(1).to(qkv.dtype) * weights.norm

    def _decode(self, layer: int, mixed: Tensor, g: Tensor, dt: Tensor) -> Tensor:
        """One token of each row: mixed [b, channels], g and dt [b, H] -> [b, H, P] float32."""
        states, rows, begins = self._states, self._rows.rows, self._rows.begins.view(-1, 1, 1)
        weights = states.layers[layer]
        convolution = weights.conv, weights.conv_bias
        x, b, c = self._parts(convolve_decodes(states.conv[layer], rows, begins, mixed, *convolution))
        state = states.ssm[layer][rows].masked_fill(begins[..., None], 0)
        share = self._config.num_heads // self._config.num_groups
        b, c = (each.repeat_interleave(share, 1) for each in (b, c))
        state = state * g.exp()[..., None, None] + (dt[..., None] * x)[..., None] * b[:, :, None]
        states.ssm[layer][rows] = state
        return (state @ c[..., None])[..., 0] + weights.skip[:, None] * x

    def _prefill(self, layer: int, row: int, begins: bool, mixed: Tensor, g: Tensor, dt: Tensor) -> Tensor:
        """Neighbouring tokens of one row: mixed [t, channels], g and dt [t, H] -> [t, H, P] float32."""
        conv, state = self._states.conv[layer, row], self._states.ssm[layer, row]
        if begins:
            conv.zero_()
            state.zero_()
        weights = self._states.layers[layer]
        x, b, c = self._parts(convolve_segment(conv, mixed, weights.conv, weights.conv_bias))
        out, last = chunked_scan(x, b, c, g, dt, state)
        state.copy_(last)
        return out + weights.skip[:, None] * x

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, channels] -> x of each head, [n, H, P], and B and C of each group, [n, G, N], float32."""
        config = self._config
        x, b, c = torch.split(mixed.float(), [config.inner, *2 * [(config.channels - config.inner) // 2]], 1)
        groups = len(mixed), config.num_groups, config.state_size
        return x.view(len(mixed), config.num_heads, config.head_dim), b.view(groups), c.view(groups)


def chunked_scan(
    x: Tensor, b: Tensor, c: Tensor, g: Tensor, dt: Tensor, state: Tensor, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return S C of each token, [t, H, P], and the last state, of tokens behind a state S, [H, P, N].

    x: [t, H, P]; b, c: [t, G, N]; g, dt: [t, H]; all float32. With L, the sum of g from the start of its
    chunk, a token of a chunk has

        y_t = exp(L_t) S C_t + sum_(i <= t) exp(L_t - L_i) (C_t . B_i) dt_i x_i

    of which only S goes from chunk to chunk.
    """
    count, share = len(x), x.shape[1] // b.shape[1]
    # [chunks, H or G, size, ...]; a padding token has dt and g 0 and changes nothing.
    x, b, c, g, dt = (in_chunks(each, size) for each in (x, b, c, g, dt))
    total = g.cumsum(-1)
    seen = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    # Above the diagonal the differences are positive, and their powers may overflow.
    decay = (total[..., None] - total[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    scores = (c @ b.mT).repeat_interleave(share, 1) * decay * dt[..., None, :]
    own, kept = scores @ x, total.exp()[..., None]
    to_end = (dt * (total[..., -1:] - total).exp())[..., None]
    added = (x * to_end).mT @ b.repeat_interleave(share, 1)
    outputs = []
    for i in range(len(x)):
        outputs.append(own[i] + kept[i] * (c[i].repeat_interleave(share, 0) @ state.mT))
        state = state * kept[i, :, -1:] + added[i]
    return torch.stack(outputs).transpose(1, 2).flatten(0, 1)[:count], state
