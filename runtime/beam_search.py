"""Beam search, token by token: what the server and the offline API share.

A step requests the likeliest next tokens of every live beam, twice as many as there are beams. Beams begin as
those of the step before did, so the prefix cache makes a step cost about one token per beam.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from microvllm.runtime.request import TokenLogprobs


@dataclass(frozen=True)
class Beam:
    """`tokens` were generated, with the sum of their log probabilities; `ended` by the last of them.

    `entries` has, for each token, the log probabilities among which it was chosen.
    """

    logprob: float = 0.0
    tokens: tuple[int, ...] = ()
    ended: bool = False
    entries: tuple[TokenLogprobs, ...] = ()

    def score(self, length_penalty: float) -> float:
        """As vLLM 0.33 and transformers: a final end token counts as one of the tokens."""
        return float(self.logprob / max(len(self.tokens), 1) ** length_penalty)


def advance(
    live: Sequence[Beam], next_tokens: Sequence[TokenLogprobs], width: int, ends: Collection[int | None]
) -> tuple[list[Beam], list[Beam]]:
    """One step -> (the `width` likeliest beams that go on, those that ended).

    An entry of `next_tokens` begins with the token that was sampled, which comes again among the likeliest.
    """
    found = [
        Beam(beam.logprob + logprob, (*beam.tokens, token), token in ends, (*beam.entries, entry))
        for beam, entry in zip(live, next_tokens, strict=True)
        for token, logprob in zip(entry.token_ids[1:], entry.logprobs[1:], strict=True)
    ]
    found.sort(key=lambda beam: -beam.logprob)
    return [beam for beam in found if not beam.ended][:width], [beam for beam in found if beam.ended]


def best(beams: Sequence[Beam], width: int, length_penalty: float) -> list[Beam]:
    """Return the `width` best of all beams, best first."""
    return sorted(beams, key=lambda beam: beam.score(length_penalty), reverse=True)[:width]
