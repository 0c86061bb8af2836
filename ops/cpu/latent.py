"""Attention over latent keys and values by the kernels of this folder."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.attention.latent import LatentConfig, TorchLatentAttention
from microvllm.ops.cpu.cache import Cache, Step


class _LatentStep(ctypes.Structure):
    """`LatentStep` of latent.c."""

    _fields_ = [("step", Step), ("rank", ctypes.c_long)]


class CpuLatentAttention(TorchLatentAttention):
    """See `ops.attention.latent`; activations are float32, a cache of bfloat16 may be multiplied in it."""

    def __init__(self, config: LatentConfig, kernels: Any, tuning: Any) -> None:
        """kernels: `ops.cpu.operators.Kernels`; tuning: the kernels' struct, `ops.cpu.tuning.Tuning.fields`.

        Raises ValueError as `LatentConfig.check` does.
        """
        super().__init__(config, torch.float32)
        self.kernels, self.tuning, self.kernel = kernels, tuning, kernels.library.latent_attention
        self.kernel.argtypes, self.kernel.restype = [ctypes.c_void_p] * 5, ctypes.c_int
        size = config.block_size
        sizes = config.num_blocks * size, size, size, config.dtype == torch.bfloat16
        structs = (Cache(layer.data_ptr(), *sizes) for layer in self.cache)
        self.structs = (Cache * config.shape.num_layers)(*structs)
        self._last: CpuLatentStep | None = None

    def begin_step(self, batch: AttentionBatch) -> CpuLatentStep:
        # Where the last step's batch lies is known, whatever its values are now.
        if self._last is None or self._last.batch is not batch:
            self._last = CpuLatentStep(self, batch)
        return self._last


class CpuLatentStep:
    """Computes one step's attention, layer by layer."""

    def __init__(self, backend: CpuLatentAttention, batch: AttentionBatch) -> None:
        shape, rotary, table = backend.shape, backend.rotary, batch.segment_table
        indices = [batch.positions, batch.slots, batch.decode_blocks, batch.decode_lens]
        if table is not None:
            indices += [table.starts, table.blocks, table.context_lens]
        indices = [tensor.long().contiguous() for tensor in indices]
        # The kernel gets addresses. Not the backend, which holds this step: only a collection would end both.
        self._held = backend.cache, rotary, indices, backend.kernels, backend.tuning
        self.batch, self._width = batch, shape.num_heads * shape.rank
        self._kernel, self._pool, self._structs = backend.kernel, backend.kernels.pool, backend.structs
        addresses = [tensor.data_ptr() for tensor in (rotary.cos, rotary.sin, *indices)]
        step = Step(
            *(addresses if table is not None else (*addresses, None, None, None)),
            len(batch.positions),
            batch.num_decodes,
            batch.decode_blocks.shape[1] if batch.num_decodes else 0,
            *((0, 0) if table is None else table.blocks.shape),
            shape.num_heads,
            1,
            shape.key_dim,
            0,
            shape.scale,
            0.0,
            ctypes.addressof(backend.tuning),
        )
        self._step = _LatentStep(step, shape.rank)
        self._address = ctypes.addressof(self._step)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, (heads + 1) key_dim], queries and key, overwritten -> [n, heads * rank], float32."""
        out = torch.empty(len(qkv), self._width)
        at = ctypes.addressof(self._structs[layer])
        if self._kernel(self._pool, self._address, at, qkv.data_ptr(), out.data_ptr()):
            raise MemoryError(f"no memory for the attention of {len(qkv)} tokens")
        return out
