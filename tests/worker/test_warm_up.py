"""Which steps of padding an engine on a GPU begins with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microvllm.runtime.worker.warm_up import warm_up_steps


@given(st.integers(1, 9000), st.integers(1, 300), st.integers(1, 9000))
def test_the_largest_step_comes_first_and_all_are_allowed(tokens: int, seqs: int, length: int) -> None:
    steps = warm_up_steps(tokens, seqs, length)
    for step in steps:
        assert sum(step.lengths) <= tokens and max(step.lengths) <= length and min(step.lengths) >= 1
        assert step.decodes < len(step.lengths) <= seqs + 1
        assert step.logits <= min(seqs + 1, sum(step.lengths))
        assert all(each == 1 for each in step.lengths[: step.decodes])
    prompts = [step.lengths[-1] for step in steps[1:]]
    assert prompts == sorted(prompts, reverse=True)
    most = min(tokens, seqs * length)
    if length > 1 and most > 1:
        assert sum(steps[0].lengths) >= most - 1, "a prompt of one token would be a decode"
        assert steps[0].logits == min(seqs, sum(steps[0].lengths))


def test_a_server_begins_with_all_that_a_step_may_hold() -> None:
    first, *others = warm_up_steps(8192, 256, 32_768)
    assert first == ([8192], 0, 256)
    assert others[0] == ([*[1] * 16, 4000, 4000], 16, 18) and others[-1] == ([2, 2], 0, 2)
    assert len(others) == 21
