"""Log probabilities against their definition, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.logprobs import LogprobRequest, log_probabilities, needed_rows
from microvllm.runtime.worker.sampler import Sampler

VOCAB = 12


@given(
    st.lists(st.sampled_from([None, 0, 1, 3, -1, (4, 4, 7)]), min_size=1, max_size=6), st.integers(0, 2**32)
)
@settings(max_examples=60)
def test_log_probabilities_by_definition(kinds: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(kinds), VOCAB, generator=generator).round(decimals=1)
    logits[:, 5] = -torch.inf
    tokens = torch.randint(VOCAB, (len(kinds),), generator=generator)
    requested = [
        LogprobRequest(1, kind) if isinstance(kind, tuple) else LogprobRequest(kind or 0) for kind in kinds
    ]
    entries = log_probabilities(logits, tokens, requested).read()
    for i, (entry, request) in enumerate(zip(entries, requested, strict=True)):
        weights = np.exp(logits[i].double().numpy())
        with np.errstate(divide="ignore"):
            exact = np.log(weights / weights.sum())
        others = sorted(range(VOCAB), key=lambda token: (-logits[i, token].item(), token))
        others = list(request.ids) if request.ids else others[: VOCAB if request.count < 0 else request.count]
        token = int(tokens[i])
        assert entry.token_ids == [token, *others]
        np.testing.assert_allclose(entry.logprobs, exact[entry.token_ids], rtol=1e-5, atol=1e-5)
        assert entry.rank == 1 + (logits[i] > logits[i, token]).sum()


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
def test_the_modes(mode: str) -> None:
    """Raw is before the rules and the temperature, processed is what is drawn from."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0]])
    sampler = Sampler(3, 4, 0, mode)
    params = SamplingParams(logprobs=-1, temperature=0.5, top_k=2, logit_bias={1: -100.0}, seed=1)
    greedy = SamplingParams(logprobs=2, temperature=0.0, top_k=2, logit_bias={1: -100.0})
    sampler.set_row(2, EngineRequest(0, [0], params), [0], 1)
    sampler.set_row(0, EngineRequest(1, [0], greedy), [0], 1)
    newest = torch.zeros(2, dtype=torch.int64)
    sampled = sampler.sample(logits.clone(), [2, 0], [1, 1], [], lambda i: ([], False), newest)
    assert sampled.logprobs is not None and sampled.asked == [0, 1]
    drawn, best = sampled.logprobs.read()
    assert best.token_ids[0] == 2
    found = dict(zip(drawn.token_ids, drawn.logprobs, strict=True))
    shown = logits[0].double()
    if mode.startswith("processed"):
        shown = torch.tensor([2.0, -torch.inf, 4.0, -torch.inf]).double()  # 0 and 2 are left, over T = 0.5
        assert best.token_ids == [2, 2, 0]
    else:
        assert best.token_ids == [2, 1, 2]
    expected = shown.log_softmax(-1) if mode.endswith("logprobs") else shown
    assert [found[token] for token in range(4)] == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    ("pooling", "changes", "expected"),
    [
        (None, {}, [0, 4]),  # a decode, a chunk of a prompt that does not end, and one that does
        (None, {"prompt_logprobs": 0}, None),
        (None, {"num_draft_tokens": 2}, None),
        (None, {"num_new": 1}, None),
        ("mean", {}, None),
    ],
)
def test_rows_whose_hidden_states_a_step_needs(
    pooling: str | None, changes: dict[str, int], expected: list[int] | None
) -> None:
    def item(num_new: int, samples: bool, drafts: int = 0, logprobs: int | None = None) -> Any:
        params = SimpleNamespace(prompt_logprobs=logprobs)
        return SimpleNamespace(
            num_new=num_new,
            samples=samples,
            num_draft_tokens=drafts,
            request=SimpleNamespace(params=params),
        )

    num_new = changes.get("num_new", 2)
    last = item(num_new, True, changes.get("num_draft_tokens", 0), changes.get("prompt_logprobs"))
    items = [item(1, True), item(num_new, False), last]
    rows = needed_rows(items, SimpleNamespace(pooling=pooling))  # type: ignore[arg-type]
    assert (None if rows is None else rows.tolist()) == expected
