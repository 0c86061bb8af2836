"""Gated units, of many rows or as a part of kernels; the reference is `ops.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.activation import CLAMP_ALPHA, CLAMP_LIMIT
from microvllm.ops.gpu.launch import follow, launch_options

BLOCK = 1024  # elements of a row that one program takes
ALPHA, LIMIT = tl.constexpr(CLAMP_ALPHA), tl.constexpr(CLAMP_LIMIT)


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up of float32 tensors."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def clamped_swiglu(gate, up):
    """`ops.activation.clamped_swiglu` of float32 tensors; NaN stays NaN."""
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)


@triton.jit
def gated_unit(gate, up, CLAMPED: tl.constexpr):
    """`clamped_swiglu`, or `swiglu`."""
    return clamped_swiglu(gate, up) if CLAMPED else swiglu(gate, up)


@triton.jit
def geglu(gate, up):
    """gelu(gate) * up of float32 tensors, with tanh, which is a sigmoid of twice its argument."""
    return gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))) * up


@triton.jit
def _gate_and_mul_kernel(
    y, x, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Program: BLOCK elements of one row."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * WIDTH + i, i < WIDTH, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + i, i < WIDTH, 0.0).to(tl.float32)
    tl.store(y + row * WIDTH + i, geglu(gate, up) if GELU else swiglu(gate, up), i < WIDTH)


def silu_and_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """[n, 2 * i] contiguous -> silu(first half) * second half, [n, i], rounded once, at the end."""
    return _gate_and_mul(gate_up, gelu=False, pdl=pdl)


def gelu_and_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """`silu_and_mul` with "gelu_tanh" of `ops.activation`."""
    return _gate_and_mul(gate_up, gelu=True, pdl=pdl)


def _gate_and_mul(gate_up: Tensor, *, gelu: bool, pdl: bool) -> Tensor:
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(n, width, dtype=gate_up.dtype, device=gate_up.device)
    if n:
        grid = (n, triton.cdiv(width, BLOCK))
        _gate_and_mul_kernel[grid](
            y, gate_up, WIDTH=width, GELU=gelu, BLOCK=BLOCK, num_warps=4, **launch_options(pdl)
        )
    return y
