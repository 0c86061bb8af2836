"""Own operators for CPUs: this folder's C files behind the interface of `ops.operators`.

Activations are float32 whatever the weights are; a bfloat16 weight is widened in registers.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor
from torch.nn.functional import linear

from microvllm.ops.attention import AttentionBatch, AttentionShape, QKNorms
from microvllm.ops.attention.torch_backend import TorchAttention, TorchStep
from microvllm.ops.linear import Linear
from microvllm.ops.operators import LinearOperator, SeparateOperators

# Up to so many rows the kernel is faster than a library that blocks for the caches. Measured: with matrix
# units (AMX) oneDNN's packed product wins from 8 rows on; without bf16 arithmetic the weight has to be
# widened for it first, which pays from a few dozen rows on.
MAX_KERNEL_ROWS = 32
MAX_KERNEL_ROWS_AMX = 7

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class _Cache(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("num_slots", _LONG), ("block_size", _LONG), ("is_bf16", _INT)]


_SIGNATURES = {
    "linear": [*[_POINTER] * 6, *[_LONG] * 3, _INT],
    "rms_norm": [*[_POINTER] * 4, *[_LONG] * 2, _FLOAT],
    "silu_and_mul": [*[_POINTER] * 3, *[_LONG] * 2],
    "rotate_and_cache": [*[_POINTER] * 4, _FLOAT, *[_POINTER] * 4, *[_LONG] * 4, _POINTER],
    "decode_attention": [*[_POINTER] * 2, _LONG, *[_POINTER] * 5, *[_LONG] * 7, _FLOAT],
    "pool_free": [_POINTER],
}


class Pool:
    """The kernels' threads; they end with the object, which every operator that uses them holds."""

    def __init__(self, kernels: ctypes.CDLL, threads: int) -> None:
        self.handle: int | None = kernels.pool_new(threads)
        if self.handle is None:
            raise MemoryError("no memory for the kernels' threads")
        weakref.finalize(self, kernels.pool_free, self.handle)


class CpuOperators(SeparateOperators):
    """The kernels, with the shapes and dtypes of `ops.operators.Operators`."""

    activation_dtype = torch.float32

    def __init__(self, kernels: ctypes.CDLL, threads: int) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(kernels, name)
            function.argtypes, function.restype = arguments, None
        kernels.decode_scratch.argtypes, kernels.decode_scratch.restype = [_LONG] * 4, _LONG
        kernels.pool_new.argtypes, kernels.pool_new.restype = [_INT], _POINTER
        self._kernels = kernels
        self._pool = Pool(kernels, threads)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOperator:
        return CpuLinear(self._kernels, self._pool, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        d = x.shape[-1]
        self._kernels.rms_norm(
            self._pool.handle, x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // d, d, eps
        )
        return y

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        n, width = gate_up.shape[0], gate_up.shape[1] // 2
        y = torch.empty(n, width)
        self._kernels.silu_and_mul(self._pool.handle, gate_up.data_ptr(), y.data_ptr(), n, width)
        return y

    def attention(
        self,
        shape: AttentionShape,
        num_blocks: int,
        block_size: int,
        inv_freq: Tensor,
        max_position: int,
        dtype: torch.dtype,
        qk_norms: QKNorms | None = None,
    ) -> CpuAttention:
        return CpuAttention(
            self._kernels, self._pool, shape, num_blocks, block_size, inv_freq, max_position, dtype, qk_norms
        )


class CpuLinear:
    """y = x @ weight.T + bias + residual; x: [n, in] float32, weight: [out, in] float32 or bfloat16."""

    def __init__(self, kernels: ctypes.CDLL, pool: Pool, weight: Tensor, bias: Tensor | None) -> None:
        self._kernel = kernels.linear
        self._pool = pool
        self._weight = weight
        self._bias = None if bias is None else bias.float()
        self._is_bf16 = weight.dtype == torch.bfloat16
        self._packed = None
        self._max_rows = MAX_KERNEL_ROWS
        if self._is_bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self._packed = Linear(weight)
            self._max_rows = MAX_KERNEL_ROWS_AMX

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        m, (n, k) = x.shape[0], self._weight.shape
        if m > self._max_rows:
            if self._packed is None:
                y = linear(x, self._weight.float(), self._bias)
            else:
                y = self._packed(x.bfloat16()).float()
                if self._bias is not None:
                    y += self._bias
            return y if residual is None else y.add_(residual)
        y = torch.empty(m, n)
        bias = None if self._bias is None else self._bias.data_ptr()
        added = None if residual is None else residual.data_ptr()
        self._kernel(
            self._pool.handle,
            x.data_ptr(),
            self._weight.data_ptr(),
            bias,
            added,
            y.data_ptr(),
            m,
            n,
            k,
            self._is_bf16,
        )
        return y


class CpuAttention(TorchAttention):
    """The torch backend's cache; norms, rotation, cache write and decode by the kernels, prefill by torch."""

    def __init__(
        self,
        kernels: ctypes.CDLL,
        pool: Pool,
        shape: AttentionShape,
        num_blocks: int,
        block_size: int,
        inv_freq: Tensor,
        max_position: int,
        dtype: torch.dtype,
        qk_norms: QKNorms | None,
    ) -> None:
        super().__init__(
            shape, num_blocks, block_size, inv_freq, max_position, dtype, qk_norms, torch.float32
        )
        self.kernels = kernels
        self.pool = pool
        is_bf16 = dtype == torch.bfloat16
        self.layers = [
            _Cache(layer.data_ptr(), num_blocks * block_size, block_size, is_bf16) for layer in self.cache
        ]

    def begin_step(self, batch: AttentionBatch) -> CpuStep:
        return CpuStep(self, batch)


class CpuStep(TorchStep):
    def __init__(self, backend: CpuAttention, batch: AttentionBatch) -> None:
        super().__init__(backend, batch)
        self._cpu = backend
        shape = backend.shape
        if batch.num_decodes:
            self._longest = int(batch.decode_lens.max())
            self._scratch = torch.empty(
                backend.kernels.decode_scratch(
                    batch.num_decodes, shape.num_heads, shape.head_dim, self._longest
                )
            )

    def _rotate_and_cache(self, layer: int, qkv: Tensor) -> Tensor:
        shape, batch, rotary, norms = self._cpu.shape, self._batch, self._cpu.rotary, self._cpu.qk_norms
        q_norm, k_norm = (None, None) if norms is None else (w.data_ptr() for w in norms.weights[layer])
        self._cpu.kernels.rotate_and_cache(
            self._cpu.pool.handle,
            qkv.data_ptr(),
            q_norm,
            k_norm,
            0.0 if norms is None else norms.eps,
            rotary.cos.data_ptr(),
            rotary.sin.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            qkv.shape[0],
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            ctypes.byref(self._cpu.layers[layer]),
        )
        heads = shape.num_heads + 2 * shape.num_kv_heads
        return qkv.view(-1, heads, shape.head_dim)[:, : shape.num_heads]

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        shape, batch = self._cpu.shape, self._batch
        out = torch.empty(q.shape[0], shape.num_heads * shape.head_dim)
        self._cpu.kernels.decode_attention(
            self._cpu.pool.handle,
            q.data_ptr(),
            q.stride(0),
            ctypes.byref(self._cpu.layers[layer]),
            batch.decode_blocks.data_ptr(),
            batch.decode_lens.data_ptr(),
            out.data_ptr(),
            self._scratch.data_ptr(),
            q.shape[0],
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            batch.decode_blocks.shape[1],
            self._longest,
            shape.window or 0,
            shape.head_dim**-0.5,
        )
        return out
