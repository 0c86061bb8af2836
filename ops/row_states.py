"""States that lie at the rows of requests, whatever a layer keeps in them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class StatesByRow:
    """A backend's states, each a tensor [layers, rows, ...], all of a row belonging to one request.

    A row's contents count for nothing until its request has computed position 0.
    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.states = states

    def copy_row(self, source: int, target: int) -> None:
        """Give a row the states of another, in all layers."""
        for state in self.states:
            state[:, target] = state[:, source]
