"""Beam search of the offline API: the state of one prompt, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from microvllm.runtime import beam_search
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.offline.prompts import OfflinePrompt
from microvllm.runtime.offline.request_output import PositionLogprobs, position_logprobs
from microvllm.runtime.offline.sampling_params import BeamSearchParams, SamplingParams
from microvllm.runtime.request import TokenLogprobs


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam: `tokens` are those of the prompt and of the answer, and `text` is theirs.

    `logprobs` has one entry per generated token, `cum_logprob` is the sum over them.
    """

    orig_prompt: dict[str, Any]
    tokens: list[int]
    logprobs: list[PositionLogprobs]
    cum_logprob: float
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


class OfflineSearch:
    """The beam search of one prompt; `live` beams take part in the next step."""

    def __init__(
        self, engine: InferenceEngine, prompt: OfflinePrompt, params: BeamSearchParams, priority: int
    ) -> None:
        self.ids = prompt.ids or []
        self.options = {"priority": priority, "cache_salt": prompt.cache_salt}
        self._engine, self._prompt, self._params = engine, prompt, params
        whole = SamplingParams(max_tokens=params.max_tokens, ignore_eos=params.ignore_eos)
        self._request = engine.sequences(self.ids, whole.resolve())[0].request  # its limits and end tokens
        self._left = self._request.params.max_tokens or 1
        self._ends = {self._request.eos_token_id, *self._request.stop_token_ids}
        self._done: list[beam_search.Beam] = []
        self.live = [beam_search.Beam()]

    def advance(self, next_tokens: Sequence[TokenLogprobs]) -> None:
        self.live, ended = beam_search.advance(self.live, next_tokens, self._params.beam_width, self._ends)
        self._done += ended
        self._left -= 1
        if self._left == 0:
            self._done += self.live
            self.live = []

    def output(self) -> BeamSearchOutput:
        found = beam_search.best(self._done, self._params.beam_width, self._params.length_penalty)
        return BeamSearchOutput([self._sequence(beam) for beam in found])

    def _sequence(self, beam: beam_search.Beam) -> BeamSearchSequence:
        tokenizer = self._engine.tokenizer
        tokens = [*self.ids, *beam.tokens]
        end = beam.tokens[-1] if beam.ended else None
        hidden = beam.ended and not self._params.include_stop_str_in_output
        return BeamSearchSequence(
            {"type": "token", "prompt_token_ids": self.ids, "prompt": self._prompt.text},
            tokens,
            [position_logprobs(entry, tokenizer) for entry in beam.entries],
            beam.logprob,
            tokenizer.decode(tokens[: len(tokens) - hidden], self._params.skip_special_tokens),
            "stop" if beam.ended else "length",
            None if end == self._request.eos_token_id else end,
        )
