"""Ends the reasoning of requests at their budget: from then on the tokens that end it are forced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from microvllm.runtime.request import ThinkingBudget
from microvllm.runtime.text.reasoning import Place, ReasoningTags

FREE = -1  # the model chooses
NO_ID = -2  # equal to no token, and not to the mark of a row without one


class Reasoner:
    """Follows the output of one request and says which token is forced."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._max_tokens = budget.max_tokens
        self._tags = ReasoningTags(budget.start, budget.end, budget.blank, begun=budget.begun)
        self._place = self._tags.first
        self._num_read = 0

    def forced(self, known: Sequence[int], in_flight: bool) -> tuple[int, dict[int, int]]:
        """Return the token that must come next, `FREE` for any; `known` is what was generated so far.

        With one more token in flight the mapping has what is forced after each token that matters.
        """
        after = self._tags.after
        for token in known[self._num_read :]:
            self._place = after(self._place, token)
        self._num_read = len(known)
        if not in_flight:
            return self._next(self._place), {}
        cases = {
            token: self._next(after(self._place, token)) for token in {*self._tags.start, *self._tags.end}
        }
        return self._next(after(self._place, NO_ID)), cases

    def _next(self, place: Place) -> int:
        if not place.inside or place.count < self._max_tokens:
            return FREE
        return self._tags.end[place.matched]


class ThinkingBudgets:
    """Owns the budget of every row that has one."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device
        self._rows: dict[int, Reasoner] = {}

    def set_row(self, row: int, budget: ThinkingBudget) -> None:
        self._rows[row] = Reasoner(budget)

    def clear_row(self, row: int) -> None:
        self._rows.pop(row, None)

    def concern(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows has a budget."""
        return bool(self._rows) and not self._rows.keys().isdisjoint(rows)

    def apply(
        self,
        logits: Tensor,
        rows: Sequence[int],
        output: Callable[[int], tuple[Sequence[int], bool]],
        last_token: Tensor,
    ) -> None:
        """Leave a row whose budget is spent one token; arguments as in `LogitRules.apply`."""
        at, wanted, cases = [], [], []
        for i, row in enumerate(rows):
            if row in self._rows:
                token, by_last = self._rows[row].forced(*output(i))
                if token != FREE or any(other != FREE for other in by_last.values()):
                    at.append(i)
                    wanted.append(token)
                    cases.append(by_last)
        if not at:
            return
        width = max(map(len, cases))
        lasts = [[*case, *[NO_ID] * (width - len(case))] for case in cases]
        nexts = [[*case.values(), *[FREE] * (width - len(case))] for case in cases]
        index, forced = torch.tensor([at, wanted], device=self._device).unbind(0)
        if width:
            last, following = torch.tensor([lasts, nexts], device=self._device).unbind(0)
            hit = last == last_token[index, None]
            forced = torch.where(hit.any(1), following.gather(1, hit.int().argmax(1)[:, None])[:, 0], forced)
        chosen = torch.arange(logits.shape[1], device=self._device) == forced[:, None]
        values = logits[index].masked_fill_((forced[:, None] != FREE) & ~chosen, -torch.inf)
        logits[index] = values.masked_fill_(chosen, 0.0)
