"""What happens to q, k and v between their product and the attention, in one pass over them.

Normalisation of each head (if the model has it), rotation, and the write of k and v to the paged cache:
the reference is `ops.norm.rms_norm`, `ops.rotary.apply_rotary` and an index copy. Everything is computed
in float32 and rounded once, at the end.

The cache of a layer is keys and values, each [blocks, kv_heads, block, d] ("heads first") or
[blocks, block, kv_heads, d]; the token in slot s lies in block s // block at offset s % block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.attention import AttentionShape, QKNorms
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.rotary import pair_scales

E4M3_MAX = tl.constexpr(448.0)
F16_MAX = tl.constexpr(65504.0)


@dataclass(frozen=True, slots=True)
class RotaryAngles:
    """cos and sin of every position's angles, scaled: [max_position, d / 2] float32."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def up_to(max_position: int, inv_freq: Tensor, scale: float) -> RotaryAngles:
        """inv_freq: [d / 2] float32 angles a position; scale: see `ops.rotary.pair_scales`."""
        positions = torch.arange(max_position, dtype=torch.float32, device=inv_freq.device)
        angles = torch.outer(positions, inv_freq)
        scales = pair_scales(inv_freq, scale)
        return RotaryAngles(angles.cos() * scales, angles.sin() * scales)


@triton.jit
def load_rotated(
    heads, rows, present, norm, cos, sin, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr
):
    """Heads `rows` of one token, normalised and rotated: [rows, BLOCK_D] float32, 0 where not present.

    heads: the token's first head; norm: [D] weights, read if NORM; cos, sin: those of the token's position.
    """
    d = tl.arange(0, BLOCK_D)
    # Each element is rotated against the one half a head away: both are loaded, so that no thread needs
    # what another holds.
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    inside = present[:, None] & (d < D)[None, :]
    x = tl.load(heads + rows[:, None] * D + d[None, :], inside, 0.0).to(tl.float32)
    y = tl.load(heads + rows[:, None] * D + other[None, :], inside, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * scale * tl.load(norm + d, d < D, 0.0).to(tl.float32)[None, :]
        y = y * scale * tl.load(norm + other, d < D, 0.0).to(tl.float32)[None, :]
    pair = tl.where(d < D // 2, d, other)
    c = tl.load(cos + pair, d < D, 0.0)
    s = tl.load(sin + pair, d < D, 0.0)
    s = tl.where(d < D // 2, -s, s)
    return x * c[None, :] + y * s[None, :]


@triton.jit
def as_cached(x, scale, DTYPE: tl.constexpr):
    """float32 in the dtype of the cache; as e4m3 divided by the scale, and at most its largest number."""
    if DTYPE == tl.float8e4nv:  # noqa: SIM300 (a constexpr)
        x = tl.clamp(tl.div_rn(x, scale), -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)


@triton.jit
def as_factor(x, DTYPE: tl.constexpr):
    """float32 in the dtype of a product; where that is float16 it ends at the largest number."""
    if DTYPE == tl.float16:  # noqa: SIM300
        x = tl.clamp(x, -F16_MAX, F16_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)


@triton.jit
def _rope_cache_kernel(
    q_out, keys, values, qkv, positions, slots, cos, sin, q_norm, k_norm, eps, k_scale, v_scale, block_stride,
    token_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token."""
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    cos += position * (D // 2)
    sin += position * (D // 2)
    qkv += token * (HEADS + 2 * KV_HEADS) * D
    d = tl.arange(0, BLOCK_D)[None, :]

    rows = tl.arange(0, BLOCK_HEADS)
    q = load_rotated(qkv, rows, rows < HEADS, q_norm, cos, sin, eps, D, BLOCK_D, NORM)
    rows = rows[:, None]
    q = as_factor(q, q_out.dtype.element_ty)
    tl.store(q_out + token * HEADS * D + rows * D + d, q, (rows < HEADS) & (d < D))

    rows = tl.arange(0, BLOCK_KV_HEADS)
    k = load_rotated(qkv + HEADS * D, rows, rows < KV_HEADS, k_norm, cos, sin, eps, D, BLOCK_D, NORM)
    rows = rows[:, None]
    inside = (rows < KV_HEADS) & (d < D)
    v = tl.load(qkv + (HEADS + KV_HEADS) * D + rows * D + d, inside, 0.0).to(tl.float32)
    place = slot // PAGE * block_stride + slot % PAGE * token_stride + rows * head_stride + d
    DTYPE: tl.constexpr = keys.dtype.element_ty
    tl.store(keys + place, as_cached(k, k_scale, DTYPE), inside & (slot >= 0))
    tl.store(values + place, as_cached(v, v_scale, DTYPE), inside & (slot >= 0))


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: KVScales,
    shape: AttentionShape,
    angles: RotaryAngles,
    norms: QKNorms | None,
    layer: int,
    *,
    heads_first: bool,
    pdl: bool = False,
) -> Tensor:
    """The rotated queries, [n, heads, d], after keys and values went to their slots.

    qkv: [n, (heads + 2 * kv_heads) * d] contiguous; positions, slots: [n]; a slot of -1 writes nothing.
    keys, values: a layer's cache as the module says, of qkv's dtype or float8_e4m3fn; queries are then of
    float16, unless qkv is of float32. No host synchronisation, nothing that depends on
    values: may be captured in a CUDA graph.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    n = qkv.shape[0]
    dtype = qkv.dtype
    if keys.dtype == torch.float8_e4m3fn and dtype == torch.bfloat16:
        dtype = torch.float16
    q = torch.empty(n, heads, dim, dtype=dtype, device=qkv.device)
    if n == 0:
        return q
    token, head = (2, 1) if heads_first else (1, 2)
    q_norm, k_norm = norms.weights[layer] if norms else (qkv, qkv)
    _rope_cache_kernel[(n,)](
        q, keys, values, qkv, positions, slots, angles.cos, angles.sin, q_norm, k_norm,
        norms.eps if norms else 0.0, *scales, keys.stride(0), keys.stride(token), keys.stride(head),
        HEADS=heads, KV_HEADS=kv_heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), PAGE=keys.shape[token],
        BLOCK_HEADS=triton.next_power_of_2(heads), BLOCK_KV_HEADS=triton.next_power_of_2(kv_heads),
        NORM=norms is not None, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return q
