"""Drafts of a drafter, in a step's budget, blocks and tokens: `runtime/core/drafts.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fakes import VOCAB, Answer, Engine, make_request, run_alone

from microvllm.runtime.core.plan import Request
from microvllm.runtime.request import FinishReason


class ListDrafter:
    """Proposes what follows in a list of tokens, two at a time; `wrong` are positions of other tokens."""

    def __init__(self, tokens: list[int], *wrong: int) -> None:
        self.tokens = [(token + 1) % VOCAB if i in wrong else token for i, token in enumerate(tokens)]

    def propose(self, requests: Sequence[Request]) -> list[list[int]]:
        return [self.tokens[len(request.token_ids) :][:2] for request in requests]


def drafted(max_tokens: int, *wrong: int, **options: Any) -> tuple[Engine, list[list[int]]]:
    """A request of 3 prompt tokens, and what each step gave of it; `wrong`: positions of wrong drafts."""
    sequence = [1, 2, 3, *run_alone(make_request(0, [1, 2, 3], 20, eos=None)).tokens]
    engine = Engine(drafter=ListDrafter(sequence, *wrong), async_scheduling=True, **options)
    engine.add(make_request(0, [1, 2, 3], max_tokens, eos=None))
    gave = []
    while engine.core.has_work():
        gave += [output.token_ids for output in engine.step()]
    engine.check_rest()
    assert engine.answers[0] == run_alone(make_request(0, [1, 2, 3], max_tokens, eos=None))
    return engine, gave


def computed_items(engine: Engine) -> list[tuple[int, int, int, int]]:
    """The start, num_new, num_draft_tokens and number of new blocks of every step."""
    scheduled = [item for plan in engine.runner.plans for item in plan.scheduled]
    return [(i.start, i.num_new, i.num_draft_tokens, len(i.new_blocks)) for i in scheduled]


def test_drafts_that_hold_give_three_tokens_a_step() -> None:
    engine, gave = drafted(10)
    assert [len(tokens) for tokens in gave] == [1, 3, 3, 3]
    assert computed_items(engine) == [(0, 3, 0, 1), (3, 3, 2, 1), (6, 3, 2, 1), (9, 3, 2, 0)]


def test_a_wrong_draft_is_computed_again_and_gives_its_block_back() -> None:
    engine, gave = drafted(6, 4, 8)
    assert [len(tokens) for tokens in gave] == [1, 1, 3, 1]
    # Position 4 began a block, which is new again in the step after.
    assert computed_items(engine) == [(0, 3, 0, 1), (3, 3, 2, 1), (4, 3, 2, 1), (7, 1, 0, 0)]


def test_drafts_end_before_the_last_token() -> None:
    engine, gave = drafted(3)
    assert [len(tokens) for tokens in gave] == [1, 2]
    assert computed_items(engine)[-1] == (3, 2, 1, 1)


def test_drafts_are_within_the_budget_of_the_step() -> None:
    engine, gave = drafted(5, max_num_batched_tokens=2, max_num_seqs=2)
    assert [len(tokens) for tokens in gave] == [1, 2, 2]
    assert all(num_new <= 2 for _, num_new, _, _ in computed_items(engine))


def test_a_stop_token_within_the_drafts_ends_the_request_there() -> None:
    output = run_alone(make_request(0, [1, 2, 3], 20, eos=None)).tokens
    stop = output[2]  # the first of the drafts, or what came before would have stopped as well
    assert stop not in output[:2]
    engine = Engine(drafter=ListDrafter([1, 2, 3, *output]))
    engine.add(make_request(0, [1, 2, 3], 20, eos=None, stop_ids=[stop]))
    steps = [engine.step() for _ in range(2)]
    assert [output.token_ids for (output,) in steps] == [output[:1], output[1:3]]
    assert engine.answers[0] == Answer(output[:3], FinishReason.STOP, stop)
    assert computed_items(engine)[-1][1:3] == (3, 2), "a third token was computed, and dropped"
    engine.check_rest()
