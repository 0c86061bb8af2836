"""`RequestOutput` and its parts: what the offline API returns, under vLLM's names."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from microvllm.runtime.offline.core_thread import OfflineSequence
from microvllm.runtime.offline.sampling_params import SamplingParams
from microvllm.runtime.request import TokenLogprobs
from microvllm.runtime.text.detokenizer import TextDelta
from microvllm.runtime.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Logprob:
    """One token's log probability; rank 1 is the most likely, None where it was not computed."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs: TypeAlias = "dict[int, Logprob]"


@dataclass(slots=True)
class FlatLogprobs(Sequence["PositionLogprobs | None"]):
    """Log probabilities of all positions in flat lists, which a garbage collector passes over quickly.

    Position i has the entries from `start_indices[i]` up to `end_indices[i]`; reading one makes the
    {token id: Logprob} that is there without `flat_logprobs`.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, position: PositionLogprobs | None) -> None:
        self.start_indices.append(len(self.token_ids))
        for token, entry in (position or {}).items():
            self.token_ids.append(token)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self.start_indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part = FlatLogprobs()
            for position in range(*index.indices(len(self))):
                part.append(self[position])
            return part
        entries = range(self.start_indices[index], self.end_indices[index])
        return {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i])
            for i in entries
        }

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence; `finish_reason` is "stop", "length" or "repetition".

    With `SamplingParams.logprobs`, `logprobs` has one {token id: Logprob} per token, the sampled one first,
    and `cumulative_logprob` is the sum over the sampled ones.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Any = None  # list[PositionLogprobs] or FlatLogprobs
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestStateStats:
    """The times of a request: `arrival_time` in seconds of `time.time()`, the others of `time.monotonic()`.

    Of several sequences the first token is that of the earliest, the last that of the latest.
    """

    num_generation_tokens: int = 0
    num_preemptions: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0  # seconds from arrival


@dataclass(slots=True)
class RequestOutput:
    """All sequences of one prompt.

    With `SamplingParams.prompt_logprobs`, `prompt_logprobs` has an entry per prompt token, the first None.
    `num_cached_tokens` counts prompt tokens from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: Any = None  # list[PositionLogprobs | None] or FlatLogprobs
    metrics: RequestStateStats | None = None
    num_cached_tokens: int | None = None
    # vLLM's fields for what does not exist here.
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    kv_transfer_params: None = None


def position_logprobs(
    entry: TokenLogprobs, tokenizer: Tokenizer, *, ranked: bool = True, decode: bool = True
) -> PositionLogprobs:
    """Return one position by token; `ranked`: the tokens after the first are the likeliest ones in order."""
    found: PositionLogprobs = {}
    for place, (token, value) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        if token not in found:
            rank = entry.rank if place == 0 else place if ranked else None
            text = tokenizer.decode([token], skip_special_tokens=False) if decode else None
            found[token] = Logprob(value, rank, text)
    return found


class OutputBuilder:
    """Builds the `RequestOutput` of one prompt from the deltas of its sequences."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        sequences: Sequence[OfflineSequence],
        tokenizer: Tokenizer,
    ) -> None:
        self.params = params
        self.sequences = sequences
        self._tokenizer = tokenizer
        self.arrival_time = time.time()
        self.num_returned = 0  # tokens in the outputs of `LLMEngine.step`
        outputs = [CompletionOutput(place, logprobs=self._no_logprobs()) for place in range(len(sequences))]
        self._outputs = dict(zip(sequences, outputs, strict=True))
        self._shown = [(0, 0)] * len(sequences)  # characters and tokens in snapshots so far
        self.result = RequestOutput(request_id, prompt, sequences[0].prompt_token_ids, outputs)

    def add_delta(self, sequence: OfflineSequence, delta: TextDelta) -> None:
        """Add a delta of one sequence."""
        result, output = self.result, self._outputs[sequence]
        if not output.token_ids:
            result.num_cached_tokens = self.sequences[0].num_cached_tokens
        if self.params.detokenize:
            output.text += delta.text
        output.token_ids += delta.token_ids
        if delta.prompt_logprobs is not None:
            result.prompt_logprobs = FlatLogprobs() if self.params.flat_logprobs else []
            result.prompt_logprobs.append(None)
            for entry in delta.prompt_logprobs:
                result.prompt_logprobs.append(self._position(entry, True))
        if delta.logprobs is not None and output.logprobs is not None:
            for entry in delta.logprobs:
                output.logprobs.append(self._position(entry, self.params.logprob_token_ids is None))
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + entry.logprobs[0]
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
            result.finished = all(each.finished() for each in result.outputs)
            if result.finished:
                result.metrics = self._metrics()

    def snapshot(self, delta: bool) -> RequestOutput:
        """Return a copy of the result so far; with `delta` only what is new since the last one."""
        outputs = []
        for output, (chars, tokens) in zip(self.result.outputs, self._shown, strict=True):
            if delta and tokens == len(output.token_ids):
                continue
            start, first = (chars, tokens) if delta else (0, 0)
            logprobs = None if output.logprobs is None else output.logprobs[first:]
            part = replace(
                output, text=output.text[start:], token_ids=output.token_ids[first:], logprobs=logprobs
            )
            outputs.append(part)
        self._shown = [(len(output.text), len(output.token_ids)) for output in self.result.outputs]
        return replace(self.result, outputs=outputs)

    def _no_logprobs(self) -> Any:
        if self.sequences[0].request.params.logprobs is None:
            return None
        return FlatLogprobs() if self.params.flat_logprobs else []

    def _position(self, entry: TokenLogprobs, ranked: bool) -> PositionLogprobs:
        return position_logprobs(entry, self._tokenizer, ranked=ranked, decode=self.params.detokenize)

    def _metrics(self) -> RequestStateStats:
        timings = [sequence.timing for sequence in self.sequences]
        arrival = timings[0].arrival
        first = min(timing.first_token or arrival for timing in timings)
        return RequestStateStats(
            num_generation_tokens=sum(len(output.token_ids) for output in self.result.outputs),
            num_preemptions=sum(sequence.num_preemptions for sequence in self.sequences),
            arrival_time=self.arrival_time,
            queued_ts=arrival,
            scheduled_ts=min(timing.scheduled or arrival for timing in timings),
            first_token_ts=first,
            last_token_ts=max(timing.last_token or arrival for timing in timings),
            first_token_latency=first - arrival,
        )
