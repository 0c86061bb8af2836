"""The scheduling policies: what `sjf` aligns, that it starves nobody, and that no policy changes a token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fakes import VOCAB, Answer, Engine, make_request, run_alone

from microvllm.runtime.config import SCHEDULING_POLICIES
from microvllm.runtime.core import policies
from microvllm.runtime.core.policies import POLICIES, Policy
from microvllm.runtime.request import EngineRequest

both_modes = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])


def lengths(engine: Engine) -> list[dict[int, int]]:
    """Of each step: which requests had a turn, and their length after it."""
    return [{i.request.id: i.start + i.num_new for i in plan.scheduled} for plan in engine.runner.plans]


def longest_gaps(engine: Engine) -> dict[int, int]:
    """Of each request: the most steps from one of its turns to the next (1: it was in every step)."""
    last: dict[int, int] = {}
    gaps: dict[int, int] = {}
    for step, turn in enumerate(lengths(engine)):
        for request_id in turn:
            gaps[request_id] = max(gaps.get(request_id, 1), step - last.get(request_id, step - 1))
            last[request_id] = step
    return gaps


def aligned(**options: Any) -> Engine:
    shape = {"max_model_len": 256, "num_blocks": 512, "max_num_batched_tokens": 512}
    return Engine(**{**shape, "scheduling_policy": "sjf", **options})


def test_every_policy_has_a_name_on_the_command_line() -> None:
    assert tuple(POLICIES) == SCHEDULING_POLICIES


# ---- alignment -------------------------------------------------------------------------------------


@both_modes
def test_the_alignment_of_the_description(async_scheduling: bool) -> None:
    """50 52 55 60 100: the shortest runs alone, then two aligned, three, and at 60 four."""
    engine = aligned(async_scheduling=async_scheduling)
    lens = [50, 52, 55, 60, 100]
    requests = [make_request(i, [i] * (n - 1), 30, eos=None) for i, n in enumerate(lens)]
    engine.add(*requests)
    for _ in range(1 + 11):
        engine.step()
    prompts, *steps = lengths(engine)
    assert prompts == {i: n - 1 for i, n in enumerate(lens)}, "all prompts in one step, each a token is out"
    expected = [{i: length for i, n in enumerate(lens) if n <= length} for length in range(50, 61)]
    assert steps == expected
    assert [len(step) for step in steps] == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4]
    engine.drain()
    assert all(engine.answers[r.request_id] == run_alone(r) for r in requests)


@both_modes
def test_new_prompts_are_computed_beside_aligned_decodes(async_scheduling: bool) -> None:
    """Dynamic filling: also in chunks, and a prompt's last token waits for nobody's length."""
    engine = aligned(async_scheduling=async_scheduling, max_num_batched_tokens=16)
    engine.add(make_request(0, [1] * 5, 40, eos=None))
    engine.step()
    engine.step()
    engine.add(make_request(1, [2] * (15 + 15 + 1), 8, eos=None))
    for _ in range(4):
        engine.step()
    assert lengths(engine)[2:6] == [{0: 7, 1: 15}, {0: 8, 1: 30}, {0: 9, 1: 31}, {0: 10}]


@both_modes
@pytest.mark.parametrize("how", ["length", "stop", "abort"])
def test_the_end_of_the_shortest_leaves_no_step_empty(async_scheduling: bool, how: str) -> None:
    """Whose last token is being sampled, or who ended in flight, is not the shortest any more."""
    engine = aligned(async_scheduling=async_scheduling)
    stop = run_alone(make_request(0, [1] * 4, 3, eos=None)).tokens[-1:] if how == "stop" else []
    engine.add(make_request(0, [1] * 4, 3 if how == "length" else 50, eos=None, stop_ids=stop))
    engine.add(make_request(1, [2] * 40, 12, eos=None))
    for step in range(100):
        before = len(engine.runner.plans)
        if how == "abort" and step == 3:
            assert engine.core.abort(0)
        request = engine.core.scheduler._requests.get(1)
        wanted = request is not None and request.num_missing > 0
        engine.step()
        assert len(engine.runner.plans) - before == wanted, "somebody could have computed, and nobody did"
        if not engine.core.has_work():
            break
    engine.drain()
    assert engine.answers[1] == run_alone(make_request(1, [2] * 40, 12, eos=None))


# ---- the bound -------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("bound", [1, 3, policies.MAX_PASSED_OVER])
@pytest.mark.parametrize("seed", range(3))
def test_short_requests_that_keep_coming_starve_nobody(
    monkeypatch: pytest.MonkeyPatch, seed: int, bound: int, async_scheduling: bool
) -> None:
    monkeypatch.setattr(policies, "MAX_PASSED_OVER", bound)
    rng = random.Random(seed)
    engine = aligned(async_scheduling=async_scheduling, max_num_seqs=6)
    long = [make_request(i, [i] * rng.randrange(60, 120), 20, eos=None) for i in range(3)]
    requests = list(long)
    engine.add(*long)
    while any(r.request_id not in engine.answers or not engine.answers[r.request_id][1] for r in long):
        assert len(engine.runner.plans) < 20 * (bound + 1) + 50, "a long request does not finish"
        if engine.core.scheduler.num_waiting < 2:
            short = make_request(
                len(requests), [rng.randrange(VOCAB)] * rng.randrange(1, 6), rng.randrange(2, 9), eos=None
            )
            requests.append(short)
            engine.add(short)
        engine.step()
    engine.drain()
    gaps = longest_gaps(engine)
    assert max(gaps.values()) <= bound + 1
    assert max(gaps[r.request_id] for r in long) == bound + 1, "they were never passed over for so long"
    assert all(engine.answers[r.request_id].same_text(run_alone(r)) for r in requests)


@both_modes
@pytest.mark.parametrize("seed", range(8))
def test_who_is_denied_blocks_is_the_next_to_get_them(
    monkeypatch: pytest.MonkeyPatch, seed: int, async_scheduling: bool
) -> None:
    """In a pool that is always short, the one who is preempted last still has its turns."""
    monkeypatch.setattr(policies, "MAX_PASSED_OVER", 3)
    rng = random.Random(seed)
    engine = aligned(
        async_scheduling=async_scheduling, max_model_len=64, num_blocks=18, max_num_batched_tokens=64
    )
    requests = [make_request(0, [0] * 24, 40, eos=None)]
    requests += [
        make_request(i, [i] * rng.randrange(1, 6), rng.randrange(8, 30), eos=None) for i in range(1, 24)
    ]
    engine.run(*requests)
    assert engine.core.scheduler.num_preemptions > 5
    assert longest_gaps(engine)[0] <= 3 + 1 + async_scheduling
    assert all(engine.answers[r.request_id].same_text(run_alone(r)) for r in requests)


# ---- a long prompt beside running streams ----------------------------------------------------------


@both_modes
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_long_prompt_stalls_no_running_stream(policy: str, async_scheduling: bool) -> None:
    """Whoever runs gets a token from every step, and the prompt what is left of the budget.

    Also when the prompt is the more urgent one. Under `sjf` the streams are of one length: all are shortest.
    """
    budget, streams, prompt = 16, 6, 200
    engine = Engine(
        scheduling_policy=policy,
        async_scheduling=async_scheduling,
        max_model_len=256,
        num_blocks=512,
        max_num_batched_tokens=budget,
    )
    requests = [make_request(i, [i] * 2, 60, eos=None, priority=1) for i in range(streams)]
    engine.add(*requests)
    engine.step()
    engine.step()
    engine.add(make_request(99, [5] * prompt, 4, eos=None, priority=0))
    engine.drain()
    plans = [{i.request.id: i.num_new for i in plan.scheduled} for plan in engine.runner.plans]
    chunks = [plan[99] for plan in plans if 99 in plan]
    assert chunks == [budget - streams] * (prompt // (budget - streams)) + [1] * 3
    beside = plans[2 : 2 + prompt // (budget - streams)]
    assert all(plan == {99: budget - streams} | dict.fromkeys(range(streams), 1) for plan in beside)


@both_modes
def test_prompts_of_all_priorities_go_on_beside_each_other(async_scheduling: bool) -> None:
    """Each newcomer is more urgent than all before it, and none of these stops for it."""
    engine = Engine(
        scheduling_policy="priority",
        async_scheduling=async_scheduling,
        max_model_len=128,
        num_blocks=256,
        max_num_batched_tokens=8,
    )
    requests = [make_request(i, [i] * 30, 20, eos=None, priority=-i) for i in range(8)]
    for request in requests:
        engine.add(request)
        for _ in range(5):
            engine.step()
    engine.drain()
    assert set(longest_gaps(engine).values()) == {1}
    assert all(sum(i.num_new for i in plan.scheduled) <= 8 for plan in engine.runner.plans)


# ---- equivalence -----------------------------------------------------------------------------------


def workload(seed: int) -> list[EngineRequest]:
    rng = random.Random(seed)
    stem = [rng.randrange(VOCAB) for _ in range(12)]
    prompts = [
        stem * (i % 2) + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))] for i in range(14)
    ]
    return [
        make_request(i, prompt, rng.randrange(1, 64 - len(prompt)), priority=rng.randrange(3))
        for i, prompt in enumerate(prompts)
    ]


SHAPES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked": {"max_num_batched_tokens": 9, "long_prefill_token_threshold": 4},
    "whole": {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
    "squeezed": {"num_blocks": 20, "max_num_batched_tokens": 12},
    "no-prefix-cache": {"enable_prefix_caching": False, "num_blocks": 24},
}


@both_modes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_policy_changes_a_token(policy: str, shape: str, async_scheduling: bool) -> None:
    """With arrivals and aborts at any moment, hits and misses, chunks and preemptions."""
    preemptions = 0
    for seed in range(4):
        rng = random.Random(seed)
        engine = Engine(scheduling_policy=policy, async_scheduling=async_scheduling, **SHAPES[shape])
        requests = workload(seed)
        aborted = set()
        for request in requests:
            engine.add(request)
            for _ in range(rng.randrange(4)):
                engine.step()
            victim = rng.randrange(60)
            if engine.core.abort(victim):
                aborted.add(victim)
        engine.drain()
        preemptions += engine.core.scheduler.num_preemptions
        for request in requests:
            answer, expected = engine.answers.get(request.request_id, Answer([])), run_alone(request)
            if request.request_id in aborted:
                assert answer.tokens == expected.tokens[: len(answer.tokens)]
            else:
                assert answer.same_text(expected)
    assert (preemptions > 0) == (SHAPES[shape].get("num_blocks", 64) < 64)


def test_policies_that_align_nothing_cost_nothing() -> None:
    """No copy of the running requests, no look at any of them."""
    running: list[Any] = [object(), object()]
    for name in ("fcfs", "priority"):
        assert POLICIES[name]().eligible(running) is running
    assert type(POLICIES["fcfs"]()) is Policy
