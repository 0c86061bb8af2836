"""Log probabilities beside the tokens: of the token itself and of those that a request asks about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microvllm.runtime.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """What a request wants beside each token: the `count` most likely ones (-1: all), or exactly `ids`."""

    count: int
    ids: tuple[int, ...] | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> LogprobRequest | None:
        if params.logprobs is None:
            return None
        ids = params.logprob_token_ids
        return cls(params.logprobs, None if ids is None else tuple(ids))


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


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, falling, equal ones by rising id: (values, ids), each [m, count].

    Logits computed in bfloat16 are full of equal values. `topk` takes and orders those as it likes for
    each `count`, which depends on the other rows: a seeded request would draw another token in company.
    """
    rows, vocab = values.shape
    if count == 0:
        return values.new_empty(rows, 0), torch.empty(rows, 0, dtype=torch.int64, device=values.device)
    best, ids = values.topk(count)
    last = best[:, -1:]
    equal, taken = values == last, best == last
    cut = ((equal.sum(-1) > taken.sum(-1)) & last.squeeze(-1).isfinite()).nonzero().squeeze(-1)
    if len(cut):  # the last place goes through a run of equal values: take those with the smallest ids
        falling = -torch.arange(vocab, dtype=torch.float32, device=values.device)
        smallest = torch.where(equal[cut], falling, -torch.inf).topk(count).indices
        place = (taken[cut].cumsum(-1) - 1).clamp(min=0)
        ids[cut] = torch.where(taken[cut], smallest.gather(1, place), ids[cut])
    ids = ids.sort(-1).values
    best, order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)
