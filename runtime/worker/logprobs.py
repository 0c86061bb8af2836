"""Log probabilities beside the tokens of outputs, and of prompts, and the hidden states that these take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microvllm.adapters.spec import ModelSpec
from microvllm.ops.sampling import largest
from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.request import SamplingParams, TokenLogprobs
from microvllm.runtime.worker.transfers import Device, on_device

PROMPT_SLICE = 128  # prompt positions whose logits exist at a time


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """Requested log probabilities beside each token: the `count` most likely ones (-1: all), or `ids`."""

    count: int
    ids: tuple[int, ...] | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> LogprobRequest | None:
        if params.logprobs is None:
            return None
        ids = params.logprob_token_ids
        return cls(params.logprobs, None if ids is None else tuple(ids))


class RowLogprobs:
    """The log probabilities that the requests of all rows ask for, in one of vLLM's `--logprobs-mode`."""

    def __init__(self, mode: str, device: Device) -> None:
        self.are_raw = mode.startswith("raw")
        self._normalise = mode.endswith("logprobs")
        self._device = device
        self._requests: dict[int, LogprobRequest] = {}

    def set_row(self, row: int, params: SamplingParams) -> None:
        request = LogprobRequest.of(params)
        if request is not None:
            self._requests[row] = request

    def clear_row(self, row: int) -> None:
        self._requests.pop(row, None)

    def concern(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows asks."""
        return bool(self._requests) and not self._requests.keys().isdisjoint(rows)

    def asked(self, rows: Sequence[int]) -> AskedRows | None:
        """Those of a step's rows that ask; None if there are none."""
        if not self.concern(rows):
            return None
        places = [i for i, row in enumerate(rows) if row in self._requests]
        asking = [rows[i] for i in places]
        at = on_device(places, torch.int64, self._device)
        return AskedRows(places, asking, at, [self._requests[row] for row in asking], self._normalise)


@dataclass(frozen=True, slots=True)
class AskedRows:
    """The rows of a step that ask for log probabilities: `places` in the step, also `at` the device."""

    places: list[int]
    rows: list[int]
    at: Tensor
    requests: Sequence[LogprobRequest]
    normalise: bool

    def log(self, logits: Tensor, tokens: Tensor) -> LogprobTensors:
        """logits: [r, vocab] float32, of these rows alone; tokens: [m] int64, of all rows of the step."""
        return log_probabilities(logits, tokens[self.at], self.requests, normalise=self.normalise)


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Some rows' log probabilities, still on the device: reading them waits for the step.

    tokens, values, ranks: [r], of the tokens themselves; other_ids, other_values: [r, k], of which the
    first `counts[i]` of row i are meant.
    """

    tokens: Tensor
    values: Tensor
    ranks: Tensor
    other_ids: Tensor
    other_values: Tensor
    counts: list[int]

    def read(self) -> list[TokenLogprobs]:
        return [
            TokenLogprobs([token, *ids[:count]], [value, *values[:count]], rank)
            for token, value, rank, ids, values, count in zip(
                self.tokens.tolist(),
                self.values.tolist(),
                self.ranks.tolist(),
                self.other_ids.tolist(),
                self.other_values.tolist(),
                self.counts,
                strict=True,
            )
        ]


def log_probabilities(
    logits: Tensor, tokens: Tensor, requested: Sequence[LogprobRequest], *, normalise: bool = True
) -> LogprobTensors:
    """logits: [r, vocab] float32; tokens: [r] int64, the token at each position; one request per row.

    `normalise=False` reports the logits themselves.
    """
    vocab = logits.shape[1]
    values = logits.log_softmax(-1) if normalise else logits
    own = values.gather(1, tokens.clamp(min=0)[:, None])
    ranks = (values > own).sum(-1) + 1
    counts = [
        len(w.ids) if w.ids is not None else vocab if w.count < 0 else min(w.count, vocab) for w in requested
    ]
    others = largest(values, max(counts))[1]
    for i, request in enumerate(requested):
        if request.ids:
            others[i, : len(request.ids)] = torch.tensor(request.ids)
    return LogprobTensors(tokens, own.squeeze(1), ranks, others, values.gather(1, others), counts)


def needed_rows(items: Sequence[ScheduledRequest], spec: ModelSpec) -> Tensor | None:
    """Of the tokens of a step those behind which one is sampled, [m] int64.

    None if the hidden states of others are needed, too, or there are none. items: in the tokens' order.
    """
    if spec.pooling is not None or all(item.num_new == 1 for item in items):
        return None
    if any(item.request.params.prompt_logprobs is not None or item.num_draft_tokens for item in items):
        return None
    ends = np.cumsum([item.num_new for item in items]) - 1
    return torch.from_numpy(ends[[item.samples for item in items]])


PromptLogprobs = Mapping[int, Sequence[LogprobTensors]]  # by index in plan.scheduled


def log_prompts(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    items: Sequence[ScheduledRequest],
    order: Sequence[int],
    *,
    normalise: bool,
) -> PromptLogprobs:
    """For prompts that ask: hidden state i of a prompt gives the log probabilities of its token i + 1.

    hidden: [n, hidden], of all tokens of `items`, of which order[i] is the index in the plan.
    """
    found: dict[int, list[LogprobTensors]] = {}
    first = 0
    for item, index in zip(items, order, strict=True):
        request, count = item.request, item.request.params.prompt_logprobs
        at, first = first - item.start, first + item.num_new
        if count is None:
            continue
        start = max(item.start, request.num_prompt_logprobs)
        end = min(item.start + item.num_new, request.prompt_len - 1)
        # In slices: logits are far larger than hidden states.
        for low in range(start, end, PROMPT_SLICE):
            high = min(low + PROMPT_SLICE, end)
            tokens = on_device(request.token_ids[low + 1 : high + 1], torch.int64, hidden.device)
            logits = logits_of(hidden[at + low : at + high])
            requested = [LogprobRequest(count)] * (high - low)
            entry = log_probabilities(logits, tokens, requested, normalise=normalise)
            found.setdefault(index, []).append(entry)
    return found


def read_prompts(found: PromptLogprobs) -> dict[int, list[TokenLogprobs]]:
    """What `log_prompts` has found, by index in the plan; waits for the device."""
    return {index: [entry for part in parts for entry in part.read()] for index, parts in found.items()}
