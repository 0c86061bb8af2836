"""The gated delta rule over states that lie at the rows of requests, in plain torch: the reference.

Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024, arXiv:2412.06464): a head keeps a matrix S, here [Dv, Dk],
and for each token, with keys and queries of length 1,

    S = exp(g) S;  u = beta (v - S k);  S = S + u k';  out = S q

where g = -exp(a_log) softplus(a + dt_bias) and beta = sigmoid(b). In front of it q, k and v go through a
causal convolution over the last few tokens of their channel and SiLU; behind it each head's output is
normalised and multiplied by SiLU of a gate z. A prompt is computed in chunks, whose tokens are solved for
together (Yang et al., 2024, arXiv:2406.06484).
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
from microvllm.ops.norm import rms_norm
from microvllm.ops.row_states import StatesByRow, StepRows, in_chunks

CHUNK = 64  # tokens that are solved for together
L2_EPS = 1e-6


class DeltaWeights(NamedTuple):
    """What a layer has beside its products.

    conv: [channels, size], the newest token last; a_log, dt_bias: [Hv] float32; norm: [Dv].
    """

    conv: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """What a backend is made for: the sizes of its heads, its layers, and how many rows there are.

    Each of `num_key_heads` queries and keys of `key_dim` is shared by as many neighbouring heads of values of
    `value_dim`. rows: of states, the padding row included; eps: of the norm behind.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    eps: float
    rows: int
    layers: Sequence[DeltaWeights]

    @property
    def conv_size(self) -> int:
        return self.layers[0].conv.shape[1]

    @property
    def channels(self) -> int:
        """Of q, k and v, which the convolution sees."""
        return 2 * self.num_key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        return self.num_value_heads * self.value_dim

    def reference(self, dtype: torch.dtype) -> AttentionBackend:
        """See `ops.row_states.Recurrence`."""
        return TorchDeltaRule(self, dtype)


class RowStates(StatesByRow):
    """What the layers keep of each row: the tokens that a convolution still sees, and the heads' matrices.

    conv: [layers, rows, size - 1, channels] of the activations' dtype, the newest last; delta: [layers, rows,
    Hv, Dv, Dk] float32.
    """

    def __init__(self, config: DeltaConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.layers = [
            DeltaWeights(each.conv.to(dtype), each.a_log.float(), each.dt_bias.float(), each.norm.to(dtype))
            for each in config.layers
        ]
        device, layers = config.layers[0].conv.device, len(config.layers)
        sizes = layers, config.rows, config.conv_size - 1, config.channels
        self.conv = lazy_zeros(sizes, dtype, device)
        heads = config.num_value_heads, config.value_dim, config.key_dim
        self.delta = lazy_zeros((layers, config.rows, *heads), torch.float32, device)
        super().__init__((self.conv, self.delta))


class TorchDeltaRule(RowStates):
    """An `AttentionBackend` of layers with the gated delta rule: what is between their two products."""

    def begin_step(self, batch: AttentionBatch) -> TorchDeltaStep:
        return TorchDeltaStep(self, batch)


class TorchDeltaStep:
    """Computes one step, layer by layer."""

    def __init__(self, states: RowStates, batch: AttentionBatch) -> None:
        self._states, self._config, self._rows = states, states.config, StepRows(batch)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, channels + values + 2 Hv], q, k, v, z, b and a of each token -> [n, values]."""
        config, weights = self._config, self._states.layers[layer]
        heads = config.num_value_heads
        qkv, z, b, a = torch.split(qkv, [config.channels, config.values, heads, heads], 1)
        beta = b.float().sigmoid()
        g = -weights.a_log.exp() * softplus(a.float() + weights.dt_bias)
        dtype = qkv.dtype
        out = torch.empty(len(qkv), heads, config.value_dim, device=qkv.device)
        count = self._rows.decodes
        if count:
            out[:count] = self._decode(layer, qkv[:count], g[:count], beta[:count])
        for start, stop, row, begins in self._rows.segments:
            part = slice(start, stop)
            out[part] = self._prefill(layer, row, begins, qkv[part], g[part], beta[part])
        normed = rms_norm(out.to(dtype), weights.norm, config.eps)
        gate = silu(z.float().view_as(out))
        return (normed * gate).to(dtype).flatten(1)

    def _decode(self, layer: int, qkv: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """One token of each row: qkv [b, channels], g and beta [b, Hv] -> [b, Hv, Dv] float32."""
        states, rows, begins = self._states, self._rows.rows, self._rows.begins.view(-1, 1, 1)
        weight = states.layers[layer].conv
        q, k, v = _heads(self._config, convolve_decodes(states.conv[layer], rows, begins, qkv, weight))
        state = states.delta[layer][rows].masked_fill(begins[..., None], 0)
        state *= g.exp()[..., None, None]
        update = beta[..., None] * (v - (state @ k[..., None])[..., 0])
        state += update[..., None] * k[..., None, :]
        states.delta[layer][rows] = state
        return (state @ q[..., None])[..., 0]

    def _prefill(self, layer: int, row: int, begins: bool, qkv: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """Neighbouring tokens of one row: qkv [t, channels], g and beta [t, Hv] -> [t, Hv, Dv] float32."""
        conv, state = self._states.conv[layer, row], self._states.delta[layer, row]
        if begins:
            conv.zero_()
            state.zero_()
        q, k, v = _heads(self._config, convolve_segment(conv, qkv, self._states.layers[layer].conv))
        out, last = chunked_delta_rule(q, k, v, g, beta, state)
        state.copy_(last)
        return out


def _heads(config: DeltaConfig, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n, channels] -> q and k, of length 1 (q: Dk ** -0.5), and v of each head: [n, Hv, D] float32."""
    keys = config.num_key_heads * config.key_dim
    qk, v = torch.split(qkv.float(), [2 * keys, config.values], 1)
    qk = qk.view(-1, 2, config.num_key_heads, config.key_dim)
    qk = qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + L2_EPS)
    q, k = qk.repeat_interleave(config.num_value_heads // config.num_key_heads, 2).unbind(1)
    return q * config.key_dim**-0.5, k, v.view(-1, config.num_value_heads, config.value_dim)


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, size: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return the outputs, [t, H, Dv], and the last state, of tokens behind a state, [H, Dv, Dk].

    q, k: [t, H, Dk]; v: [t, H, Dv]; g, beta: [t, H]; all float32. With G, the sum of g from the start of its
    chunk, the updates u of a chunk of `size` tokens solve

        u_t + beta_t sum_(i < t) exp(G_t - G_i) (k_t . k_i) u_i = beta_t (v_t - exp(G_t) S k_t)

    whose left side is inverted for all chunks at once; only S goes from chunk to chunk.
    """
    count = len(q)
    # [chunks, H, size, ...]; a padding token has beta 0 and changes nothing.
    q, k, v, g, beta = (in_chunks(x, size) for x in (q, k, v, g, beta))
    total = g.cumsum(-1)
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # Above the diagonal the differences are positive, and their powers may overflow.
    decay = (total[..., None] - total[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    scores = (q @ k.mT) * decay
    system = (k @ k.mT) * decay * beta[..., None]
    kept = total.exp()[..., None]
    right = torch.cat((v, k * kept), -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, of_state = torch.split(solved, [v.shape[-1], k.shape[-1]], -1)
    to_end = (total[..., -1:] - total).exp()[..., None]
    outputs = []
    for i in range(len(q)):
        updates = own[i] - of_state[i] @ state.mT
        outputs.append(scores[i] @ updates + (q[i] * kept[i]) @ state.mT)
        state = state * kept[i, :, -1:] + updates.mT @ (k[i] * to_end[i])
    return torch.stack(outputs).transpose(1, 2).flatten(0, 1)[:count], state
