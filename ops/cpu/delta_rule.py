"""Layers of a gated delta rule by the kernels of this folder."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.delta_rule import L2_EPS, DeltaConfig, RowStates
from microvllm.ops.row_states import rows_of

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class _Layer(ctypes.Structure):
    """`DeltaLayer` of delta_rule.c."""

    _fields_ = [(name, _POINTER) for name in ("weight", "a_log", "dt_bias", "norm", "conv", "delta")]


class _Step(ctypes.Structure):
    """`DeltaStep` of delta_rule.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("positions", "rows", "starts")),
        *((name, _LONG) for name in ("n", "decodes", "segments", "key_heads", "heads")),
        *((name, _LONG) for name in ("key_dim", "value_dim", "size")),
        *((name, _FLOAT) for name in ("eps", "l2_eps")),
    ]


class CpuDeltaRule(RowStates):
    """See `ops.delta_rule.TorchDeltaRule`; a token has the same bits in any batch and any chunk."""

    def __init__(self, config: DeltaConfig, kernels: Any) -> None:
        """kernels: the compiled functions and their threads, `ops.cpu.operators.Kernels`."""
        super().__init__(config, torch.float32)
        self.kernels = kernels
        self.kernel = kernels.library.delta_rule
        self.kernel.argtypes, self.kernel.restype = [_POINTER] * 5, _INT
        weights = [each.conv.T.contiguous() for each in self.layers]
        self._held = [
            (weight, each.a_log.contiguous(), each.dt_bias.contiguous(), each.norm.contiguous())
            for weight, each in zip(weights, self.layers, strict=True)
        ]
        structs = (
            _Layer(*(tensor.data_ptr() for tensor in (*held, self.conv[index], self.delta[index])))
            for index, held in enumerate(self._held)
        )
        self.structs = (_Layer * len(self.layers))(*structs)
        self._last: CpuDeltaStep | None = None

    def begin_step(self, batch: AttentionBatch) -> CpuDeltaStep:
        # Where the last step's batch lies is known, whatever its values are now.
        if self._last is None or self._last.batch is not batch:
            self._last = CpuDeltaStep(self, batch)
        return self._last


class CpuDeltaStep:
    """Computes one step, layer by layer."""

    def __init__(self, states: CpuDeltaRule, batch: AttentionBatch) -> None:
        config, table, self.batch = states.config, batch.segment_table, batch
        indices = [batch.positions, rows_of(batch)] + ([] if table is None else [table.starts])
        indices = [tensor.long().contiguous() for tensor in indices]
        addresses = [tensor.data_ptr() for tensor in indices]
        # The kernel gets addresses. Not the backend, which holds this step: only a collection would end both.
        self._held = indices, states.conv, states.delta, states._held, states.kernels
        self._kernel, self._pool, self._structs = states.kernel, states.kernels.pool, states.structs
        self._values = config.values
        self._step = _Step(
            *(addresses if table is not None else (*addresses, None)),
            len(batch.positions),
            batch.num_decodes,
            0 if table is None else len(table.starts) - 1,
            config.num_key_heads,
            config.num_value_heads,
            config.key_dim,
            config.value_dim,
            config.conv_size,
            config.eps,
            L2_EPS,
        )
        self._address = ctypes.addressof(self._step)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, channels + values + 2 Hv], q, k, v, z, b and a of each token -> [n, values]."""
        qkv = qkv.contiguous()
        out = torch.empty(len(qkv), self._values)
        at = ctypes.addressof(self._structs[layer])
        if self._kernel(self._pool, self._address, at, qkv.data_ptr(), out.data_ptr()):
            raise MemoryError(f"no memory for the states of {len(qkv)} tokens")
        return out
