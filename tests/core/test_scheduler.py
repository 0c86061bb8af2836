"""What each step computes: order, budget, preemption, aborts, ends, and what is cached when."""

from __future__ import annotations

import pytest
from fakes import EOS, VOCAB, Answer, Engine, FakeRunner, make_config, make_request, run_alone

from microvllm.runtime.core.kv_cache import BlockPool, KVCacheManager, LayerGroup
from microvllm.runtime.core.plan import NO_TOKEN, Request, StepResult
from microvllm.runtime.core.scheduler import Scheduler
from microvllm.runtime.errors import EngineBusyError, InvalidRequestError
from microvllm.runtime.request import EngineRequest, FinishReason, SamplingParams

both_modes = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])


def shape(engine: Engine) -> list[dict[int, int]]:
    """Of each step: how many tokens it computed of which request."""
    return [{item.request.id: item.num_new for item in plan.scheduled} for plan in engine.runner.plans]


def admissions(engine: Engine) -> list[int]:
    return [request.id for plan in engine.runner.plans for request in plan.admitted]


def scheduler_of(engine: Engine) -> Scheduler:
    return engine.core.scheduler


# ---- what may be added -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "fits"),
    [
        (63, 1, True),
        (64, 1, False),
        (65, 1, False),
        (1, 63, True),
        (1, 64, False),
        (40, 24, True),
        (0, 1, False),
    ],
)
def test_prompt_and_output_fit_the_context(prompt_len: int, max_tokens: int, fits: bool) -> None:
    engine = Engine(max_model_len=64, num_blocks=16)
    request = make_request(1, [3] * prompt_len, max_tokens, eos=None)
    if fits:
        assert engine.run(request) == [run_alone(request)]
    else:
        with pytest.raises(InvalidRequestError, match="prompt"):
            scheduler_of(engine).add(request)
        engine.check_rest()


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (EngineRequest(1, [1], SamplingParams(max_tokens=None)), "prompt"),
        (make_request(0, [1]), "request_id"),
    ],
)
def test_a_bad_request_is_refused_by_name(bad: EngineRequest, param: str) -> None:
    engine = Engine()
    good = make_request(0, [1, 2, 3])
    engine.add(good)
    with pytest.raises(InvalidRequestError) as refusal:
        scheduler_of(engine).add(bad)
    assert refusal.value.param == param and "\n" not in refusal.value.message
    assert scheduler_of(engine).num_waiting == 1
    engine.drain()
    assert engine.answers == {0: run_alone(good)}


def test_the_queue_is_bounded() -> None:
    engine = Engine(max_num_queued_reqs=2, max_num_seqs=1)
    engine.add(make_request(1, [1]), make_request(2, [2]), make_request(4, [4]))  # the first has a free row
    with pytest.raises(EngineBusyError):
        scheduler_of(engine).add(make_request(3, [3]))
    engine.step()
    with pytest.raises(EngineBusyError):
        scheduler_of(engine).add(make_request(5, [5]))
    engine.core.abort(4)
    engine.add(make_request(6, [6]))
    engine.drain()
    assert sorted(engine.answers) == [1, 2, 6]


def test_a_queue_with_free_rows_takes_a_burst() -> None:
    engine = Engine(max_num_queued_reqs=1, max_num_seqs=4)
    engine.add(*(make_request(i, [i]) for i in range(5)))
    with pytest.raises(EngineBusyError):
        scheduler_of(engine).add(make_request(5, [5]))
    engine.drain()
    assert sorted(engine.answers) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_step_that_fails_ends_its_own_requests_only(asynchronous: bool) -> None:
    engine = Engine(async_scheduling=asynchronous, max_num_seqs=2)
    doomed = [make_request(i, [i, i], 8, eos=None) for i in (1, 2)]
    spared = make_request(3, [3, 3], 8, eos=None)
    engine.add(*doomed, spared)
    engine.step()
    launch = engine.runner.launch

    def fail(plan: object) -> None:
        engine.runner.launch = launch  # type: ignore[method-assign]
        raise ValueError("broken")

    engine.runner.launch = fail  # type: ignore[method-assign, assignment]
    outputs = engine.core.step()
    failed = [output for output in outputs if output.finish_reason is FinishReason.ERROR]
    assert sorted(output.request_id for output in failed) == [1, 2]
    assert all(output.error == "the step failed (ValueError)" for output in failed)
    answers: list[int] = []
    while engine.core.has_work():
        answers += [token for output in engine.core.step() for token in output.token_ids]
    assert answers == list(run_alone(spared).tokens)
    engine.core.kv.check()
    assert engine.core.kv.num_used == 0


def test_aborted_requests_do_not_pile_up_behind_a_blocked_head() -> None:
    engine = Engine(max_num_seqs=1, max_num_queued_reqs=10)
    running = make_request(1, [1], 60, eos=None)
    engine.add(running)
    engine.step()
    engine.add(make_request(2, [2]))
    for request_id in range(3, 1000):
        engine.add(make_request(request_id, [3]))
        engine.core.abort(request_id)
    assert len(scheduler_of(engine)._waiting) <= 3, "an ended request keeps its prompt in memory"
    engine.core.abort(2)
    assert scheduler_of(engine)._waiting == []
    engine.drain()
    assert engine.answers == {1: run_alone(running)}


def test_an_aborted_request_is_forgotten_when_the_last_one_before_it_is_admitted() -> None:
    engine = Engine()
    engine.add(make_request(1, [1]), make_request(2, [2]))
    engine.core.abort(2)
    engine.step()
    assert scheduler_of(engine)._waiting == []


# ---- order and budget ------------------------------------------------------------------------------


@both_modes
def test_first_come_first_served(async_scheduling: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling, max_num_seqs=2, max_num_batched_tokens=8)
    requests = [make_request(i, [i] * (20 - i), 5, priority=-i) for i in range(8)]
    engine.run(*requests)
    assert admissions(engine) == list(range(8)), "fcfs looks at no priority, and nobody overtakes"


@both_modes
def test_priority_order_then_arrival_order(async_scheduling: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling, scheduling_policy="priority", max_num_seqs=1)
    priorities = [5, 0, -3, 0, 5, -3]
    engine.run(*(make_request(i, [i], 3, priority=p) for i, p in enumerate(priorities)))
    assert admissions(engine) == [2, 5, 1, 3, 0, 4]


@both_modes
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_who_is_preempted(policy: str, async_scheduling: bool) -> None:
    """The newest gives way, or under `priority` the newest of the least urgent; it keeps its place."""
    engine = Engine(
        async_scheduling=async_scheduling,
        scheduling_policy=policy,
        max_model_len=32,
        num_blocks=9,
        max_num_seqs=3,
    )
    requests = [make_request(i, [i] * 8, 20, eos=None, priority=p) for i, p in enumerate([1, 2, 0])]
    engine.add(*requests, make_request(9, [9], 2, priority=7))
    scheduler = scheduler_of(engine)
    victims: list[int] = []
    while len(victims) < 2:
        engine.step()
        waiting = {request.id for request in scheduler._requests.values() if request.row < 0}
        victims += sorted(waiting - {9, *victims})
    assert victims == ([2, 1] if policy == "fcfs" else [1, 0])
    engine.drain()
    again = list(dict.fromkeys(admissions(engine)[3:]))
    assert again == [*reversed(victims), 9], "the older of them first, the newcomer last"
    assert all(engine.answers[r.request_id].same_text(run_alone(r)) for r in requests)


def test_running_requests_come_before_waiting_ones_and_share_the_budget() -> None:
    engine = Engine(max_num_batched_tokens=10)
    engine.run(make_request(1, [1] * 4, 4, eos=None), make_request(2, [2] * 20, 2, eos=None))
    assert shape(engine) == [{1: 4, 2: 6}, {1: 1, 2: 9}, {1: 1, 2: 5}, {1: 1, 2: 1}]


def test_long_prefill_threshold_leaves_budget_to_others() -> None:
    engine = Engine(max_num_batched_tokens=16, long_prefill_token_threshold=6)
    engine.run(make_request(1, [1] * 20, 1), make_request(2, [2] * 9, 1))
    assert shape(engine) == [{1: 6, 2: 6}, {1: 6, 2: 3}, {1: 6}, {1: 2}]


def test_without_chunked_prefill_a_prompt_is_computed_whole() -> None:
    engine = Engine(enable_chunked_prefill=False, max_num_batched_tokens=64, enable_prefix_caching=False)
    engine.run(make_request(1, [1] * 40, 2, eos=None), make_request(2, [2] * 30, 1), make_request(3, [3], 1))
    # The second does not fit beside the first, and nobody overtakes it.
    assert shape(engine) == [{1: 40}, {1: 1, 2: 30, 3: 1}]


def test_the_threshold_does_not_split_a_prompt_that_may_not_be_split() -> None:
    engine = Engine(enable_chunked_prefill=False, max_num_batched_tokens=64, long_prefill_token_threshold=6)
    engine.run(make_request(1, [1] * 40, 1))
    assert shape(engine) == [{1: 40}]


def test_no_more_than_max_num_seqs_run_at_once() -> None:
    engine = Engine(max_num_seqs=3)
    engine.add(*(make_request(i, [i], 4, eos=None) for i in range(5)))
    engine.step()
    assert (scheduler_of(engine).num_running, scheduler_of(engine).num_waiting) == (3, 2)
    engine.drain()
    assert max(len(plan.scheduled) for plan in engine.runner.plans) == 3


# ---- pool exhausted --------------------------------------------------------------------------------


@both_modes
def test_an_exhausted_pool_starves_nobody(async_scheduling: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling, max_model_len=32, num_blocks=8)
    requests = [make_request(i, [i] * 5, 27, eos=None) for i in range(10)]
    engine.run(*requests)
    assert all(engine.answers[r.request_id].same_text(run_alone(r)) for r in requests)
    assert scheduler_of(engine).num_preemptions > 0


@both_modes
def test_a_waiting_request_is_not_admitted_without_room_for_all_its_tokens(async_scheduling: bool) -> None:
    engine = Engine(
        async_scheduling=async_scheduling, max_model_len=32, num_blocks=8, max_num_batched_tokens=8
    )
    engine.add(make_request(1, [1] * 20, 2, eos=None))
    for _ in range(4):
        engine.step()
    engine.run(make_request(2, [2] * 20, 2, eos=None))
    assert scheduler_of(engine).num_preemptions == 0


@both_modes
def test_preemption_in_the_middle_of_a_prompt(async_scheduling: bool) -> None:
    """Its own blocks, found again, are no prefix hits; it is computed again and nothing is lost."""
    engine = Engine(
        async_scheduling=async_scheduling, max_model_len=32, num_blocks=9, long_prefill_token_threshold=2
    )
    requests = [make_request(1, [1] * 7, 24, eos=None), make_request(2, [2] * 28, 4, eos=None)]
    answers = engine.run(*requests)
    assert admissions(engine)[:3] == [1, 2, 2]
    computed = [step.get(2, 0) for step in shape(engine)]
    assert sum(computed[: computed.index(0)]) < 28, "it gave way before it had its first token"
    assert answers == [run_alone(r) for r in requests], "num_cached of both is 0"
    stats = engine.core.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (7 + 28, 0)


# ---- the end of a request --------------------------------------------------------------------------


def first_tokens(prompt: list[int], count: int) -> list[int]:
    return run_alone(make_request(0, prompt, count, eos=None)).tokens


@both_modes
def test_why_a_request_ends(async_scheduling: bool) -> None:
    """The end-of-sequence token before a stop id, and both before length, on the very same token."""
    prompt = [3, 1, 4, 1, 5]
    tokens = first_tokens(prompt, 6)
    last = tokens[3]
    first_seen = tokens.index(last) + 1
    engine = Engine(async_scheduling=async_scheduling)
    answers = engine.run(
        make_request(1, prompt, first_seen, eos=last, stop_ids=[last]),
        make_request(2, prompt, first_seen, eos=None, stop_ids=[last]),
        make_request(3, prompt, first_seen, eos=None),
        make_request(4, prompt, 6, eos=last),
    )
    expected = [
        Answer(tokens[:first_seen], FinishReason.STOP, None),
        Answer(tokens[:first_seen], FinishReason.STOP, last),
        Answer(tokens[:first_seen], FinishReason.LENGTH, None),
        Answer(tokens[:first_seen], FinishReason.STOP, None),
    ]
    assert all(answer.same_text(wanted) for answer, wanted in zip(answers, expected, strict=True))


@both_modes
@pytest.mark.parametrize("min_tokens", [0, 1, 5, 20])
def test_min_tokens_hold_back_every_end_token(async_scheduling: bool, min_tokens: int) -> None:
    engine = Engine(async_scheduling=async_scheduling, block_size=2, num_blocks=256)
    almost_all = [token for token in range(VOCAB) if token not in (5, EOS)]
    requests = [make_request(i, [i, i], 20, min_tokens=min_tokens, stop_ids=almost_all) for i in range(8)]
    for request, answer in zip(requests, engine.run(*requests), strict=True):
        assert answer == run_alone(request)
        held, free = answer.tokens[:min_tokens], answer.tokens[min_tokens:]
        assert set(held) <= {5}
        assert all(token == 5 for token in free[:-1])


@both_modes
def test_no_logits_ends_that_request_and_no_other(async_scheduling: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling)
    requests = [make_request(i, [i] * 9, 8, eos=None) for i in range(3)]
    engine.add(*requests)
    engine.step()
    engine.step()
    engine.runner.no_logits.add(1)
    engine.drain()
    bad = engine.answers[1]
    assert bad.finish_reason is FinishReason.ERROR
    assert bad.tokens == run_alone(requests[1]).tokens[: len(bad.tokens)] and NO_TOKEN not in bad.tokens
    assert "finite" in engine.errors[1]
    assert engine.answers[0] == run_alone(requests[0]) and engine.answers[2] == run_alone(requests[2])


@both_modes
@pytest.mark.parametrize("chunk", [0, 4])
def test_what_gave_no_logits_is_not_reused(async_scheduling: bool, chunk: int) -> None:
    """Keys and values that led to no finite logits may themselves be broken, those of earlier chunks too."""
    engine = Engine(async_scheduling=async_scheduling, long_prefill_token_threshold=chunk)
    engine.runner.no_logits.add(1)
    engine.run(make_request(1, [4] * 9, 8))
    again = make_request(2, [4] * 9, 8)
    assert engine.run(again) == [run_alone(again)], "num_cached is 0"


# ---- abort, and ids that come again ----------------------------------------------------------------


@both_modes
def test_abort_at_every_step(async_scheduling: bool) -> None:
    """Waiting, in the middle of the prompt, decoding, in flight, preempted: always gone in one step."""
    seen = set()
    for when in range(60):
        engine = Engine(
            async_scheduling=async_scheduling,
            max_model_len=32,
            num_blocks=9,
            max_num_batched_tokens=6,
            max_num_seqs=3,
        )
        requests = [make_request(i, [i] * 8, 20, eos=None) for i in range(4)]
        engine.add(*requests)
        for _ in range(when):
            engine.step()
        scheduler = scheduler_of(engine)
        for victim in (2, 3):
            request = scheduler._requests.get(victim)
            if request is None:
                seen.add("finished")
                assert not engine.core.abort(victim)
                continue
            if request.row >= 0:
                seen.add("mid-prefill" if request.num_output == 0 else "decoding")
            else:
                seen.add("waiting" if request.num_cached is None else "preempted")
            if request.steps_in_flight:
                seen.add("in flight")
            assert engine.core.abort(victim)
            assert not engine.core.abort(victim), "a second abort finds nothing"
            engine.step()
            assert request.row < 0, "row and blocks are back within one step"
            known = len(engine.answers.get(victim, Answer([])).tokens)
            engine.step()
            assert len(engine.answers.get(victim, Answer([])).tokens) == known
        engine.drain()
        for untouched in requests[:2]:
            assert engine.answers[untouched.request_id].same_text(run_alone(untouched))
    expected = {"waiting", "mid-prefill", "decoding", "preempted", "finished"}
    assert seen == expected | ({"in flight"} if async_scheduling else set())


@both_modes
def test_abort_of_an_unknown_request(async_scheduling: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling)
    assert not engine.core.abort(1)
    engine.run(make_request(1, [1]))
    assert not engine.core.abort(1)


@both_modes
def test_an_id_is_free_as_soon_as_its_request_ended(async_scheduling: bool) -> None:
    """Even while the last step of its predecessor is in flight."""
    for how in ("abort", "stop"):
        for steps in range(1, 6):
            engine = Engine(async_scheduling=async_scheduling)
            prompt = [6] * 6
            stop = first_tokens(prompt, 1) if how == "stop" else []
            engine.add(make_request(1, prompt, 20, eos=None, stop_ids=stop))
            for _ in range(steps):
                engine.step()
            if how == "abort":
                assert engine.core.abort(1)
            elif 1 in scheduler_of(engine)._requests:
                continue
            engine.answers.clear()
            again = make_request(1, [7] * 9, 20, eos=None)
            assert engine.run(again) == [run_alone(again)]


# ---- prefix reuse ----------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("length", [4, 5, 7, 8, 9, 12])
def test_the_same_prompt_twice(async_scheduling: bool, length: int) -> None:
    """Also when every block of it is cached: one token is then still computed."""
    engine = Engine(async_scheduling=async_scheduling)
    engine.run(make_request(1, range(length), 3, eos=None))
    second = make_request(2, range(length), 3, eos=None)
    hit = (length - 1) // 4 * 4
    assert engine.run(second) == [run_alone(second)._replace(num_cached=hit)]
    assert shape(engine)[3:] == [{2: length - hit}, {2: 1}, {2: 1}]
    stats = engine.core.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (2 * length, hit)


@both_modes
def test_generated_tokens_are_found_by_the_next_turn(async_scheduling: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling)
    (first,) = engine.run(make_request(1, range(6), 10, eos=None))
    turn = make_request(2, [*range(6), *first.tokens, 3, 3], 4)
    # The last token was sampled but never computed: 15 tokens are in the cache, 3 full blocks.
    assert engine.run(turn) == [run_alone(turn)._replace(num_cached=12)]


@both_modes
def test_salted_prompts_never_share(async_scheduling: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling)
    salts = ["", "a", "b", "ab"]
    requests = [make_request(i, [5] * 20, 4, salt=salt) for i, salt in enumerate(salts)]
    for request in requests:
        assert engine.run(request) == [run_alone(request)], "num_cached is 0"
    again = make_request(9, [5] * 20, 4, salt="b")
    assert engine.run(again)[0].num_cached == 16


def test_a_running_prefix_is_shared_and_stored_once() -> None:
    engine = Engine()
    engine.add(make_request(0, [5] * 9, 8, eos=None))
    engine.step()
    engine.add(*(make_request(i, [*[5] * 8, i], 8, eos=None) for i in range(1, 4)))
    engine.step()
    assert engine.core.kv.num_used == 2 + 4
    assert len({tuple(table.blocks[0][:2]) for table in engine.core.kv._tables.values()}) == 1
    engine.drain()


def test_only_known_tokens_are_hashed() -> None:
    """While a step is in flight its block is full, but its last token is not known yet."""
    engine = Engine(async_scheduling=True)
    engine.add(make_request(1, range(6), 8, eos=None))
    hashed = []
    for _ in range(5):
        engine.step()
        request = scheduler_of(engine)._requests[1]
        known_and_computed = len(request.token_ids) - 1 if request.num_output else 0
        hashed.append(len(engine.core.kv.groups[0].block_of))
        assert hashed[-1] == known_and_computed // 4
        assert len(request.keys._keys) - 1 <= len(request.token_ids) // 4
    assert hashed == [0, 1, 1, 2, 2]


@both_modes
def test_a_reset_between_any_two_steps(async_scheduling: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling)
    requests = [make_request(i, [5] * (12 + i), 8, eos=None) for i in range(4)]
    for request in requests:
        engine.add(request)
        engine.step()
        engine.core.reset_prefix_cache()
        engine.core.kv.check()
    engine.drain()
    assert all(engine.answers[r.request_id].same_text(run_alone(r)) for r in requests)


# ---- accounting ------------------------------------------------------------------------------------


def test_unused_slots_are_what_the_tables_do_not_fill() -> None:
    engine = Engine()
    engine.add(make_request(1, [1] * 5, 8, eos=None), make_request(2, [2] * 4, 8, eos=None))
    unused = []
    for _ in range(4):
        engine.step()
        unused.append(engine.core.kv.num_unused_slots)
    assert unused == [3 + 0, 2 + 3, 1 + 2, 0 + 1]


def test_an_ended_request_in_flight_is_counted_until_its_step_is_back() -> None:
    engine = Engine(async_scheduling=True)
    engine.add(make_request(1, [1] * 5, 8, eos=None))
    engine.step()
    engine.step()
    engine.core.abort(1)
    assert engine.core.has_work() and engine.core.kv.num_used == 2
    assert engine.step() == []
    assert engine.core.kv.num_used == 0 and not engine.core.has_work()
    engine.check_rest()


def test_a_plan_is_committed_with_one_token_for_each_entry() -> None:
    config = make_config()
    pool = BlockPool(config.num_blocks, config.block_size)
    runner = FakeRunner(config)
    scheduler = Scheduler(config, KVCacheManager([LayerGroup(pool)]), runner.masks)
    scheduler.add(make_request(1, [1, 2, 3]))
    plan = scheduler.schedule()
    assert plan is not None and [r.id for r in plan.admitted] == [1]
    runner.launch(plan)
    with pytest.raises(ValueError, match="zip"):
        scheduler.commit(plan, StepResult([]))


# ---- requests that share their prompt ---------------------------------------------------------------

SHARED = [3 + i % 13 for i in range(40)]  # ten blocks; in two steps of 32 tokens


def computed(engine: Engine) -> int:
    """Tokens that all steps so far have computed."""
    return sum(item.num_new for plan in engine.runner.plans for item in plan.scheduled)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
def test_samples_of_one_prompt_share_its_prefill(async_scheduling: bool, caching: bool) -> None:
    engine = Engine(async_scheduling=async_scheduling, enable_prefix_caching=caching)
    samples = [make_request(i, SHARED, 5, eos=None) for i in range(4)]
    other = make_request(9, [20, 21, 22], 5, eos=None)
    answers = engine.run(*samples, other)
    assert all(a.same_text(run_alone(r)) for a, r in zip(answers, [*samples, other], strict=True))
    # Each decodes 4 tokens after the one that its prompt gives; each computes the last block itself.
    decodes = 5 * 4
    once, each = len(SHARED) + 3 * engine.config.block_size, 4 * len(SHARED)
    assert computed(engine) == (once if caching else each) + len(other.prompt_token_ids) + decodes


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_followers_go_on_without_their_leader(async_scheduling: bool) -> None:
    """The first sample is aborted in the middle of the prompt: the next one computes it for the others."""
    engine = Engine(async_scheduling=async_scheduling)
    samples = [make_request(i, SHARED, 5, eos=None) for i in range(3)]
    engine.add(*samples)
    engine.step()
    assert engine.core.scheduler.num_running == 1 and engine.core.scheduler.num_waiting == 2
    assert engine.core.abort(0) and engine.core.abort(2)
    engine.drain()
    assert engine.answers[1].same_text(run_alone(samples[1]))


def test_followers_return_to_the_queue_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By merging what is sorted: ten thousand that are inserted one by one hold all others up."""
    engine = Engine(max_num_seqs=2, max_num_batched_tokens=34, long_prefill_token_threshold=8)
    samples = [make_request(i, SHARED, 2) for i in range(300)]
    engine.add(*samples[1::2], make_request(999, [20, 21, 22], 30, eos=None), *samples[::2])
    engine.step()
    scheduler = engine.core.scheduler
    (leader,) = (request for request in scheduler._running if request.leads)
    assert len(scheduler._following[leader.leads]) == 149
    compared = 0

    def before(self: Request, other: Request) -> bool:
        nonlocal compared
        compared += 1
        return self.order < other.order

    monkeypatch.setattr(Request, "__lt__", before)
    scheduler._let_follow(leader)
    assert compared < 2 * len(samples) and not scheduler._following
    assert scheduler._waiting == sorted(scheduler._waiting, key=lambda request: request.order)
    assert engine.core.abort(5) and scheduler.num_waiting == 298
    assert len(engine.drain()) == len(samples)


def test_nobody_waits_for_a_prompt_under_another_salt() -> None:
    engine = Engine(max_num_batched_tokens=128)
    engine.add(*(make_request(i, SHARED, 5, salt=salt) for i, salt in enumerate(["a", "b"])))
    engine.step()
    assert engine.core.scheduler.num_running == 2
