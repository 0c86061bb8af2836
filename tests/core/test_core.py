"""Equivalence: whatever the engine does with a request, its tokens are those of the request run alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from fakes import EOS, VOCAB, Answer, Engine, FakeDrafter, make_request, run_alone

from microvllm.runtime.core.policies import POLICIES
from microvllm.runtime.request import EngineRequest, FinishReason

CONTEXT = 64
CHUNKING: dict[str, dict[str, Any]] = {
    "whole": {"enable_chunked_prefill": False, "max_num_batched_tokens": CONTEXT},
    "chunked": {"max_num_batched_tokens": 5},
    "threshold": {"long_prefill_token_threshold": 3},
}

FACTORS = ([False, True], ["off", "miss", "hit"], CHUNKING, ["alone", "batch", "preempted"], [1, 4, 16])
POLICY_NAMES = "fcfs", "priority"


def workload(seed: int, count: int) -> list[EngineRequest]:
    """Requests of many lengths and ends; half of them start with the same 20 tokens."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(20)]
    requests = []
    for i in range(count):
        own = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 25))]
        prompt = shared + own if i % 2 else own
        max_tokens = rng.randrange(1, CONTEXT - len(prompt) + 1)
        requests.append(
            make_request(
                i,
                prompt,
                max_tokens,
                min_tokens=rng.randrange(0, min(6, max_tokens + 1)),
                eos=rng.choice([EOS, None]),
                stop_ids=rng.choice([(), (EOS,), (7, 11)]),
                priority=rng.randrange(3),
            )
        )
    return requests


def growing(count: int) -> list[EngineRequest]:
    """Requests that all fit when they are admitted, and grow until they do not."""
    return [make_request(i, [i] * 3 + [5, 6, 7, 8, 9], 40, eos=None, priority=i % 3) for i in range(count)]


def renumbered(requests: list[EngineRequest], first_id: int) -> list[EngineRequest]:
    return [
        EngineRequest(
            first_id + i, r.prompt_token_ids, r.params, r.eos_token_id, r.stop_token_ids, r.priority
        )
        for i, r in enumerate(requests)
    ]


def assert_equal_to_alone(requests: list[EngineRequest], answers: dict[int, Answer]) -> None:
    for request in requests:
        expected = run_alone(request)
        assert answers[request.request_id].same_text(expected), f"request {request.request_id}"


# All of everything but the policy, which takes turns: any four of these five meet each policy.
MATRIX = [
    (*case, POLICY_NAMES[sum(places) % 2])
    for places, case in zip(
        itertools.product(*(range(len(values)) for values in FACTORS)),
        itertools.product(*FACTORS),
        strict=True,
    )
]


@pytest.mark.parametrize(
    ("async_scheduling", "prefix", "chunking", "company", "block_size", "policy"), MATRIX, ids=str
)
def test_tokens_equal_the_oracle(
    async_scheduling: bool, prefix: str, chunking: str, company: str, block_size: int, policy: str
) -> None:
    squeezed = company == "preempted"
    engine = Engine(
        async_scheduling=async_scheduling,
        enable_prefix_caching=prefix != "off",
        block_size=block_size,
        num_blocks=(CONTEXT + 15) // block_size if squeezed else 8 * CONTEXT // block_size,
        max_num_seqs=5,
        scheduling_policy=policy,
        **CHUNKING[chunking],
    )
    requests = growing(6) if squeezed else workload(seed=block_size, count=8)
    if prefix == "hit":
        if squeezed:  # one after another, or the pool would already be squeezed while it is warmed
            for request in requests:
                engine.run(*renumbered([request], 100 + request.request_id))
        else:
            engine.run(*renumbered(requests, 100))
        warm_hits = engine.core.stats().prefix_hits
    if company == "alone":
        for request in requests:
            engine.run(request)
    else:
        engine.run(*requests)
    assert_equal_to_alone(requests, engine.answers)
    # The case was what its name says.
    stats = engine.core.stats()
    assert (stats.preemptions > 0) == squeezed
    if prefix == "off":
        assert stats.prefix_queries == stats.prefix_hits == 0
    if prefix == "hit" and not squeezed:
        assert stats.prefix_hits > warm_hits


@pytest.mark.parametrize("mode", ["sync", "async", "drafts"])
@pytest.mark.parametrize("seed", range(30))
def test_random_configurations(mode: str, seed: int) -> None:
    """Arrivals and aborts at random moments, in engines of random shape."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 8, 16, 64])
    budget = rng.choice([3, 5, 17, 64])
    engine = Engine(
        drafter=FakeDrafter() if mode == "drafts" else None,
        async_scheduling=mode == "async",
        block_size=block_size,
        num_blocks=-(-CONTEXT // block_size) + rng.randrange(4),
        max_num_batched_tokens=budget,
        max_num_seqs=rng.randrange(1, min(budget, 8) + 1),
        enable_prefix_caching=rng.random() < 0.7,
        enable_chunked_prefill=budget < CONTEXT or rng.random() < 0.5,
        long_prefill_token_threshold=rng.choice([0, 0, 2, 7]),
        scheduling_policy=rng.choice(sorted(POLICIES)),
    )
    requests = workload(seed, 24)
    aborted: set[int] = set()
    for request in requests:
        engine.add(request)
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.2:
            victim = rng.randrange(len(requests))
            if engine.core.abort(victim):
                aborted.add(victim)
    engine.drain()
    assert_equal_to_alone([r for r in requests if r.request_id not in aborted], engine.answers)
    for request in requests:
        if request.request_id in aborted:
            tokens = engine.answers.get(request.request_id, Answer([])).tokens
            assert tokens == run_alone(request).tokens[: len(tokens)]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_every_prompt_and_output_length(async_scheduling: bool) -> None:
    """All lengths around the block borders, up to a context that is exactly full."""
    lengths = [(p, n) for p, n in itertools.product(range(1, 16), range(1, 16)) if p + n <= 16]
    for prompt_len, max_tokens in lengths:
        engine = Engine(async_scheduling=async_scheduling, max_model_len=16, num_blocks=4)
        for request_id in range(2):  # the second finds the blocks of the first
            request = make_request(request_id, range(prompt_len), max_tokens, eos=None)
            assert engine.run(request)[0].same_text(run_alone(request))


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_no_step_is_wasted(async_scheduling: bool, max_tokens: int) -> None:
    """A request that ends by length takes one step a token: none is launched to be thrown away."""
    engine = Engine(async_scheduling=async_scheduling)
    engine.run(make_request(1, range(10), max_tokens, eos=None))
    assert len(engine.runner.plans) == engine.core.stats().steps == max_tokens


def test_async_runs_one_step_ahead_and_sync_does_not() -> None:
    engine = Engine(async_scheduling=True)
    engine.add(make_request(1, range(5), 4, eos=None))
    known = [len(engine.step()) for _ in range(5)]
    assert known == [0, 1, 1, 1, 1]
    engine = Engine()
    engine.add(make_request(1, range(5), 4, eos=None))
    assert [len(engine.step()) for _ in range(4)] == [1, 1, 1, 1]


def test_idle_engine_does_nothing() -> None:
    for async_scheduling in (False, True):
        engine = Engine(async_scheduling=async_scheduling)
        assert not engine.core.has_work()
        assert engine.step() == []
        assert engine.runner.plans == []


def test_refusal_is_the_output_of_that_request_alone() -> None:
    engine = Engine()
    good = make_request(1, [3, 4, 5], 6)
    engine.add(good)
    refused = engine.core.add(make_request(2, [], 6))
    assert refused is not None
    assert (refused.request_id, refused.token_ids, refused.finish_reason) == (2, [], FinishReason.ERROR)
    assert refused.error is not None and "\n" not in refused.error
    engine.drain()
    assert engine.answers == {1: run_alone(good)}


def test_stats_count_what_happened() -> None:
    engine = Engine()
    requests = [make_request(i, [*range(8), i], 6, eos=None) for i in range(2)]
    engine.run(requests[0])
    engine.add(requests[1])
    before = engine.core.stats()
    assert (before.num_running, before.num_waiting, before.kv_blocks_used) == (0, 1, 0)
    engine.step()
    during = engine.core.stats()
    assert (during.num_running, during.num_waiting, during.kv_blocks_used) == (1, 0, 3)
    engine.drain()
    after = engine.core.stats()
    assert (after.num_running, after.num_waiting, after.kv_blocks_used) == (0, 0, 0)
    assert after.kv_blocks_total == 64
    assert after.generation_tokens == 12 and after.steps == 12 and after.preemptions == 0
    assert (after.prefix_queries, after.prefix_hits) == (18, 8)
