"""Every rule on logits against its definition, one request and one token at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microvllm.ops.sampling import largest
from microvllm.runtime.core.plan import NO_TOKEN
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.logits import LogitRules

VOCAB = 12
TOKENS = st.integers(0, VOCAB - 1)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
        "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=VOCAB),
    },
)
BAD_WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=4)
REQUEST = st.tuples(RULES, BAD_WORDS, st.lists(TOKENS, min_size=1, max_size=6), st.lists(TOKENS, max_size=8))


def by_definition(
    logits: Sequence[float],
    params: SamplingParams,
    bad_words: list[list[int]],
    prompt: list[int],
    output: list[int],
    masked: Sequence[int] = (),
) -> list[float]:
    out = [float(x) for x in logits]
    for token in range(VOCAB):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            out[token] = -math.inf
        for word in bad_words:
            head = word[:-1]
            if token == word[-1] and output[len(output) - len(head) :] == head:
                out[token] = -math.inf
        if token in masked:
            out[token] = -math.inf
        out[token] += params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            out[token] *= params.repetition_penalty if out[token] <= 0 else 1 / params.repetition_penalty
        if token in output:
            out[token] -= params.presence_penalty + output.count(token) * params.frequency_penalty
    return out


@given(st.lists(REQUEST, min_size=1, max_size=5), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=150)
def test_all_rules_together_in_a_batch(
    batch: list[tuple[dict[str, Any], list[list[int]], list[int], list[int]]], in_flight: bool, seed: int
) -> None:
    """Half of the output is known at admission, the rest is observed; the newest may be in flight."""
    rules = LogitRules(len(batch) + 2, VOCAB)
    rows = list(range(len(batch) + 1, 1, -1))
    newest = torch.zeros(len(batch), dtype=torch.int64)
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    expected, masked = [], []
    for i, (options, bad_words, prompt, output) in enumerate(batch):
        params = SamplingParams(**options)
        known = output[: len(output) // 2]
        rules.set_row(
            rows[i], EngineRequest(i, prompt, params, bad_word_ids=bad_words), prompt + known, len(prompt)
        )
        for token in [*output[len(known) :], NO_TOKEN]:
            rules.observe([rows[i]], torch.tensor([token]))
        if output:
            newest[i] = output[-1]
        masked.append((i, {i}))
        expected.append(by_definition(logits[i].tolist(), params, bad_words, prompt, output, {i}))

    def output_of(i: int) -> tuple[list[int], bool]:
        output = batch[i][3]
        return (output[:-1], True) if in_flight and output else (output, False)

    rules.apply(logits, rows, masked, output_of, newest)
    np.testing.assert_allclose(logits.numpy(), np.array(expected), rtol=1e-4, atol=1e-4)


def test_a_cleared_row_has_no_rules_and_no_counts() -> None:
    rules = LogitRules(1, VOCAB)
    params = SamplingParams(presence_penalty=1.0, repetition_penalty=2.0, logit_bias={1: 5.0})
    rules.set_row(0, EngineRequest(0, [1], params, bad_word_ids=[[2]]), [1, 3, 3], 1)
    rules.clear_row(0)
    logits = torch.randn(1, VOCAB)
    same = logits.clone()
    rules.apply(same, [0], [], lambda i: ([3, 3], False), torch.zeros(1, dtype=torch.int64))
    assert torch.equal(same, logits)
    rules.set_row(0, EngineRequest(1, [5], SamplingParams(frequency_penalty=1.0)), [5], 1)
    rules.apply(same, [0], [], lambda i: ([], False), torch.zeros(1, dtype=torch.int64))
    assert torch.equal(same, logits), "counts of the row's former owner"


def test_equal_values_are_ordered_by_id_whatever_the_count() -> None:
    values = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])
    for count in range(7):
        assert largest(values, count)[1].tolist() == [[1, 3, 0, 2, 4, 5][:count]]
