"""The operators that a decoder is made of, and which implementation a device gets.

`torch` runs everywhere and is the reference; `cpu` is C compiled for this machine.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from microvllm.ops.activation import silu_and_mul
from microvllm.ops.attention import AttentionBackend, AttentionShape
from microvllm.ops.attention.torch_backend import TorchAttention
from microvllm.ops.linear import Linear
from microvllm.ops.norm import rms_norm


class LinearOperator(Protocol):
    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, in] -> x @ weight.T + bias + residual: [n, out], in x's dtype."""
        ...


class Operators(Protocol):
    """Activations and norm weights are of `activation_dtype`; weights and KV cache of the model's dtype."""

    @property
    def activation_dtype(self) -> torch.dtype: ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearOperator:
        """weight: [out, in]; bias: [out] or None. May keep a packed copy instead of the weight."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `ops.norm.rms_norm`."""
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `ops.activation.silu_and_mul`."""
        ...

    def attention(
        self,
        shape: AttentionShape,
        num_blocks: int,
        block_size: int,
        inv_freq: Tensor,
        max_position: int,
        dtype: torch.dtype,
    ) -> AttentionBackend:
        """An attention backend with a KV cache of its own, in `dtype`."""
        ...


class TorchOperators:
    """Plain torch, in the model's dtype throughout."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.activation_dtype = dtype

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearOperator:
        return Linear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return silu_and_mul(gate_up)

    def attention(
        self,
        shape: AttentionShape,
        num_blocks: int,
        block_size: int,
        inv_freq: Tensor,
        max_position: int,
        dtype: torch.dtype,
    ) -> AttentionBackend:
        return TorchAttention(shape, num_blocks, block_size, inv_freq, max_position, dtype)


def make_operators(name: str, dtype: torch.dtype, threads: int) -> Operators:
    """The operators called `name`: "torch", on torch's own threads, or "cpu", on `threads` threads.

    Raises `NoCompilerError` if "cpu" cannot be built.
    """
    if name == "torch":
        return TorchOperators(dtype)
    if name != "cpu":
        raise ValueError(f"no operators are called {name}")
    from microvllm.ops.cpu.build import load_kernels
    from microvllm.ops.cpu.operators import CpuOperators

    return CpuOperators(load_kernels(), threads)
