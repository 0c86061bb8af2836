"""Draws tokens by temperature, min-p, top-k and top-p, in plain torch.

`ops.gpu.sampling` has kernels that do the same with other random numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# A nucleus rarely needs more candidates than this; when it does, the whole row is sorted.
NUCLEUS_CANDIDATES = 256


def draw(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """One token a row: [m] int64, by inverting the cumulative distribution at one uniform number.

    logits: [m, vocab] float32; all others: [m], uniform in [0, 1), temperature > 0; top_k of 0, top_p of 1
    and min_p of 0 are off.
    """
    logits = logits / temperature[:, None]
    if bool(min_p.any()):
        logits.masked_fill_(_below_min_p(logits, min_p[:, None]), -torch.inf)
    filtered = (top_k > 0) | (top_p < 1)
    if not bool(filtered.any()):
        return _invert(logits.softmax(-1), uniform)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    plain = (~filtered).nonzero().squeeze(-1)
    if len(plain):
        tokens[plain] = _invert(logits[plain].softmax(-1), uniform[plain])
    some = filtered.nonzero().squeeze(-1)
    tokens[some] = _draw_filtered(logits[some], uniform[some], top_k[some], top_p[some])
    return tokens


def kept_logits(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The logits that `draw` draws from: [m, vocab], those of tokens that are out at -inf.

    Those of a row with a temperature of 0 are not divided by it.
    """
    temperature, top_k, top_p, min_p = (each[:, None] for each in (temperature, top_k, top_p, min_p))
    logits = torch.where(temperature > 0, logits / temperature, logits)
    logits = logits.masked_fill(_below_min_p(logits, min_p), -torch.inf)
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    outside = (top_k > 0) & (torch.arange(logits.shape[1], device=logits.device) >= top_k)
    values.masked_fill_(outside, -torch.inf)
    values.masked_fill_(_outside_nucleus(values.softmax(-1), top_p), -torch.inf)
    return torch.full_like(values, -torch.inf).scatter_(1, ids, values)


def _below_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """p < min_p * max(p) in logits; log(0) = -inf keeps everything. min_p: [m, 1]."""
    return logits < logits.max(-1, keepdim=True).values + min_p.log()


def _draw_filtered(logits: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Rows of which each has top-k, top-p or both; only as many candidates are sorted as are needed."""
    vocab = logits.shape[1]
    limit = torch.where(top_k > 0, top_k, vocab)
    without_k = top_k == 0
    count = int(top_k.max())
    if bool(without_k.any()):
        count = min(vocab, max(count, NUCLEUS_CANDIDATES))
    values, ids = largest(logits, count)
    # Without top-k the probabilities are relative to the whole row, of which the candidates are a part.
    total = torch.where(without_k, logits.logsumexp(-1), torch.inf)
    values.masked_fill_(torch.arange(count) >= limit[:, None], -torch.inf)
    total = torch.minimum(total, torch.where(without_k, torch.inf, values.logsumexp(-1)))
    probs = (values - total[:, None]).exp()
    if count < vocab and bool((without_k & (probs.sum(-1) < top_p)).any()):
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        values.masked_fill_(torch.arange(vocab) >= limit[:, None], -torch.inf)
        probs = values.softmax(-1)
    probs.masked_fill_(_outside_nucleus(probs, top_p[:, None]), 0.0)
    return ids.gather(1, _invert(probs, uniform)[:, None]).squeeze(1)


def _outside_nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """probs: [m, n], falling; a token stays while the probability before it is below top_p: [m, 1].

    The first one always stays.
    """
    outside = (probs.cumsum(-1) - probs >= top_p) & (top_p < 1)
    outside[:, 0] = False
    return outside


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """First index at which the running sum of weights: [m, n] exceeds uniform: [m] times their total."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Strictly below the total, so that an index whose weight is zero can never be reached.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def uniform_numbers(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, position) pair.

    seeds: [m] uint64; positions: [m] int64 -> [m] float64 with 53 random bits. The mixing function is
    SplitMix64's (Steele, Lea & Flood, 2014), applied to the seed and then to its sum with the position.
    """
    mixed = _mix(_mix(seeds) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    result: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


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
