"""Decides which requests are served first, and which of the running ones a step may compute.

Imports no torch.

`fcfs`      first come, first served; every running request is eligible in every step.
`priority`  the smaller number first (vLLM's meaning), first come among equals; all are eligible.
`sjf`       shortest job first, to align lengths: of the requests that decode, only those of the shortest
            length are eligible, so short ones catch up with long ones: lengths 50 52 55 60 100 run 50, 51,
            then 52 52 together, 55 55 55, and 60 60 60 60. After `MAX_PASSED_OVER` such steps all are.
            That avoids padding in kernels that need equal lengths. Ours do not, so skipped requests only
            shrink the batch; kept for comparison.

A policy never changes a token, only when it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microvllm.runtime.core.plan import Request
    from microvllm.runtime.request import EngineRequest

# Steps in a row in which `sjf` may pass a request over; in the next one all are eligible.
MAX_PASSED_OVER = 16


class Policy:
    """Serves in the order of arrival; the base of the other policies."""

    def rank(self, source: EngineRequest) -> int:
        """Rank before the order of arrival: a smaller one is served first and preempted last."""
        return 0

    def eligible(self, running: Sequence[Request]) -> Sequence[Request]:
        """Return the running requests that this step may compute, in their order."""
        return running


class Priority(Policy):
    """Serves the smallest priority number first."""

    def rank(self, source: EngineRequest) -> int:
        return source.priority


class ShortestJobFirst(Policy):
    """Decodes the shortest sequences alone. `MAX_PASSED_OVER` bounds how long others wait."""

    def __init__(self) -> None:
        self._passed_over = 0  # steps in a row in which a request was

    def eligible(self, running: Sequence[Request]) -> Sequence[Request]:
        lengths = [_decode_length(request) for request in running]
        shortest = min(filter(None, lengths), default=0)
        if max(lengths, default=0) == shortest or self._passed_over == MAX_PASSED_OVER:
            self._passed_over = 0
            return running
        self._passed_over += 1
        return [r for r, length in zip(running, lengths, strict=True) if length in (0, shortest)]


def _decode_length(request: Request) -> int:
    """The current length of one that decodes; 0 for one that computes its prompt, or nothing."""
    length = request.num_computed + 1
    return length if length > request.prompt_len and request.num_missing == 1 else 0


POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": Policy, "priority": Priority, "sjf": ShortestJobFirst}
