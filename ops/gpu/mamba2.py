"""Layers of Mamba-2 on a GPU: an attention backend of kernels that CUDA graphs can capture.

The reference is `ops.mamba2`. Of a prompt's chunks the products C B' are taken at once, as all heads of a
group share them; then each head, some of its values by itself, goes from chunk to chunk. Grids depend on
shapes alone: a chunk finds its segment by the starts of all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, SegmentTable
from microvllm.ops.gpu.causal_conv import Convolution, convolve_decodes, convolve_prompts, silu
from microvllm.ops.gpu.chunks import chunk_tokens
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.tf32 import float_product
from microvllm.ops.mamba2 import CHUNK, Mamba2Config, Mamba2States
from microvllm.ops.row_states import rows_of

BT = tl.constexpr(CHUNK)  # tokens of a chunk
VALUES = 32  # of a head, of a program that goes from chunk to chunk


@triton.jit
def _time_step(at, dt_bias, mask):
    """The softplus of a token's dt."""
    x = tl.load(at, mask, 0.0).to(tl.float32) + dt_bias
    power = tl.exp(tl.minimum(x, 20.0))
    # A sum with 1 cuts bits of small powers off, of which a state is a multiple: the quotient puts them back.
    above = 1 + power
    small = tl.where(above == 1, power, tl.log(above) * (power / (above - 1)))
    return tl.where(x > 20, x, small)


@triton.jit
def _step_kernel(
    out, mixed, x, ssm, rows, positions, lens, a_log, dt_bias, skip,
    W: tl.constexpr, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one head of one token."""
    follow(PDL)
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_at, n_at = tl.arange(0, BP), tl.arange(0, BN)
    in_p, in_n = p_at < P, n_at < N
    value = tl.load(mixed + i * C + h * P + p_at, in_p, 0.0).to(tl.float32)
    group = mixed + i * C + H * P + h // (H // G) * N + n_at
    b = tl.load(group, in_n, 0.0).to(tl.float32)
    c = tl.load(group + G * N, in_n, 0.0).to(tl.float32)
    dt = _time_step(x + i * W + C + H * P + h, tl.load(dt_bias + h), True)
    known = tl.load(lens + i) > 0
    own = in_p[:, None] & in_n[None, :] & known
    row = tl.load(rows + i).to(tl.int64) * H + h
    at = ssm + row * P * N + p_at[:, None] * N + n_at[None, :]
    state = tl.load(at, own & (tl.load(positions + i) > 0), 0.0)
    state = state * tl.exp(-tl.exp(tl.load(a_log + h)) * dt) + (dt * value)[:, None] * b[None, :]
    tl.store(at, state, own)
    y = tl.sum(state * c[None, :], 1) + tl.load(skip + h) * value
    tl.store(out + (i * H + h) * P + p_at, y, in_p & known)


@triton.jit
def _scores_kernel(
    scores, mixed, starts, decodes, segments,
    C: tl.constexpr, INNER: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: C B' of one chunk and one group of heads."""
    follow(PDL)
    chunk, g = tl.program_id(0), tl.program_id(1)
    first, count = chunk_tokens(chunk, starts, segments, BT, SEGMENTS)
    if count > 0:
        t, n_at = tl.arange(0, BT), tl.arange(0, BN)
        token, live = (first + t).to(tl.int64), t < count
        inside = live[:, None] & (n_at < N)[None, :]
        at = mixed + (decodes + token)[:, None] * C + INNER + g * N + n_at[None, :]
        b = tl.load(at, inside, 0.0).to(tl.float32)
        c = tl.load(at + G * N, inside, 0.0).to(tl.float32)
        product = float_product(c, tl.trans(b), PRECISION)
        tl.store(
            scores + ((token * G + g) * BT)[:, None] + t[None, :], product, live[:, None] & (t < BT)[None, :]
        )


@triton.jit
def _scan_kernel(
    out, scores, mixed, x, ssm, rows, positions, starts, decodes, a_log, dt_bias, skip,
    W: tl.constexpr, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: some values of one head, through all chunks of one segment."""
    follow(PDL)
    s, h = tl.program_id(0), tl.program_id(1)
    first = tl.load(starts + s)
    count = tl.load(starts + s + 1) - first
    if count > 0:
        g = h // (H // G)
        p_at, n_at, t = tl.program_id(2) * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, BT)
        row = tl.load(rows + decodes + s).to(tl.int64) * H + h
        at = ssm + row * P * N + p_at[None, :] * N + n_at[:, None]
        inside = (n_at < N)[:, None] & (p_at < P)[None, :]
        goes_on = tl.load(positions + decodes + first) > 0
        state = tl.load(at, inside & goes_on, 0.0)  # [BN, BP]
        rate, bias, own = -tl.exp(tl.load(a_log + h)), tl.load(dt_bias + h), tl.load(skip + h)
        for done in range(0, count, BT):
            token = (first + done + t).to(tl.int64)
            live = t < count - done
            in_n, in_p = live[:, None] & (n_at < N)[None, :], live[:, None] & (p_at < P)[None, :]
            dt = _time_step(x + (decodes + token) * W + C + H * P + h, bias, live)
            dt = tl.where(live, dt, 0.0)
            total = tl.cumsum(rate * dt, 0)
            last = tl.sum(tl.where(t == BT - 1, total, 0.0), 0)  # to its last bit that of the last token
            source = mixed + (decodes + token)[:, None] * C
            value = tl.load(source + h * P + p_at[None, :], in_p, 0.0).to(tl.float32)
            b = tl.load(source + H * P + g * N + n_at[None, :], in_n, 0.0).to(tl.float32)
            c = tl.load(source + H * P + (G + g) * N + n_at[None, :], in_n, 0.0).to(tl.float32)
            weights = tl.load(scores + ((token * G + g) * BT)[:, None] + t[None, :], live[:, None], 0.0)
            decay = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0)) * dt[None, :]
            weights = tl.where(t[:, None] >= t[None, :], weights.to(tl.float32) * decay, 0.0)
            y = float_product(weights, value, PRECISION)
            y += float_product(c * tl.exp(total)[:, None], state, PRECISION)
            to_end = dt * tl.exp(last - total)
            state *= tl.exp(last)
            state += float_product(tl.trans(b * to_end[:, None]), value, PRECISION)
            target = out + (decodes + token)[:, None] * H * P + h * P + p_at[None, :]
            tl.store(target, y + own * value, in_p)
        tl.store(at, state, inside)


@triton.jit
def _gate_kernel(
    out, x, norm, eps, lens, starts, decodes, segments,
    W: tl.constexpr, C: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    PROMPTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: the gate and the norm of one group of one token, in place; zeros of a padding token."""
    follow(PDL)
    i, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    live = False
    if i < decodes:
        live = tl.load(lens + i) > 0
    elif PROMPTS:
        live = i - decodes < tl.load(starts + segments)
    d = g * D + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < D
    at = out + i * INNER + d
    y = tl.load(at, inside & live, 0.0).to(tl.float32)
    y *= silu(tl.load(x + i * W + C + d, inside & live, 0.0).to(tl.float32))
    scale = tl.rsqrt(tl.sum(y * y, 0) / D + eps)
    tl.store(at, y * scale * tl.load(norm + d, inside, 0.0).to(tl.float32), inside)


class GpuMamba2(Mamba2States):
    """See `ops.mamba2.TorchMamba2`. A decode of context length 0 is padding and writes no state."""

    def __init__(self, config: Mamba2Config, dtype: torch.dtype, *, pdl: bool) -> None:
        super().__init__(config, dtype)
        self.pdl = pdl

    def begin_step(self, batch: AttentionBatch) -> GpuMamba2Step:
        return GpuMamba2Step(self, batch)


class GpuMamba2Step:
    """Computes one step, layer by layer; reads nothing of it on the host."""

    def __init__(self, states: GpuMamba2, batch: AttentionBatch) -> None:
        rows_of(batch)
        config = states.config
        self._states, self._batch, self._options = states, batch, launch_options(states.pdl)
        self._heads = {
            "H": config.num_heads,
            "P": config.head_dim,
            "G": config.num_groups,
            "N": config.state_size,
        }

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, channels + inner + H], x, B, C, z and dt of each token -> [n, inner]."""
        states, batch, config = self._states, self._batch, self._states.config
        x, weights = qkv.contiguous(), self._states.layers[layer]
        decodes, table = batch.num_decodes, batch.segment_table
        mixed, out = x.new_empty(len(x), config.channels), x.new_empty(len(x), config.inner)
        convolution = Convolution(weights.conv, weights.conv_bias, states.conv[layer])
        if decodes:
            convolve_decodes(convolution, x, batch, mixed, pdl=states.pdl)
            self._decode(layer, x, mixed, out)
        if decodes < len(x) and table is not None:
            convolve_prompts(convolution, x, batch, table, mixed, pdl=states.pdl)
            self._prefill(layer, x, mixed, out, table)
        size = config.inner // config.num_groups
        _gate_kernel[(len(x), config.num_groups)](
            *(out, x, weights.norm, config.eps, batch.decode_lens),
            *((None, decodes, 0) if table is None else (table.starts, decodes, len(table.starts) - 1)),
            W=x.shape[1], C=config.channels, INNER=config.inner, D=size, BLOCK=triton.next_power_of_2(size),
            PROMPTS=table is not None, num_warps=4, **self._options,
        )  # fmt: skip
        return out

    def _decode(self, layer: int, x: Tensor, mixed: Tensor, out: Tensor) -> None:
        states, batch, weights = self._states, self._batch, self._states.layers[layer]
        config = states.config
        block_p, block_n = map(triton.next_power_of_2, (config.head_dim, config.state_size))
        _step_kernel[(batch.num_decodes, config.num_heads)](
            *(out, mixed, x, states.ssm[layer], batch.rows, batch.positions, batch.decode_lens),
            *(weights.a_log, weights.dt_bias, weights.skip), W=x.shape[1], C=config.channels, **self._heads,
            BP=block_p, BN=block_n, num_warps=min(max(block_p * block_n // 2048, 1), 8), **self._options,
        )  # fmt: skip

    def _prefill(self, layer: int, x: Tensor, mixed: Tensor, out: Tensor, table: SegmentTable) -> None:
        states, batch, weights = self._states, self._batch, self._states.layers[layer]
        config, decodes, segments = states.config, batch.num_decodes, len(table.starts) - 1
        count, block_n = len(x) - decodes, max(16, triton.next_power_of_2(config.state_size))
        # Of float32 nothing is rounded; 10 bits of a factor are more than 16-bit types have.
        precision = "ieee" if x.dtype == torch.float32 else "tf32"
        # Products of many numbers of float16 may be above its largest.
        kept = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        scores = x.new_empty(count, config.num_groups, CHUNK, dtype=kept)
        _scores_kernel[(triton.cdiv(count, CHUNK) + segments, config.num_groups)](
            *(scores, mixed, table.starts, decodes, segments), C=config.channels, INNER=config.inner,
            G=config.num_groups, N=config.state_size, BN=block_n, SEGMENTS=triton.next_power_of_2(segments),
            PRECISION=precision, num_warps=4, **self._options,
        )  # fmt: skip
        part = min(VALUES, max(16, triton.next_power_of_2(config.head_dim)))
        _scan_kernel[(segments, config.num_heads, triton.cdiv(config.head_dim, part))](
            *(out, scores, mixed, x, states.ssm[layer], batch.rows, batch.positions, table.starts, decodes),
            *(weights.a_log, weights.dt_bias, weights.skip), W=x.shape[1], C=config.channels, **self._heads,
            BP=part, BN=block_n, PRECISION=precision, num_warps=8 if block_n > 64 else 4, num_stages=1,
            **self._options,
        )  # fmt: skip
