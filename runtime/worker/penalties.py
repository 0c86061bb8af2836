"""Subtracts the penalties of requests from their logits, for which their tokens are counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from microvllm.runtime.request import EngineRequest
from microvllm.runtime.worker.transfers import Device, on_device


class Penalties:
    """Token counts of every row, [num_rows, vocab]: memory that is only touched where rows are penalised."""

    def __init__(self, num_rows: int, vocab_size: int, device: Device) -> None:
        self._device = device
        self._in_output = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self._presence = torch.zeros(num_rows, device=device)
        self._frequency = torch.zeros(num_rows, device=device)
        self._repetition = torch.ones(num_rows, device=device)

    def set_row(self, row: int, request: EngineRequest, tokens: Sequence[int], prompt_len: int) -> None:
        params = request.params
        self._presence[row] = params.presence_penalty
        self._frequency[row] = params.frequency_penalty
        self._repetition[row] = params.repetition_penalty
        self._in_prompt[row, on_device(tokens[:prompt_len], torch.int64, self._device)] = True
        output = on_device(tokens[prompt_len:], torch.int64, self._device)
        self._in_output[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def clear_row(self, row: int) -> None:
        self._presence[row] = self._frequency[row] = 0.0
        self._repetition[row] = 1.0
        self._in_output[row] = 0
        self._in_prompt[row] = False

    def count(self, rows: Sequence[int], tokens: Tensor) -> None:
        at = on_device(rows, torch.int64, self._device)
        self._in_output[at, tokens.clamp(min=0)] += (tokens >= 0).int()

    def apply(self, logits: Tensor, at: Sequence[int], rows: Sequence[int]) -> None:
        """Subtract the penalties of each row from the logits at its index.

        Presence and frequency look at the output, repetition (Keskar et al., 2019, arXiv:1909.05858) at
        prompt and output.
        """
        row = on_device(rows, torch.int64, self._device)
        index = on_device(at, torch.int64, self._device)
        counts, values = self._in_output[row], logits[index]
        repetition = self._repetition[row, None]
        scaled = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(self._in_prompt[row] | (counts > 0), scaled, values)
        values -= self._frequency[row, None] * counts + self._presence[row, None] * (counts > 0)
        logits[index] = values
