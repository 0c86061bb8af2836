"""The gated delta rule of single tokens, which reads and writes a state once; see `ops.delta_rule`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.delta_rule import L2_EPS, RowStates
from microvllm.ops.gpu.causal_conv import Convolution, convolve_decodes, silu
from microvllm.ops.gpu.launch import follow, launch_options


@triton.jit
def decay_of(a, a_log, dt_bias):
    """The logarithm of what a head's state keeps."""
    x = a + dt_bias
    return -tl.exp(a_log) * tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _delta_kernel(
    out, mixed, x, delta, rows, positions, lens, a_log, dt_bias, norm, eps, l2_eps,
    W: tl.constexpr, C: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one head of one token, with its norm and its gate."""
    follow(PDL)
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k_at, v_at = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = k_at < DK, v_at < DV
    key = mixed + i * C + (h // (HV // HK)) * DK + k_at
    q = tl.load(key, in_k, 0.0).to(tl.float32)
    k = tl.load(key + HK * DK, in_k, 0.0).to(tl.float32)
    v = tl.load(mixed + i * C + 2 * HK * DK + h * DV + v_at, in_v, 0.0).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q, 0) + l2_eps) * (DK**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + l2_eps)
    gates = x + i * W + C
    z = tl.load(gates + h * DV + v_at, in_v, 0.0).to(tl.float32)
    b = tl.load(gates + HV * DV + h).to(tl.float32)
    a = tl.load(gates + HV * DV + HV + h).to(tl.float32)
    kept = tl.exp(decay_of(a, tl.load(a_log + h), tl.load(dt_bias + h)))

    own = in_v[:, None] & in_k[None, :] & (tl.load(lens + i) > 0)
    row = tl.load(rows + i).to(tl.int64) * HV + h
    at = delta + row * DV * DK + v_at[:, None] * DK + k_at[None, :]
    state = tl.load(at, own & (tl.load(positions + i) > 0), 0.0) * kept
    update = tl.sigmoid(b) * (v - tl.sum(state * k[None, :], 1))
    state += update[:, None] * k[None, :]
    tl.store(at, state, own)
    y = tl.sum(state * q[None, :], 1).to(out.dtype.element_ty).to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, 0) / DV + eps)
    y = y * scale * tl.load(norm + v_at, in_v, 0.0).to(tl.float32) * silu(z)
    # Padding has no state and may be anything, but finite.
    tl.store(out + (i * HV + h) * DV + v_at, tl.where(tl.load(lens + i) > 0, y, 0.0), in_v)


def decode(
    states: RowStates, layer: int, x: Tensor, batch: AttentionBatch, mixed: Tensor, out: Tensor, *, pdl: bool
) -> None:
    """x: [n, width] as in `TorchDeltaStep`, the decodes first -> out: [n, values]; mixed: [n, channels]."""
    config, weights = states.config, states.layers[layer]
    count, width = batch.num_decodes, x.shape[1]
    where = batch.rows, batch.positions, batch.decode_lens
    convolution = Convolution(weights.conv, None, states.conv[layer])
    convolve_decodes(convolution, x, batch, mixed, pdl=pdl)
    block_k, block_v = (triton.next_power_of_2(size) for size in (config.key_dim, config.value_dim))
    _delta_kernel[(count, config.num_value_heads)](
        *(out, mixed, x, states.delta[layer], *where),
        *(weights.a_log, weights.dt_bias, weights.norm, config.eps, L2_EPS),
        W=width,
        C=config.channels,
        HK=config.num_key_heads,
        HV=config.num_value_heads,
        DK=config.key_dim,
        DV=config.value_dim,
        BK=block_k,
        BV=block_v,
        # No number of a state is in two warps, of which one could store it before the other reads.
        num_warps=min(max(block_k * block_v // 2048, 1), 8),
        **launch_options(pdl),
    )
