"""Takes proposed tokens through the steps that check them (Leviathan et al., 2023, arXiv:2211.17192).

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from microvllm.runtime.core.kv_cache import KVCacheManager
from microvllm.runtime.core.plan import Request, ScheduledRequest


class Drafter(Protocol):
    """Proposes tokens, which the runner checks in one step."""

    def propose(self, requests: Sequence[Request]) -> Sequence[Sequence[int]]:
        """For each request the tokens that may follow its `token_ids`, in order; none where it cannot say."""
        ...


class Drafts:
    """The drafts of all requests, from the step behind which they are proposed to the commit of the next."""

    def __init__(self, kv: KVCacheManager, drafter: Drafter | None) -> None:
        self._kv = kv
        self._drafter = drafter

    def propose(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Have drafts for the requests that a step just gave a token."""
        if self._drafter is None:
            return
        decoding = [item.request for item in scheduled if item.samples and item.request.finish_reason is None]
        for request, drafts in zip(decoding, self._drafter.propose(decoding), strict=True):
            request.drafts = drafts

    def trim(self, request: Request, spare: int) -> int:
        """Keep the drafts that take no block or token from other requests and may still be an output.

        spare: what the step's budget has beyond one token for each eligible request. Returns how many are
        left.
        """
        left = request.max_tokens - request.num_output - 1
        room = min(left, spare, self._kv.num_available - 1)
        # With a token in flight, drafts would be at the wrong positions.
        request.drafts = () if request.num_in_flight or room <= 0 else request.drafts[:room]
        return len(request.drafts)

    def settle(self, request: Request, num_rejected: int) -> None:
        """Free the room of rejected drafts: their positions are computed again."""
        request.drafts = ()
        if num_rejected and request.finish_reason is None:
            request.num_computed -= num_rejected
            self._kv.shrink(request.seq_id, num_rejected)
