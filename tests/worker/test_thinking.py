"""The budget of thinking: every way to reach it, and the end of thinking that is forced then."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from model_tools import generate_ids, make_engine, make_prompts, variant_folder

from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams, ThinkingBudget
from microvllm.runtime.worker.thinking import FREE, Reasoner, ThinkingBudgets

START, END = [7, 8], [1, 1, 2]
OTHER, BLANK = 5, 9


def played(budget: ThinkingBudget, wishes: Sequence[int], *, ahead: bool) -> list[int]:
    """What comes out if the model would write `wishes`; `ahead`: each token before the last is known."""
    reasoner = Reasoner(budget)
    output: list[int] = []
    for wish in wishes:
        token, cases = reasoner.forced(output[:-1] if ahead and output else output, ahead and bool(output))
        if ahead and output:
            token = cases.get(output[-1], token)
        else:
            assert cases == {}
        output.append(wish if token == FREE else token)
    return output


@pytest.mark.parametrize("ahead", [False, True], ids=["known", "in flight"])
@pytest.mark.parametrize(
    ("budget", "wishes", "expected"),
    [
        # the prompt ends in the reasoning
        (0, [5, 5, 5, 5, 5], [1, 1, 2, 5, 5]),
        (2, [5, 5, 5, 5, 5, 5], [5, 5, 1, 1, 2, 5]),
        (9, [5, 5, 1, 1, 2, 5, 5, 5, 5, 5, 5], [5, 5, 1, 1, 2, 5, 5, 5, 5, 5, 5]),
        # it ends by itself at the budget, or has begun to
        (3, [1, 1, 2, 5, 5, 5], [1, 1, 2, 5, 5, 5]),
        (3, [5, 1, 1, 5, 5, 5], [5, 1, 1, 2, 5, 5]),
        (3, [1, 1, 1, 5, 5, 5], [1, 1, 1, 2, 5, 5]),
        (3, [5, 5, 1, 5, 5, 5], [5, 5, 1, 1, 2, 5]),
        # a model repeats the tag, which is no reasoning
        (2, [7, 8, 5, 5, 5, 5, 5, 5], [7, 8, 5, 5, 1, 1, 2, 5]),
    ],
)
def test_the_end_is_forced(budget: int, wishes: list[int], expected: list[int], ahead: bool) -> None:
    thinking = ThinkingBudget(max_tokens=budget, start=START, end=END, begun=True)
    assert played(thinking, wishes, ahead=ahead) == expected


@pytest.mark.parametrize("ahead", [False, True], ids=["known", "in flight"])
@pytest.mark.parametrize(
    ("budget", "wishes", "expected"),
    [
        (0, [7, 8, 5, 5, 5, 5], [7, 8, 1, 1, 2, 5]),
        (1, [9, 9, 7, 8, 5, 5, 5, 5, 5], [9, 9, 7, 8, 5, 1, 1, 2, 5]),
        (0, [7, 5, 8, 5, 5], [7, 5, 8, 5, 5]),  # it never begins
        (0, [5, 7, 8, 5, 5], [5, 7, 8, 5, 5]),  # a tag in a text
        (0, [7, 7, 8, 5, 5], [7, 7, 8, 5, 5]),
        # it begins again: what is spent is spent
        (1, [7, 8, 5, 5, 5, 5, 7, 8, 5, 5, 5], [7, 8, 5, 1, 1, 2, 7, 8, 1, 1, 2]),
        (3, [7, 8, 5, 1, 1, 2, 9, 7, 8, 5, 5, 5], [7, 8, 5, 1, 1, 2, 9, 7, 8, 5, 5, 1]),
        (0, [7, 8, 5, 5, 5, 5, 7, 8, 5], [7, 8, 1, 1, 2, 5, 7, 8, 5]),
    ],
)
def test_it_counts_from_the_start(budget: int, wishes: list[int], expected: list[int], ahead: bool) -> None:
    thinking = ThinkingBudget(max_tokens=budget, start=START, end=END, blank=[BLANK])
    assert played(thinking, wishes, ahead=ahead) == expected


def test_one_token_is_left_to_a_row_whose_budget_is_spent() -> None:
    budgets = ThinkingBudgets("cpu")
    budgets.set_row(3, ThinkingBudget(max_tokens=1, end=[4]))
    budgets.set_row(5, ThinkingBudget(max_tokens=1, end=[4]))
    budgets.set_row(6, ThinkingBudget(max_tokens=9, end=[4]))
    logits = torch.randn(4, 8)
    before = logits.clone()
    rows, last = [2, 3, 5, 6], torch.tensor([OTHER, OTHER, 4, OTHER])
    outputs: dict[int, tuple[list[int], bool]] = {1: ([], True), 2: ([], True), 3: ([], True)}
    budgets.apply(logits, rows, outputs.__getitem__, last)
    assert torch.equal(logits[[0, 2, 3]], before[[0, 2, 3]])  # none, ended just now, not spent
    assert logits[1].isfinite().nonzero().tolist() == [[4]]
    budgets.clear_row(3)
    assert budgets.concern([3, 5]) and not budgets.concern([3, 2])


def _thinking(engine: InferenceEngine, prompts: list[list[int]], budget: int) -> list[list[int]]:
    params = {"thinking": ThinkingBudget(max_tokens=budget, end=[11, 12])}
    return generate_ids(engine, prompts, 16, **params)


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_the_engine_ends_the_reasoning(ahead: bool) -> None:
    """Also where the tokens are banned, and after preemptions."""
    options = {"num_gpu_blocks_override": 18, "block_size": 4, "max_model_len": 64}
    engine = make_engine(variant_folder("llama-tied"), async_scheduling=ahead, **options)
    prompts = make_prompts(6, engine.config.spec.vocab_size, longest=30)
    free = generate_ids(engine, prompts, 16)
    for plain, ended in zip(free, _thinking(engine, prompts, 5), strict=True):
        assert ended[:7] == [*plain[:5], 11, 12] and ended != plain
    banned = {
        "thinking": ThinkingBudget(max_tokens=3, end=[11]),
        "bad_words": ["x"],
        "logit_bias": {11: -100.0},
    }
    assert [tokens[3] for tokens in generate_ids(engine, prompts, 6, **banned)] == [11] * 6
    assert generate_ids(engine, prompts, 16) == free  # the rows' next owners are free
    assert engine.core.stats().preemptions


def test_ids_are_checked() -> None:
    engine = make_engine(variant_folder("llama-tied"))
    with pytest.raises(InvalidRequestError, match="thinking: token ids out of vocabulary"):
        engine.processor.prepare(SamplingParams(thinking=ThinkingBudget(max_tokens=1, end=[10**6])))
