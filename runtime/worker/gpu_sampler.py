"""Chooses tokens on a GPU by our kernels; the rules and log probabilities are the CPU's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from microvllm.ops.gpu.launch import can_launch_early
from microvllm.ops.gpu.sampling import Delivery, TokenSampler
from microvllm.runtime.request import EngineRequest
from microvllm.runtime.worker.logits import on_device
from microvllm.runtime.worker.sampler import Sampler


class GPUSampler(Sampler):
    """Draws by other random numbers than the CPU's sampler, as much a function of (seed, position) only."""

    def __init__(
        self, num_rows: int, vocab_size: int, seed: int, logprobs_mode: str, device: torch.device
    ) -> None:
        super().__init__(num_rows, vocab_size, seed, logprobs_mode, device)
        # Captured graphs read these: they stay where they are.
        self._reals = torch.zeros(3, num_rows, dtype=torch.float32, device=device)
        self._integers = torch.zeros(2, num_rows, dtype=torch.int64, device=device)
        self._sampler = TokenSampler(num_rows, device, pdl=can_launch_early(device))
        self._changed = True

    def set_row(self, row: int, request: EngineRequest, tokens: Sequence[int], prompt_len: int) -> None:
        super().set_row(row, request, tokens, prompt_len)
        self._changed = True

    def plain(self, rows: Sequence[int]) -> bool:
        """Whether `choose_plain` is all that these rows need."""
        return not self._rules.concern(rows) and not self._asked(rows)

    def upload(self) -> None:
        """Send parameters that have changed. A cleared row's may stay: it is set before it is used again."""
        if not self._changed:
            return
        params = self._params
        self._reals.copy_(_pinned(params.temperature, params.top_p, params.min_p), non_blocking=True)
        self._integers.copy_(_pinned(params.top_k, params.seed.view(np.int64)), non_blocking=True)
        self._changed = False

    def warm_up(self, logits: Tensor) -> None:
        """Compile what draws from logits of this dtype, with and without filters."""
        # As they come in a step: one behind the other, which decides how the second is aligned.
        at, places = torch.zeros(2, len(logits), dtype=torch.int64, device=logits.device).unbind(0)
        for filters in (False, True):
            self._draw_tokens(logits, at, places, filters=filters)

    def choose_plain(self, logits: Tensor, rows: Tensor, positions: Tensor, delivery: Delivery) -> Tensor:
        """By temperature and filters alone; for a captured graph. See `TokenSampler`."""
        return self._draw_tokens(logits, rows, positions, filters=True, delivery=delivery)

    def _choose(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        self.upload()
        at, places = on_device(np.stack((rows, positions)), torch.int64, self._device).unbind(0)
        return self._draw_tokens(logits, at, places, filters=self._filtered(rows))

    def _draw_tokens(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        *,
        filters: bool,
        delivery: Delivery | None = None,
    ) -> Tensor:
        temperature, top_p, min_p = self._reals.unbind(0)
        top_k, seed = self._integers.unbind(0)
        return self._sampler(
            logits,
            rows,
            positions,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            filters=filters,
            delivery=delivery,
        )

    def _filtered(self, rows: Sequence[int]) -> bool:
        params, at = self._params, np.array(rows)
        return bool(((params.top_k[at] > 0) | (params.top_p[at] < 1) | (params.min_p[at] > 0)).any())

    def _asked(self, rows: Sequence[int]) -> bool:
        return bool(self._logprob_requests) and not self._logprob_requests.keys().isdisjoint(rows)


def _pinned(*arrays: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).pin_memory()
