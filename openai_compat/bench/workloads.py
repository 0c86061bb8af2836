"""What is sent and when: one measurement's requests, their prompts and the moments at which they arrive."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from microvllm.openai_compat.bench.client import Completion, Conversation, Prompt, User

# Common words, each one token with its leading space in the usual byte-pair vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community name"
).split()
CHAT_TEMPLATE_TOKENS = 16
"""About what a chat template adds to a message."""


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
    """Requests a second; infinite: all come at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps between arrivals; 1 makes them a Poisson process."""
    turns: int = 0
    """Messages of each user in a chat; 0: a completion each."""
    shared_len: int = 0
    """Tokens of a chat's system prompt, which all users of a measurement share."""
    busy: bool = False
    """With a process beside it that never rests."""

    def __str__(self) -> str:
        return f"{self.workload}, {self.load}" + (", busy neighbour" if self.busy else "")

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer; an estimate from above in a chat."""
        if not self.turns:
            return max(prompt + output for prompt, output in self.lengths)
        per_turn = max(message + answer for message, answer in self.lengths) + 2 * CHAT_TEMPLATE_TOKENS
        return self.shared_len + CHAT_TEMPLATE_TOKENS + self.turns * per_turn

    @property
    def at_once(self) -> int:
        """Requests that may run at the same time."""
        return min(len(self.lengths), self.concurrency or len(self.lengths))

    @property
    def prefill_only(self) -> bool:
        """Whether the answers are single tokens, so that the prompts' speed is what counts."""
        return all(output == 1 for _, output in self.lengths)

    def arrivals(self, seed: int) -> list[float]:
        """Seconds after which each user comes; empty if all come at once. The same for the same seed."""
        if math.isinf(self.request_rate):
            return []
        source = random.Random(seed)
        scale = 1 / (self.request_rate * self.burstiness)
        gaps = [source.gammavariate(self.burstiness, scale) for _ in self.lengths]
        return list(accumulate(gaps))

    def users(self, kind: str, seed: int) -> list[User]:
        """The users with new prompts, of token ids (`ids`) or words (`text`); the same for the same seed."""
        if self.turns:
            source = random.Random(seed)
            system = _words(source, self.shared_len)
            return [
                Conversation(system, tuple(_words(source, length) for _ in range(self.turns)), output)
                for length, output in self.lengths
            ]
        make = random_ids if kind == "ids" else random_texts
        prompts = make([length for length, _ in self.lengths], seed)
        return [Completion(p, output) for p, (_, output) in zip(prompts, self.lengths, strict=True)]

    @property
    def work(self) -> float:
        """About how long it takes next to others: tokens of answers, and half of those of new prompts."""
        turns = max(1, self.turns)
        prompts = sum(prompt for prompt, _ in self.lengths)
        answers = sum(answer for _, answer in self.lengths)
        return (self.shared_len + turns * prompts) / 2 + turns * answers

    def shortened(self, output_len: int, users: int | None = None) -> Case:
        """The same with answers of at most `output_len` tokens, to warm up.

        A limit of users also leaves out what only repeats: users who wait for others, a chat's further turns.
        """
        count = min(users, self.at_once) if users else None
        lengths = tuple((prompt, min(output, output_len)) for prompt, output in self.lengths[:count])
        return replace(self, lengths=lengths, turns=min(self.turns, 1) if users else self.turns)


def _words(source: random.Random, length: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(length))


def random_ids(lengths: Sequence[int], seed: int, low: int = 1000, high: int = 10000) -> list[Prompt]:
    """Different prompts of token ids in [low, high): no two share a beginning that a cache could hold."""
    source = random.Random(seed)
    return [[source.randrange(low, high) for _ in range(length)] for length in lengths]


def random_texts(lengths: Sequence[int], seed: int) -> list[Prompt]:
    """Different prompts of words; the server says how many tokens these are to it."""
    source = random.Random(seed)
    return [" " + _words(source, length) for length in lengths]
