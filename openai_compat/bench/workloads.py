"""Defines a measurement: its requests, their prompts and the moments at which they arrive."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from microvllm.openai_compat.bench.client import Prompt

# Common words, each one token with its leading space in the usual byte-pair vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community name"
).split()


@dataclass(frozen=True, slots=True)
class Span:
    """Lengths are drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: some requests of known lengths under one load."""

    workload: str
    load: str
    """For the reader, such as `8 streams` or `2 requests/s`."""
    lengths: tuple[tuple[int, int], ...]
    """(tokens of the prompt, tokens of the answer) of each user; of a chat: of each message, each answer."""
    concurrency: int | None = None
    """Requests at a time; None: as many as come."""
    request_rate: float = math.inf
    """Requests per second; infinite: all come at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps between arrivals; 1 makes them a Poisson process."""
    turns: int = 0
    """Messages of each user in a chat; 0: one completion each."""

    def arrivals(self, seed: int) -> list[float]:
        """Return the second at which each user comes, the same for a seed; empty if all come at once."""
        if math.isinf(self.request_rate):
            return []
        source = random.Random(seed)
        scale = 1 / (self.request_rate * self.burstiness)
        gaps = [source.gammavariate(self.burstiness, scale) for _ in self.lengths]
        return list(accumulate(gaps))


def random_words(source: random.Random, length: int) -> str:
    """Return `length` random words, separated by spaces."""
    return " ".join(source.choice(WORDS) for _ in range(length))


def random_ids(lengths: Sequence[int], seed: int, low: int = 1000, high: int = 10000) -> list[Prompt]:
    """Different prompts of token ids in [low, high): no two share a beginning that a cache could hold."""
    source = random.Random(seed)
    return [[source.randrange(low, high) for _ in range(length)] for length in lengths]


def random_texts(lengths: Sequence[int], seed: int) -> list[Prompt]:
    """Different prompts of words; the server says how many tokens these are to it."""
    source = random.Random(seed)
    return [" " + random_words(source, length) for length in lengths]
