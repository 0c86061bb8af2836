"""Applies the requests' rules to their logits before tokens are chosen.

Order, as in vLLM: a mask from outside, allowed tokens, bad words, end tokens before `min_tokens`, logit bias,
penalties; a spent budget of thinking overrides them all. All requests of a step are changed together: every
rule becomes (row, token) pairs of one indexed operation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.bitmask import Output, TokenMask, take_out
from microvllm.runtime.worker.penalties import Penalties
from microvllm.runtime.worker.thinking import ThinkingBudgets
from microvllm.runtime.worker.transfers import Device, on_device


@dataclass(frozen=True, slots=True)
class _Rules:
    params: SamplingParams
    bias_ids: Tensor  # [b] int64
    bias: Tensor  # [b] float32
    allowed: Tensor | None  # [vocab] bool
    bad_words: list[list[int]]


class LogitRules:
    """Owns the rules and token counts of every row; a row without rules costs nothing."""

    def __init__(self, num_rows: int, vocab_size: int, device: Device = "cpu") -> None:
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._device = device
        self._rules: dict[int, _Rules] = {}
        self._penalties: Penalties | None = None  # most servers never see one
        self._budgets = ThinkingBudgets(device)
        self.mask: TokenMask | None = None

    def set_row(self, row: int, request: EngineRequest, tokens: Sequence[int], prompt_len: int) -> None:
        """Bind a request to its row. tokens: its prompt and, after a preemption, what it has generated."""
        params = request.params
        if self.mask is not None:
            self.mask.set_row(row, request, tokens[prompt_len:])
        if params.thinking is not None:
            self._budgets.set_row(row, params.thinking)
        if params.allowed_token_ids is None and not (
            params.logit_bias or params.penalised or request.bad_word_ids
        ):
            return
        # The samples of a prompt share their parameters: a list as long as the vocabulary is read once.
        shared = next((rules for rules in self._rules.values() if rules.params is params), None)
        self._rules[row] = shared or self._make(request)
        if params.penalised:
            if self._penalties is None:
                self._penalties = Penalties(self._num_rows, self._vocab_size, self._device)
            self._penalties.set_row(row, request, tokens, prompt_len)

    def _make(self, request: EngineRequest) -> _Rules:
        params, allowed = request.params, None
        if params.allowed_token_ids is not None:
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            allowed[on_device(params.allowed_token_ids, torch.int64, self._device)] = True
        return _Rules(
            params,
            on_device(list(params.logit_bias), torch.int64, self._device),
            on_device(list(params.logit_bias.values()), torch.float32, self._device),
            allowed,
            request.bad_word_ids,
        )

    def clear_row(self, row: int) -> None:
        if self.mask is not None:
            self.mask.clear_row(row)
        self._budgets.clear_row(row)
        rules = self._rules.pop(row, None)
        if rules is not None and rules.params.penalised and self._penalties is not None:
            self._penalties.clear_row(row)

    def concern(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows has rules."""
        if self.mask is not None and self.mask.concerns(rows):
            return True
        if self._budgets.concern(rows):
            return True
        return bool(self._rules) and not self._rules.keys().isdisjoint(rows)

    def apply(
        self,
        logits: Tensor,
        rows: Sequence[int],
        masked: Sequence[tuple[int, Collection[int]]],
        output: Callable[[int], Output],
        last_token: Tensor,
    ) -> None:
        """Change logits: [m, vocab] in place.

        rows: the row of each; masked: (index into m, end tokens that may not come yet); output(i): what
        request i has generated; last_token: [m], the token in front of the one to be chosen.
        """
        if self.mask is not None and self.mask.concerns(rows):
            take_out(logits, *self.mask.bits(rows, output))
        banned = [(i, token) for i, tokens in masked for token in tokens]
        ruled = (
            [(i, self._rules[row]) for i, row in enumerate(rows) if row in self._rules] if self._rules else []
        )
        for i, rules in ruled:
            if rules.allowed is not None:
                logits[i].masked_fill_(~rules.allowed, -torch.inf)
        in_flight: list[tuple[int, int, int]] = []
        for i, rules in ruled:
            if rules.bad_words:
                found, undecided = _next_of_bad_words(rules.bad_words, *output(i))
                banned += [(i, token) for token in found]
                in_flight += [(i, before, token) for before, token in undecided]
        if banned:
            at, tokens = on_device(banned, torch.int64, self._device).unbind(1)
            logits[at, tokens] = -torch.inf
        if in_flight:
            at, before, tokens = on_device(in_flight, torch.int64, self._device).unbind(1)
            # Added, not assigned: several words may end in the same token, and only some apply.
            penalty = torch.where(last_token[at] == before, -torch.inf, 0.0)
            logits.index_put_((at, tokens), penalty, accumulate=True)
        biased = [(i, rules) for i, rules in ruled if len(rules.bias_ids)]
        if biased:
            at = torch.cat([torch.full_like(rules.bias_ids, i) for i, rules in biased])
            ids = torch.cat([rules.bias_ids for _, rules in biased])
            logits.index_put_((at, ids), torch.cat([rules.bias for _, rules in biased]), accumulate=True)
        penalised = [i for i, rules in ruled if rules.params.penalised]
        if penalised and self._penalties is not None:
            self._penalties.apply(logits, penalised, [rows[i] for i in penalised])
        if self._budgets.concern(rows):
            self._budgets.apply(logits, rows, output, last_token)

    def observe(self, rows: Sequence[int], tokens: Tensor) -> None:
        """Count the chosen tokens: [m] int64 (negative: none was chosen) of the given rows."""
        if self._penalties is None:
            return
        counted = [
            i for i, row in enumerate(rows) if row in self._rules and self._rules[row].params.penalised
        ]
        if counted:
            at = on_device(counted, torch.int64, self._device)
            self._penalties.count([rows[i] for i in counted], tokens[at])


def _next_of_bad_words(
    bad_words: list[list[int]], output: Sequence[int], in_flight: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens that would complete a bad word which the output has otherwise spelt already.

    With a token in flight, those that depend on it come second, as (what it would have to be, token).
    """
    found: list[int] = []
    undecided: list[tuple[int, int]] = []
    for *head, last in bad_words:
        if not head:
            found.append(last)
        elif not in_flight:
            if list(output[-len(head) :]) == head:
                found.append(last)
        elif len(head) == 1 or list(output[1 - len(head) :]) == head[:-1]:
            undecided.append((head[-1], last))
    return found, undecided
