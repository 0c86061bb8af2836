"""Defines the named workloads of compare.py, and what the user may change about them.

`single` and `concurrent35` are one user and 35 requests at once, 128 to 512 tokens in and 500 out; `nano256`
and `offline256` have the lengths of nano-vllm's bench.py, draw by draw. Each has a small form for a CPU, in
which it takes seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from microvllm.openai_compat.bench import workloads
from microvllm.openai_compat.bench.client import Completion, Conversation, User
from microvllm.openai_compat.bench.workloads import Span, random_ids, random_texts, random_words

OFFLINE = "offline256"
CHAT_TEMPLATE_TOKENS = 16
"""About what a chat template adds to a message."""


@dataclass(frozen=True, slots=True)
class Case(workloads.Case):
    """One measurement of a comparison."""

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

    def users(self, kind: str, seed: int) -> list[User]:
        """The users with new prompts, of token ids (`ids`) or words (`text`); the same for the same seed."""
        if self.turns:
            source = random.Random(seed)
            system = random_words(source, self.shared_len)
            return [
                Conversation(system, tuple(random_words(source, length) for _ in range(self.turns)), output)
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


def draw_lengths(count: int, prompt: Span, output: Span, seed: int) -> tuple[tuple[int, int], ...]:
    """(prompt, answer) tokens of each request; the same for the same seed."""
    source = random.Random(seed)
    return tuple((prompt.draw(source), output.draw(source)) for _ in range(count))


def nano_lengths(count: int = 256, low: int = 100, high: int = 1024) -> tuple[tuple[int, int], ...]:
    """The lengths of nano-vllm's bench.py: its seed, its draws in its order. 133,966 answer tokens in all."""
    source = random.Random(0)
    prompts = []
    for _ in range(count):
        length = source.randint(low, high)
        for _ in range(length):
            source.randint(0, 10000)  # there the prompt's token ids
        prompts.append(length)
    return tuple((length, source.randint(low, high)) for length in prompts)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the user may change about a workload; None keeps its own."""

    quick: bool = False
    """The small form."""
    streams: Sequence[int] | None = None
    request_rates: Sequence[float] | None = None
    requests: int | None = None
    input_len: Span | None = None
    output_len: Span | None = None
    burstiness: float = 1.0
    seed: int = 0
    """Of the lengths."""

    def lengths(self, count: int, prompt: Span, output: Span) -> tuple[tuple[int, int], ...]:
        """`count`, `prompt` and `output` are the workload's own."""
        return draw_lengths(
            self.requests or count, self.input_len or prompt, self.output_len or output, self.seed
        )


def single(sizes: Sizes) -> list[Case]:
    """One user, one request after the other."""
    if sizes.quick:
        lengths = sizes.lengths(2, Span(64, 256), Span(32, 32))
    else:
        lengths = sizes.lengths(4, Span(128, 512), Span(500, 500))
    return [Case("single", "1 stream", lengths, concurrency=1)]


def concurrent35(sizes: Sizes) -> list[Case]:
    """35 requests at once."""
    if sizes.quick:
        lengths = sizes.lengths(35, Span(8, 32), Span(8, 8))
    else:
        lengths = sizes.lengths(35, Span(128, 512), Span(500, 500))
    return [Case("concurrent35", f"{len(lengths)} at once", lengths, concurrency=len(lengths))]


def nano256(sizes: Sizes) -> list[Case]:
    """nano-vllm's benchmark, served: 256 requests at once, the lengths those of its seed."""
    if sizes.input_len or sizes.output_len or sizes.requests:
        span = Span(4, 32) if sizes.quick else Span(100, 1024)
        lengths = sizes.lengths(64 if sizes.quick else 256, span, span)
    else:
        lengths = nano_lengths(64, 4, 32) if sizes.quick else nano_lengths()
    return [Case("nano256", f"{len(lengths)} at once", lengths, concurrency=len(lengths))]


def offline256(sizes: Sizes) -> list[Case]:
    """The same requests through `LLM.generate`, by the engines without a server."""
    return [replace(case, workload=OFFLINE) for case in nano256(sizes)]


def streams(sizes: Sizes) -> list[Case]:
    """A growing number of streams, each of one request: throughput against concurrency."""
    counts = sizes.streams or ((1, 2, 4, 8) if sizes.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256))
    prompt, output = (Span(32, 32), Span(16, 16)) if sizes.quick else (Span(128, 128), Span(128, 128))
    return [
        Case(
            "streams",
            f"{count} stream{'s' if count > 1 else ''}",
            sizes.lengths(count, prompt, output),
            concurrency=count,
        )
        for count in counts
    ]


def sweep(sizes: Sizes) -> list[Case]:
    """An open loop: requests come at random moments, whether or not the server keeps up."""
    rates = sizes.request_rates or ((1.0, 2.0, 4.0) if sizes.quick else (1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
    cases = []
    for rate in rates:
        if sizes.quick:
            lengths = sizes.lengths(max(4, round(3 * rate)), Span(16, 48), Span(8, 8))
        else:
            lengths = sizes.lengths(max(20, round(20 * rate)), Span(128, 512), Span(128, 128))
        load = f"{rate:g} requests/s"
        cases.append(
            Case("sweep", load, lengths, request_rate=rate, burstiness=sizes.burstiness),
        )
    return cases


def chat(sizes: Sizes) -> list[Case]:
    """Users of one assistant: all share a long system prompt, each repeats its conversation every turn."""
    if sizes.quick:
        users, turns, shared, message, answer = 4, 2, 128, Span(16, 32), Span(8, 8)
    else:
        users, turns, shared, message, answer = 16, 5, 768, Span(32, 96), Span(128, 128)
    lengths = sizes.lengths(users, message, answer)
    load = f"{len(lengths)} users, {turns} turns, {shared} shared tokens"
    return [Case("chat", load, lengths, concurrency=len(lengths), turns=turns, shared_len=shared)]


def prefill1000(sizes: Sizes) -> list[Case]:
    """Prompts of 1,000 tokens and one token out, one after the other: how fast a prompt is read."""
    lengths = sizes.lengths(2 if sizes.quick else 4, Span(1000, 1000), Span(1, 1))
    return [Case("prefill1000", "1 stream", lengths, concurrency=1)]


def prefill4000(sizes: Sizes) -> list[Case]:
    """The same of one prompt of 4,000 tokens."""
    return [Case("prefill4000", "1 stream", sizes.lengths(1, Span(4000, 4000), Span(1, 1)), concurrency=1)]


def prefill7900(sizes: Sizes) -> list[Case]:
    """The same of one prompt of 7,900 tokens, which nearly fill the context of SmolLM2."""
    return [Case("prefill7900", "1 stream", sizes.lengths(1, Span(7900, 7900), Span(1, 1)), concurrency=1)]


WORKLOADS: dict[str, Callable[[Sizes], list[Case]]] = {
    workload.__name__: workload
    for workload in (
        *(single, concurrent35, nano256, offline256, streams, sweep, chat),
        *(prefill1000, prefill4000, prefill7900),
    )
}
SERVED = tuple(name for name in WORKLOADS if name != OFFLINE)
QUICK_WORKLOADS = ("single", "streams", "concurrent35", "chat", "sweep", "nano256")
"""What is run on a CPU if none is named, in this order as far as the time goes."""
FULL_WORKLOADS = ("single", "concurrent35", "nano256", "streams", "sweep", "chat")


def cases_of(names: Sequence[str], sizes: Sizes, *, busy: bool = False) -> list[Case]:
    """The cases of some workloads in their order; with `busy` each of them also beside a busy process."""
    cases = [case for name in names for case in WORKLOADS[name](sizes)]
    return cases + [replace(case, busy=True) for case in cases] if busy else cases
