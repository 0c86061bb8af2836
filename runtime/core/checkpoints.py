"""Keeps states of sequences at the ends of blocks, so that the prefix cache works for layers with a state.

A state is what all tokens so far have made of it: a sequence can go on from a cached prefix only where a
state was kept, at the end of a step whose last token fills a block. Chunks of a prompt are cut so that one
ends at its last whole block, and one where the cached blocks end that could not be reused for lack of a
state: of prompts with a common beginning the first leaves blocks there, the second a state, and the others
go on from it. While a text is generated there is one checkpoint, which moves on from block to block: the next
turn of a chat goes on from the end of this one. A checkpoint is a row of the states behind those of requests;
the oldest that was not used gives way. Imports no torch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from microvllm.runtime.core.plan import Request, ScheduledRequest
from microvllm.runtime.core.pool_audit import require

logger = logging.getLogger("microvllm.engine")

Copies = tuple[tuple[int, int], ...]  # from which row to which


class StateCheckpoints:
    """Which row, of those in `rows`, holds the state behind which prefix.

    A row is free, or found by its key, or pending, between the plan that fills it and that step's commit.
    """

    def __init__(self, rows: range, block_size: int, num_cached: Callable[[Sequence[bytes]], int]) -> None:
        """rows: none for a model without states, which can go on anywhere.

        num_cached: how many blocks with these keys, in order, the cache holds up to the first that it lacks.
        """
        self.rows, self._block_size, self._num_cached = rows, block_size, num_cached
        self.missed_tokens = 0  # of prompts: cached, but computed again since there was no state behind them
        self._free = list(reversed(rows))
        self._row_of: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._pending: dict[tuple[int, int], int] = {}  # by sequence and number of its tokens
        self._newest: dict[int, bytes] = {}  # the key of each sequence's own generated tokens
        self._restored: list[tuple[int, int]] = []  # since the last plan
        self._kept: list[tuple[int, int]] = []

    def longest_hit(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks behind which there is a state: as many as possible."""
        if not self.rows:
            return len(keys)
        return next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._row_of), 0)

    def cut(self, request: Request, start: int, num_new: int) -> int:
        """Return how many of a request's `num_new` tokens from `start` on end where a later one may go on."""
        if not self.rows:
            return num_new
        keys = self._keys(request)
        cached = self._end_of_cached(keys, start)
        if cached > start and keys[cached // self._block_size - 1] in self._row_of:
            cached = 0
        ends = (cached, len(keys) * self._block_size, start + num_new)
        return min(end for end in ends if end > start) - start

    def restore(self, request: Request) -> None:
        """Begin a request's row with the state of the prefix that `longest_hit` found, if it found one.

        Counts the cached tokens behind it that are computed again, unless they were computed for this request
        before, or its log probabilities require that.
        """
        if not self.rows:
            return
        keys, start = self._keys(request), request.num_computed
        if start:
            key = keys[start // self._block_size - 1]
            self._row_of.move_to_end(key)
            self._restored.append((self._row_of[key], request.row))
        missed = self._end_of_cached(keys, start) - start
        if missed and request.num_cached is None and request.params.prompt_logprobs is None:
            if not self.missed_tokens:
                logger.info(
                    "%d tokens of a prompt are in the prefix cache, but computed again: no state was kept "
                    "behind them. microvllm:prefix_state_misses_total counts such tokens",
                    missed,
                )
            self.missed_tokens += missed

    def keep(self, request: Request) -> None:
        """Keep a request's state behind the step that was just planned for it, if that fills a block."""
        end = request.num_computed
        if end % self._block_size:
            return
        row = self._take(request, end)
        if row is not None:
            self._pending[request.seq_id, end] = row
            self._kept.append((request.row, row))

    def copies(self) -> tuple[Copies, Copies]:
        """What a plan copies before and behind its step."""
        made = tuple(self._restored), tuple(self._kept)
        self._restored, self._kept = [], []
        return made

    def settle(self, item: ScheduledRequest, *, is_known: bool) -> None:
        """Let sequences find the state behind an entry of a plan, if it was kept and its tokens are known."""
        request, end = item.request, item.start + item.num_new
        row = self._pending.pop((request.seq_id, end), None)
        if row is None:
            return
        key = request.keys.upto(end // self._block_size)[-1] if is_known else b""
        if not is_known or key in self._row_of:
            self._free.append(row)
            return
        self._row_of[key] = row
        if end > request.prompt_len:
            self._newest[request.seq_id] = key

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget the states behind these blocks."""
        rows = (self._row_of.pop(key, None) for key in keys)
        self._free.extend(row for row in rows if row is not None)

    def leave(self, seq_id: int) -> None:
        """The newest state of a sequence that has ended moves on no more."""
        self._newest.pop(seq_id, None)

    def forget(self) -> None:
        """Forget every state but those of steps in flight."""
        self._free.extend(self._row_of.values())
        self._row_of.clear()
        self._newest.clear()

    def check(self) -> None:
        """Raise `BrokenPoolError` unless each row is free, found by a key, or pending."""
        rows = [*self._free, *self._row_of.values(), *self._pending.values()]
        require(sorted(rows) == list(self.rows), "free, found and pending states do not partition")

    def _keys(self, request: Request) -> list[bytes]:
        """Of the blocks that may be reused: the last token's logits are wanted, so it is always computed."""
        return request.keys.upto((len(request.token_ids) - 1) // self._block_size)

    def _end_of_cached(self, keys: list[bytes], start: int) -> int:
        """Where the blocks end that are in the cache from the token at `start` on, without a gap."""
        first = start // self._block_size
        found = self._num_cached(keys[first:])
        return (first + found) * self._block_size if found else start

    def _take(self, request: Request, end: int) -> int | None:
        """The row of the sequence's own last generated block, a free one, or the oldest."""
        key = self._newest.pop(request.seq_id, None) if end > request.prompt_len else None
        own = None if key is None else self._row_of.pop(key, None)
        if own is not None:
            return own
        if self._free:
            return self._free.pop()
        return self._row_of.popitem(last=False)[1] if self._row_of else None
