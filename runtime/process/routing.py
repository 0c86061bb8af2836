"""Chooses the engine for a prompt, by the part of it that is in a prefix cache and by load. Imports no torch.

What an engine has cached is not asked but estimated: each keeps the most recent prompts that it was given, as
far as its KV cache goes. A wrong estimate costs a prefill, never an answer. The rule is that of SGLang's
cache-aware router (Zheng et al., 2024, arXiv:2312.07104) with one measure, tokens, in place of thresholds.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, TypeVar

MIN_CHUNK = 32  # tokens for each key of a prompt
# What counts beside a token to prefill. A cached token counts twice: to compute it once more takes time from
# the others, and room in the cache. An open sequence has some tokens to go, which all compute together.
CACHED_WEIGHT = 2
OPEN_TOKENS = 16
# An engine with more open sequences than this, beyond twice those of another, is passed over.
MAX_MORE_OPEN = 32


class PrefixIndex:
    """The prompts that an engine has probably cached, as chained keys of chunks of `chunk` tokens.

    `capacity`: tokens that its KV cache holds; of those beyond it, the ones that were used last stay.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._keys: OrderedDict[int, None] = OrderedDict()

    def matched(self, keys: Sequence[int]) -> int:
        """Return how many tokens at the beginning of a prompt with these keys are cached."""
        known = self._keys
        for number, key in enumerate(keys):
            if key not in known:
                return number * self.chunk
        return len(keys) * self.chunk

    def note(self, keys: Sequence[int], capacity: int) -> None:
        """Note that a prompt with these keys is given to the engine."""
        known = self._keys
        for key in reversed(keys):  # its end is evicted first, as in the engine
            known[key] = None
            known.move_to_end(key)
        while len(known) * self.chunk > capacity and known:
            known.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the cache is empty."""
        self._keys.clear()


class Load(Protocol):
    """What is known of an engine when a prompt comes.

    `num_open`: sequences that it computes or that wait; `waiting_tokens`: to prefill, of prompts without an
    output yet.
    """

    prefixes: PrefixIndex
    waiting_tokens: int

    @property
    def num_open(self) -> int: ...

    @property
    def predicted_wait(self) -> float:
        """Seconds until it begins another request."""
        ...


EngineT = TypeVar("EngineT", bound=Load)


def prompt_keys(token_ids: Sequence[int], chunk: int, salt: str) -> list[int]:
    """Return a key of 64 bits for each whole chunk of a prompt, of all tokens up to the chunk's end."""
    data, size = array("I", token_ids).tobytes(), chunk * array("I").itemsize
    keys, key = [], hash(salt)
    for start in range(0, len(data) - size + 1, size):
        key = hash((key, data[start : start + size]))
        keys.append(key)
    return keys


class Router:
    """Chooses among the engines of a server. `rows`: sequences that each runs at once.

    `max_wait_s`: how long a request may wait for its turn.
    """

    def __init__(self, rows: int, max_wait_s: float) -> None:
        self._rows = rows
        self._max_wait_s = max_wait_s
        self._turn = 0

    def choose(self, engines: Sequence[EngineT], keys: Sequence[int]) -> EngineT:
        """Return the engine with the least work before the first token of a prompt with these keys.

        That is what it has to prefill, and its open sequences. One without a free row, or with many more open
        sequences than another, is passed over while another is there, and so is one that is predicted to
        begin too late.
        """
        most = min(self._rows - 1, 2 * min(engine.num_open for engine in engines) + MAX_MORE_OPEN)
        fit = [engine for engine in engines if engine.num_open <= most]
        fit = fit or [engine for engine in engines if engine.predicted_wait <= self._max_wait_s]
        fit = fit or list(engines)
        self._turn += 1
        first = self._turn % len(fit)  # of equals another one each time
        return min(fit[first:] + fit[:first], key=lambda engine: self._work(engine, keys))

    @staticmethod
    def _work(engine: Load, keys: Sequence[int]) -> int:
        cached = engine.prefixes.matched(keys)
        return engine.waiting_tokens + OPEN_TOKENS * engine.num_open - CACHED_WEIGHT * cached
