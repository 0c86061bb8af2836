"""The gated delta rule of prompts, in chunks; the reference is `ops.delta_rule.chunked_delta_rule`.

All chunks of a step are prepared at once: what does not depend on the state in front of a chunk, which is all
but four products. These go from chunk to chunk, for each head and some of its values by itself. Grids depend
on shapes alone: a chunk finds its segment by the starts of all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.delta_rule import L2_EPS, RowStates
from microvllm.ops.gpu.causal_conv import Convolution, convolve_prompts, silu
from microvllm.ops.gpu.chunks import chunk_tokens
from microvllm.ops.gpu.delta_decode import decay_of
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.tf32 import float_product

CHUNK = tl.constexpr(32)  # tokens that are solved for together
VALUES = 32  # of a head, of a program that goes from chunk to chunk


@triton.jit
def _prepare_kernel(
    right, own, scores, totals, mixed, x, a_log, dt_bias, starts, decodes, segments, l2_eps,
    W: tl.constexpr, C: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one head of one chunk."""
    follow(PDL)
    chunk, h = tl.program_id(0), tl.program_id(1)
    first, count = chunk_tokens(chunk, starts, segments, CHUNK, SEGMENTS)
    if count > 0:
        t = tl.arange(0, CHUNK)
        token = (first + t).to(tl.int64)
        live = t < count
        k_at, v_at = tl.arange(0, BK), tl.arange(0, BV)
        in_k, in_v = live[:, None] & (k_at < DK)[None, :], live[:, None] & (v_at < DV)[None, :]
        key = mixed + (decodes + token)[:, None] * C + (h // (HV // HK)) * DK + k_at[None, :]
        q = tl.load(key, in_k, 0.0).to(tl.float32)
        k = tl.load(key + HK * DK, in_k, 0.0).to(tl.float32)
        value = mixed + (decodes + token)[:, None] * C + 2 * HK * DK + h * DV + v_at[None, :]
        v = tl.load(value, in_v, 0.0).to(tl.float32)
        q *= (tl.rsqrt(tl.sum(q * q, 1) + l2_eps) * (DK**-0.5))[:, None]
        k *= tl.rsqrt(tl.sum(k * k, 1) + l2_eps)[:, None]
        gates = x + (decodes + token) * W + C + HV * DV + h
        beta = tl.where(live, tl.sigmoid(tl.load(gates, live, 0.0).to(tl.float32)), 0.0)
        a = tl.load(gates + HV, live, 0.0).to(tl.float32)
        g = tl.where(live, decay_of(a, tl.load(a_log + h), tl.load(dt_bias + h)), 0.0)
        total = tl.cumsum(g, 0)
        later, earlier = t[:, None], t[None, :]
        decay = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))
        keys = tl.trans(k)
        system = float_product(k, keys, PRECISION) * decay * beta[:, None]
        system = tl.where(later > earlier, system, 0.0)
        # Row by row by substitution: sums of the powers of the system would cancel each other.
        inverse = tl.where(later == earlier, 1.0, 0.0)
        for i in range(1, CHUNK):
            row = tl.sum(tl.where(later == i, system, 0.0), 0)
            update = tl.sum(row[:, None] * inverse, 0)
            inverse = tl.where(later == i, inverse - update[None, :], inverse)
        kept = (beta * tl.exp(total))[:, None] * k
        kept = float_product(inverse, kept, PRECISION)
        updates = float_product(inverse, beta[:, None] * v, PRECISION)
        attended = float_product(q, keys, PRECISION) * decay
        attended = tl.where(later >= earlier, attended, 0.0)
        place = (token * HV + h)[:, None]
        tl.store(right + place * DK + k_at[None, :], kept, in_k)
        tl.store(own + place * DV + v_at[None, :], updates, in_v)
        tl.store(scores + place * CHUNK + earlier, attended, live[:, None] & (earlier < CHUNK))
        tl.store(totals + token * HV + h, total, live)


@triton.jit
def _chunks_kernel(
    out, right, own, scores, totals, mixed, delta, rows, positions, starts, decodes, l2_eps,
    C: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: some values of one head, through all chunks of one segment."""
    follow(PDL)
    s, h = tl.program_id(0), tl.program_id(1)
    first = tl.load(starts + s)
    count = tl.load(starts + s + 1) - first
    if count > 0:
        k_at, v_at = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
        t = tl.arange(0, CHUNK)
        row = tl.load(rows + decodes + s).to(tl.int64) * HV + h
        at = delta + row * DV * DK + v_at[None, :] * DK + k_at[:, None]
        inside = (k_at < DK)[:, None] & (v_at < DV)[None, :]
        goes_on = tl.load(positions + decodes + first) > 0
        state = tl.load(at, inside & goes_on, 0.0)  # [BK, BV]
        for done in range(0, count, CHUNK):
            token = (first + done + t).to(tl.int64)
            live = t < count - done
            in_k, in_v = live[:, None] & (k_at < DK)[None, :], live[:, None] & (v_at < DV)[None, :]
            place = (token * HV + h)[:, None]
            key = mixed + (decodes + token)[:, None] * C + (h // (HV // HK)) * DK + k_at[None, :]
            q = tl.load(key, in_k, 0.0).to(tl.float32)
            k = tl.load(key + HK * DK, in_k, 0.0).to(tl.float32)
            q *= (tl.rsqrt(tl.sum(q * q, 1) + l2_eps) * (DK**-0.5))[:, None]
            k *= tl.rsqrt(tl.sum(k * k, 1) + l2_eps)[:, None]
            total = tl.load(totals + token * HV + h, live, 0.0)
            last = tl.load(
                totals + (first + done + tl.minimum(CHUNK, count - done) - 1).to(tl.int64) * HV + h
            )
            of_state = tl.load(right + place * DK + k_at[None, :], in_k, 0.0).to(tl.float32)
            updates = tl.load(own + place * DV + v_at[None, :], in_v, 0.0).to(tl.float32)
            updates -= float_product(of_state, state, PRECISION)
            weights = tl.load(scores + place * CHUNK + t[None, :], live[:, None] & (t < CHUNK)[None, :], 0.0)
            y = float_product(weights.to(tl.float32), updates, PRECISION)
            y += float_product(q * tl.exp(total)[:, None], state, PRECISION)
            to_end = tl.where(live, tl.exp(last - total), 0.0)
            state *= tl.exp(last)
            state += float_product(tl.trans(k * to_end[:, None]), updates, PRECISION)
            target = out + (decodes + token)[:, None] * HV * DV + h * DV + v_at[None, :]
            tl.store(target, y, in_v)
        tl.store(at, state, inside)


@triton.jit
def _norm_kernel(
    out, x, norm, eps, starts, decodes, segments,
    W: tl.constexpr, C: tl.constexpr, HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: the norm and the gate of one head of one token, in place; zeros of a padding token."""
    follow(PDL)
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v_at = tl.arange(0, BV)
    in_v = v_at < DV
    live = t < tl.load(starts + segments)
    at = out + ((decodes + t) * HV + h) * DV + v_at
    y = tl.load(at, in_v & live, 0.0).to(tl.float32)
    z = tl.load(x + (decodes + t) * W + C + h * DV + v_at, in_v & live, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, 0) / DV + eps)
    tl.store(at, y * scale * tl.load(norm + v_at, in_v, 0.0).to(tl.float32) * silu(z), in_v)


def prefill(
    states: RowStates, layer: int, x: Tensor, batch: AttentionBatch, mixed: Tensor, out: Tensor, *, pdl: bool
) -> None:
    """x: [n, width] as in `TorchDeltaStep`, the decodes first -> out: [n, values]; mixed: [n, channels]."""
    table = batch.segment_table
    if table is None:
        return
    config, weights = states.config, states.layers[layer]
    decodes, segments, count = batch.num_decodes, len(table.starts) - 1, len(x) - batch.num_decodes
    heads, key_dim, value_dim = config.num_value_heads, config.key_dim, config.value_dim
    where = batch.rows, batch.positions, table.starts
    sizes = {"HK": config.num_key_heads, "HV": heads, "DK": key_dim, "DV": value_dim}
    channels = {"W": x.shape[1], "C": config.channels}
    block_k, block_v = (max(16, triton.next_power_of_2(size)) for size in (key_dim, value_dim))
    width = triton.next_power_of_2(segments)
    options = launch_options(pdl)
    # Of float32 nothing is rounded; 10 bits of a factor are more than 16-bit types have.
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    warps = 8 if block_k > 64 else 4  # with fewer, registers spill
    convolution = Convolution(weights.conv, None, states.conv[layer])
    convolve_prompts(convolution, x, batch, table, mixed, pdl=pdl)
    # In 16 bits each is a factor that tf32 rounds as well. Not so the updates, which a state sums up: rounded
    # to bfloat16 they made its error 0.8 %, not 0.45 % as the rounding of the convolution's results alone
    # does.
    right, scores = (x.new_empty(count, heads, size) for size in (key_dim, CHUNK.value))
    own, totals = (
        torch.empty(count, heads, *size, dtype=torch.float32, device=x.device) for size in ((value_dim,), ())
    )
    _prepare_kernel[(triton.cdiv(count, CHUNK.value) + segments, heads)](
        *(right, own, scores, totals, mixed, x, weights.a_log, weights.dt_bias),
        *(table.starts, decodes, segments, L2_EPS), **channels, **sizes, BK=block_k, BV=block_v,
        SEGMENTS=width, PRECISION=precision, num_warps=warps, **options,
    )  # fmt: skip
    part = min(VALUES, block_v)
    _chunks_kernel[(segments, heads, triton.cdiv(value_dim, part))](
        *(out, right, own, scores, totals, mixed, states.delta[layer], *where, decodes, L2_EPS),
        C=config.channels, **sizes, BK=block_k, BV=part, PRECISION=precision, num_warps=warps, num_stages=1,
        **options,
    )  # fmt: skip
    _norm_kernel[(count, heads)](
        *(out, x, weights.norm, config.eps, table.starts, decodes, segments), **channels, HV=heads,
        DV=value_dim, BV=block_v, num_warps=1, **options,
    )  # fmt: skip
