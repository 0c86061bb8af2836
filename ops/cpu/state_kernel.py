"""Calls the kernels of layers with a state, each of which is given a step and a layer: see states.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.row_states import rows_of

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class StateKernel:
    """A function of (pool, step, layer, x, out) -> 0, or -1 if there is no memory.

    Its struct of a step is `Sequences`, then `sizes`, then `floats`; that of a layer has the addresses of
    these tensors, contiguous and float32, or null. It gives rows of `out_size` numbers.
    """

    def __init__(
        self,
        kernels: Any,
        name: str,
        layers: Sequence[Sequence[Tensor | None]],
        sizes: Sequence[int],
        floats: Sequence[float],
        out_size: int,
    ) -> None:
        """kernels: the compiled functions and their threads, `ops.cpu.operators.Kernels`."""
        self.function = getattr(kernels.library, name)
        self.function.argtypes, self.function.restype = [_POINTER] * 5, _INT
        self.sizes, self.floats, self.out_size = sizes, floats, out_size
        kinds = [*[_POINTER] * 3, *[_LONG] * (3 + len(sizes)), *[_FLOAT] * len(floats)]
        fields = [(f"field{index}", kind) for index, kind in enumerate(kinds)]
        self.step_type = type("Step", (ctypes.Structure,), {"_fields_": fields})
        self.layers = [
            (_POINTER * len(tensors))(*(None if each is None else each.data_ptr() for each in tensors))
            for tensors in layers
        ]
        self.kernels, self.tensors = kernels, layers
        self._last: KernelStep | None = None

    def begin_step(self, batch: AttentionBatch) -> KernelStep:
        # Where the last step's batch lies is known, whatever its values are now.
        if self._last is None or self._last.batch is not batch:
            self._last = KernelStep(self, batch)
        return self._last


class KernelStep:
    """Computes one step, layer by layer."""

    def __init__(self, kernel: StateKernel, batch: AttentionBatch) -> None:
        table, self.batch = batch.segment_table, batch
        indices = [batch.positions, rows_of(batch)] + ([] if table is None else [table.starts])
        indices = [tensor.long().contiguous() for tensor in indices]
        addresses = [tensor.data_ptr() for tensor in indices]
        # The kernel gets addresses. Not `kernel`, which holds this step: only a collection would end both.
        self._held = indices, kernel.tensors, kernel.kernels
        self._function, self._pool, self._layers = kernel.function, kernel.kernels.pool, kernel.layers
        self._out_size = kernel.out_size
        self._step = kernel.step_type(
            *(addresses if table is not None else (*addresses, None)),
            len(batch.positions),
            batch.num_decodes,
            0 if table is None else len(table.starts) - 1,
            *kernel.sizes,
            *kernel.floats,
        )
        self._address = ctypes.addressof(self._step)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, width], what the product in front gives -> [n, out_size]."""
        qkv = qkv.contiguous()
        out = torch.empty(len(qkv), self._out_size)
        at = ctypes.addressof(self._layers[layer])
        if self._function(self._pool, self._address, at, qkv.data_ptr(), out.data_ptr()):
            raise MemoryError(f"no memory for the states of {len(qkv)} tokens")
        return out
