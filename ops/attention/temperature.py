"""Attention whose temperature falls with the position: Llama 4's, for texts longer than those of training."""

from __future__ import annotations

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionBatch, StepAttention


def tempered(
    backend: AttentionBackend,
    q_size: int,
    temperature: tuple[float, int] | None,
    max_position: int,
    device: torch.device,
) -> AttentionBackend:
    """The backend with this temperature; itself without one."""
    if temperature is None:
        return backend
    return TemperedAttention(backend, q_size, *temperature, max_position, device)


class TemperedAttention:
    """Multiplies the queries at position p by 1 + beta * log(1 + p // length), then attends as `backend`.

    That commutes with their rotation. q_size: the elements of a token's queries; max_position: no position is
    larger.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        q_size: int,
        beta: float,
        length: int,
        max_position: int,
        device: torch.device,
    ) -> None:
        self._backend, self._q_size = backend, q_size
        periods = torch.arange(max_position, device=device) // length
        self._factors = 1 + beta * (1 + periods).log()

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        step = self._backend.begin_step(batch)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            # Looked up in every layer: a captured step is replayed with other values in these positions.
            factors = self._factors.index_select(0, batch.positions)
            qkv[:, : self._q_size] *= factors[:, None]
            return step(layer, qkv)

        return attend
