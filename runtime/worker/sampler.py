"""Chooses tokens from logits, for a whole batch at once.

Order, as in vLLM: the request's rules (`logits.py`); temperature; min-p; top-k; top-p; draw.
`Sampler`, on a CPU, inverts the cumulative distribution at one uniform number; `GPUSampler` takes the largest
of the logits plus Gumbel noise. Both depend on (seed, position) only, so a seeded request draws the same
numbers in any batch and after preemption.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from microvllm.ops.sampling import draw, kept_logits, uniform_numbers
from microvllm.runtime.core.plan import NO_TOKEN
from microvllm.runtime.request import MIN_TEMPERATURE, EngineRequest, SamplingParams
from microvllm.runtime.worker.bitmask import Output, TokenMask
from microvllm.runtime.worker.logits import LogitRules
from microvllm.runtime.worker.logprobs import LogprobTensors, RowLogprobs
from microvllm.runtime.worker.transfers import on_device

if TYPE_CHECKING:
    from microvllm.ops.gpu.sampling import Delivery

_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of a step, and the log probabilities that were requested.

    tokens: [m] int64, NO_TOKEN where there was nothing to choose from; `asked`: the indices into m of the
    rows that `logprobs` holds.
    """

    tokens: Tensor
    asked: Sequence[int] = ()
    logprobs: LogprobTensors | None = None


class RowParameters:
    """The sampling parameters of every row, on the host."""

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.temperature = np.zeros(num_rows, dtype=np.float32)  # 0 is greedy
        self.top_k = np.zeros(num_rows, dtype=np.int64)  # 0 is off
        self.top_p = np.ones(num_rows, dtype=np.float32)
        self.min_p = np.zeros(num_rows, dtype=np.float32)
        self.seed = np.zeros(num_rows, dtype=np.uint64)

    def set(self, row: int, params: SamplingParams, seed: int) -> None:
        greedy = params.greedy
        self.temperature[row] = 0.0 if greedy else max(params.temperature, MIN_TEMPERATURE)
        self.top_k[row] = 0 if greedy or params.top_k <= 0 else min(params.top_k, self._vocab_size)
        self.top_p[row] = 1.0 if greedy else params.top_p
        self.min_p[row] = 0.0 if greedy else params.min_p
        self.seed[row] = np.uint64(seed)

    def filters(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Temperature, top-k, top-p and min-p of these rows, each [m]."""
        values = self.temperature, self.top_k, self.top_p, self.min_p
        temperature, top_k, top_p, min_p = (torch.from_numpy(each[rows]) for each in values)
        return temperature, top_k, top_p, min_p

    def clear(self, row: int) -> None:
        self.temperature[row], self.top_k[row], self.top_p[row], self.min_p[row] = 0.0, 0, 1.0, 0.0
        self.seed[row] = 0


class Sampler:
    """Chooses tokens on the CPU. Rows are set at admission and cleared at release."""

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        seed: int,
        logprobs_mode: str = "raw_logprobs",
        device: str | torch.device = "cpu",
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._params = RowParameters(num_rows, vocab_size)
        self._unseeded = random.Random(seed & _UINT64)  # `Random(-1)` is `Random(1)`
        self._rules = LogitRules(num_rows, vocab_size, device)
        self._logprobs = RowLogprobs(logprobs_mode, device)

    def use_mask(self, mask: TokenMask) -> None:
        """Let `mask` choose at every step which tokens may come next; before the first request."""
        self._rules.mask = mask

    def set_row(self, row: int, request: EngineRequest, tokens: Sequence[int], prompt_len: int) -> None:
        """Bind a request's parameters to its row; without a seed the engine's own generator gives one.

        tokens: the prompt and, after a preemption, what was generated before it.
        """
        requested = request.seed
        seed = self._unseeded.getrandbits(64) if requested is None else requested & _UINT64
        self._params.set(row, request.params, seed)
        self._rules.set_row(row, request, tokens, prompt_len)
        self._logprobs.set_row(row, request.params)

    def clear_row(self, row: int) -> None:
        self._params.clear(row)
        self._rules.clear_row(row)
        self._logprobs.clear_row(row)

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        masked: Sequence[tuple[int, Collection[int]]],
        output: Callable[[int], Output],
        last_token: Tensor,
    ) -> Sampled:
        """One token a row of logits.

        logits: [m, vocab] float32, overwritten. rows: [m], the request row of each; positions: [m], the
        index in its sequence of the token to be chosen. masked, output and last_token as in
        `LogitRules.apply`.
        """
        asked = self._logprobs.asked(rows)
        raw = logits[asked.at] if asked is not None and self._logprobs.are_raw else None
        self._rules.apply(logits, rows, masked, output, last_token)
        if asked is not None and raw is None:
            filters = (each.to(self._device) for each in self._params.filters(asked.rows))
            processed = kept_logits(logits[asked.at], *filters)
        tokens = self._choose(logits, rows, positions)
        self._rules.observe(rows, tokens)
        if asked is None:
            return Sampled(tokens)
        return Sampled(tokens, asked.places, asked.log(processed if raw is None else raw, tokens))

    def _choose(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """[m] int64 tokens, NO_TOKEN where no logit is finite; may overwrite logits."""
        params, scores = self._params, logits.numpy()
        tokens = scores.argmax(1)  # NumPy's takes a tenth of the time of torch's
        finite = [math.isfinite(scores[i, token]) for i, token in enumerate(tokens.tolist())]
        # There is nothing to draw from a broken row, and its NaNs would become indices out of range.
        drawn = [i for i, row in enumerate(rows) if finite[i] and params.temperature[row] > 0]
        if drawn:
            at = [rows[i] for i in drawn]
            uniform = torch.from_numpy(uniform_numbers(params.seed[at], np.array(positions)[drawn]))
            tokens[drawn] = draw(logits[drawn], uniform, *params.filters(at)).numpy()
        for i, fine in enumerate(finite):
            if not fine:
                tokens[i] = NO_TOKEN
        return torch.from_numpy(tokens)


# ---- on a GPU --------------------------------------------------------------------------------------


class GPUSampler(Sampler):
    """Chooses by custom kernels; rules and log probabilities are the CPU's.

    Its random numbers differ from the CPU sampler's, but are also a function of (seed, position) only.
    """

    def __init__(
        self, num_rows: int, vocab_size: int, seed: int, logprobs_mode: str, device: torch.device
    ) -> None:
        # Here, because a machine without a GPU need not have Triton.
        from microvllm.ops.gpu.launch import can_launch_early
        from microvllm.ops.gpu.sampling import TokenSampler
        from microvllm.runtime.worker.gpu_rules import GpuRules

        super().__init__(num_rows, vocab_size, seed, logprobs_mode, device)
        self._rules = self.rules = GpuRules(num_rows, vocab_size, device)
        # Captured graphs read these: they stay where they are.
        self._reals = torch.zeros(3, num_rows, dtype=torch.float32, device=device)
        self._integers = torch.zeros(2, num_rows, dtype=torch.int64, device=device)
        self._sampler = TokenSampler(num_rows, device, pdl=can_launch_early(device))
        self._changed = True

    def set_row(self, row: int, request: EngineRequest, tokens: Sequence[int], prompt_len: int) -> None:
        super().set_row(row, request, tokens, prompt_len)
        self._changed = True

    def plain(self, rows: Sequence[int]) -> bool:
        """Whether `choose_plain` is all that these rows need, behind what `rules` change."""
        return not self._rules.concern(rows) and not self._logprobs.concern(rows)

    def masked(self, rows: Sequence[int]) -> bool:
        """Whether `rules.replay_masked` is all that these rows need."""
        return self.rules.only_masked(rows) and not self._logprobs.concern(rows)

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


def _pinned(*arrays: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).pin_memory()
