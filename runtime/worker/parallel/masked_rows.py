"""The grammars of requests as the ranks behind the first see them: which rows have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from microvllm.runtime.request import EngineRequest
from microvllm.runtime.worker.bitmask import Output


class MaskedRows:
    """A `TokenMask` that masks nothing: rank 0 has the grammars and chooses the tokens.

    A row with a grammar is still one whose tokens a captured graph cannot choose.
    """

    def __init__(self) -> None:
        self._rows: set[int] = set()

    def set_row(self, row: int, request: EngineRequest, output: Sequence[int]) -> None:
        if request.grammar and request.params.structured_outputs is not None:
            self._rows.add(row)

    def clear_row(self, row: int) -> None:
        self._rows.discard(row)

    def concerns(self, rows: Sequence[int]) -> bool:
        return not self._rows.isdisjoint(rows)

    def bits(
        self, rows: Sequence[int], output: Callable[[int], Output]
    ) -> tuple[Sequence[int], Sequence[np.ndarray]]:
        return (), ()
