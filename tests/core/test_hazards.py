"""What goes wrong in engines that schedule a step ahead of its predecessor's tokens, and the test of each.

The same few bugs were found in nearly every engine that overlaps host and device. `HAZARDS` names the tests
that would see them here; those that belong to no other file are below. Structured output, whose grammar
could fall a token behind (vLLM issue 26292), does not exist here, so that hazard has no test.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import Answer, Engine, make_request, run_alone

from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.logits import LogitRules
from microvllm.runtime.worker.sampler import Sampler
from microvllm.runtime.worker.transfers import Readback, Stager

# The tests that fail without the guard, as file::test; of a planted bug, the function that plants it.
HAZARDS: dict[str, list[str]] = {
    "penalties count a token that is not known yet": [
        "test_hazards::test_penalties_count_what_the_host_does_not_know_yet",
        "test_hazards::test_a_token_that_was_not_chosen_is_not_counted",
        "test_sampling_rules::test_rules_are_the_same_in_company",
    ],
    "a block is offered to the prefix cache before its tokens are known": [
        "test_scheduler::test_only_known_tokens_are_hashed",
        "test_mutations::offer_blocks_before_their_tokens_are_known",
    ],
    "a row or a block is used again while a step that uses it is in flight": [
        "test_hazards::test_row_and_blocks_stay_until_the_last_step_in_flight_is_back",
        "test_mutations::free_before_the_last_step_in_flight",
        "test_mutations::row_not_cleared_on_reuse",
    ],
    "a ring of future tokens wraps": [
        "test_hazards::test_few_rows_serve_many_requests_one_step_ahead",
        "test_models::test_no_way_of_batching_changes_a_token",
    ],
    "a late token is delivered after preemption, abort, or the reuse of an id": [
        "test_scheduler::test_an_id_is_free_as_soon_as_its_request_ended",
        "test_mutations::the_token_of_an_ended_request_is_delivered",
        "test_mutations::preempt_in_flight",
        "test_mutations::a_reused_id_meets_its_predecessor",
    ],
    "a staging buffer is overwritten while the device still reads it": [
        "test_hazards::test_a_staging_buffer_is_not_written_before_the_device_has_read_it",
        "test_hazards::test_two_steps_of_tokens_are_on_their_way_at_a_time",
    ],
    "a step is launched for a request whose last token is being sampled": [
        "test_core::test_no_step_is_wasted",
        "test_mutations::a_step_after_the_last_token",
    ],
    "first tokens come a step late": [
        "test_hazards::test_a_token_is_delivered_when_its_own_step_is_done",
        "test_core::test_async_runs_one_step_ahead_and_sync_does_not",
    ],
    "an abort at a bad moment breaks a counter": [
        "test_scheduler::test_abort_at_every_step",
        "test_state_machine::test_any_life_of_the_engine",
        "test_mutations::an_aborted_request_stays_in_the_queue",
    ],
    "a prompt that is cached whole leaves nothing to compute": [
        "test_scheduler::test_the_same_prompt_twice",
        "test_kv_cache::test_a_prefix_leaves_at_least_one_token_to_compute",
        "test_mutations::match_the_whole_prompt",
    ],
    "a long prompt stalls the streams beside it": [
        "test_policies::test_a_long_prompt_stalls_no_running_stream",
        "test_policies::test_prompts_of_all_priorities_go_on_beside_each_other",
    ],
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_the_tests_of_each_hazard_exist(hazard: str) -> None:
    for name in HAZARDS[hazard]:
        file, _, function = name.partition("::")
        tree = ast.parse(next(Path(__file__).parent.parent.rglob(f"{file}.py")).read_text("utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


# ---- penalties -------------------------------------------------------------------------------------


def test_a_token_that_was_not_chosen_is_not_counted() -> None:
    """Counts are kept where tokens are chosen; a placeholder, which is negative, changes none."""
    params = SamplingParams(max_tokens=9, presence_penalty=2.0, frequency_penalty=1.0)

    def penalised(*chosen: int) -> list[float]:
        rules = LogitRules(1, 8)
        rules.set_row(0, EngineRequest(1, [3], params), [3], 1)
        for token in chosen:
            rules.observe([0], torch.tensor([token]))
        logits = torch.zeros(1, 8)
        rules.apply(logits, [0], [], lambda i: ([], False), torch.tensor([3]))
        found: list[float] = logits[0].tolist()
        return found

    assert penalised() == penalised(-1) == [0.0] * 8
    assert penalised(5, -1, 5, -1) == penalised(5, 5) == [0.0] * 5 + [-4.0] + [0.0] * 2


def test_penalties_count_what_the_host_does_not_know_yet() -> None:
    """Of equal logits the first is chosen, each but once: a count one step late would choose it twice."""
    sampler = Sampler(1, 8, seed=0)
    params = SamplingParams(max_tokens=9, temperature=0.0, presence_penalty=1.0)
    sampler.set_row(0, EngineRequest(1, [3], params), [3], 1)
    tokens = [3]
    for position in range(1, 7):
        sampled = sampler.sample(
            torch.zeros(1, 8),
            [0],
            [position],
            [],
            lambda i: ([], True),  # the host knows of no token: all are in flight
            torch.tensor(tokens[-1:]),
        )
        tokens += sampled.tokens.tolist()
    assert tokens[1:] == [0, 1, 2, 3, 4, 5]


# ---- rows and blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "abort"])
def test_row_and_blocks_stay_until_the_last_step_in_flight_is_back(how: str) -> None:
    """The end is known when the next step, which writes the row and a block, has been launched."""
    engine = Engine(async_scheduling=True, max_num_seqs=1)
    prompt = [6] * 4
    first, second = run_alone(make_request(1, prompt, 2, eos=None)).tokens
    engine.add(make_request(1, prompt, 20, eos=second if how == "stop" else None))
    newcomer = make_request(2, [7] * 9, 3, eos=None)
    engine.add(newcomer)
    request = engine.core.scheduler._requests[1]
    for _ in range(3):
        engine.step()
    if how == "abort":
        assert engine.core.abort(1)
    assert request.finish_reason is not None and request.steps_in_flight == 1
    held = set(engine.core.kv.blocks_from(request.seq_id, 0))
    assert request.row == 0 and held and engine.core.scheduler.num_waiting == 1
    assert not held & {*engine.core.kv.pool.free, *engine.core.kv.pool.cached}
    plans = len(engine.runner.plans)
    engine.step()
    assert len(engine.runner.plans) == plans, "the row is not free for the newcomer yet"
    assert request.row < 0 and engine.core.kv.num_used == 0
    engine.drain()
    assert engine.answers[2] == run_alone(newcomer)
    assert engine.answers[1].tokens == [first, second]


def test_few_rows_serve_many_requests_one_step_ahead() -> None:
    """The newest token of a request is found by its row, however many tokens and requests there were."""
    engine = Engine(async_scheduling=True, max_num_seqs=3, num_blocks=48)
    requests = [make_request(i, [i % 24, 5], 1 + i % 17, eos=None) for i in range(150)]
    answers = engine.run(*requests)
    assert all(answer.same_text(run_alone(r)) for answer, r in zip(answers, requests, strict=True))
    rows = [request.row for plan in engine.runner.plans for request in plan.admitted]
    assert len(rows) == 150, "each of three rows had fifty owners"


# ---- transfers -------------------------------------------------------------------------------------


class LateEvent:
    """An event of a device that does a transfer only when somebody waits for it."""

    def __init__(self) -> None:
        self.transfer: Callable[[], None] | None = None

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        transfer, self.transfer = self.transfer, None
        if transfer is not None:
            transfer()


@pytest.fixture
def late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of the late device; memory need not be pinned."""
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))


@pytest.mark.usefixtures("late_device")
@pytest.mark.parametrize("into", [False, True], ids=["send", "send_into"])
def test_a_staging_buffer_is_not_written_before_the_device_has_read_it(into: bool) -> None:
    stager = Stager(torch.device("cpu"))
    sent = [np.arange(6) + 10 * k for k in range(3 * Stager.BUFFERS)]
    received: dict[int, list[int]] = {}
    for k, array in enumerate(sent):
        index = stager._next
        if into:
            stager.send_into(torch.zeros(6, dtype=torch.int32), array)
        else:
            stager.send(array)

        def transfer(k: int = k, index: int = index) -> None:
            received[k] = stager._buffers[index][:6].tolist()

        event: Any = stager._sent[index]
        event.transfer = transfer
    for last in stager._sent:
        last.synchronize()
    assert received == {k: array.tolist() for k, array in enumerate(sent)}


@pytest.mark.usefixtures("late_device")
def test_two_steps_of_tokens_are_on_their_way_at_a_time() -> None:
    readback = Readback(4)
    reads = [readback.begin(torch.tensor([k, k + 1])) for k in range(2)]
    for k in range(2, 12):
        reads.append(readback.begin(torch.tensor([k, k + 1])))
        assert reads[k - 2]() == [k - 2, k - 1]


# ---- the first token -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_token_is_delivered_when_its_own_step_is_done(max_tokens: int) -> None:
    """One step ahead of the device is not one step late: the next step is launched, but not awaited.

    So a first token comes later by the time that a launch takes, and by nothing where nothing is launched.
    """
    engine = Engine(async_scheduling=True)
    events: list[str] = []
    launch, collect = engine.runner.launch, engine.runner.collect

    def logged_launch(plan: Any) -> Any:
        events.append(f"launch {[item.request.id for item in plan.scheduled]}")
        return launch(plan)

    def logged_collect(step: Any) -> Any:
        events.append(f"collect {[item.request.id for item in step.plan.scheduled]}")
        return collect(step)

    engine.runner.launch, engine.runner.collect = logged_launch, logged_collect  # type: ignore[method-assign]
    engine.add(make_request(1, [1, 2], max_tokens, eos=None))
    while engine.core.has_work():
        events += [f"deliver {output.request_id}" for output in engine.step()]
    ahead = ["launch [1]", "launch [1]", "collect [1]", "deliver 1", "launch [1]"]
    last = ["collect [1]", "deliver 1"]
    assert events == (ahead + last + last if max_tokens > 1 else ahead[:1] + last)
    assert engine.answers[1] == Answer(*run_alone(make_request(1, [1, 2], max_tokens, eos=None)))


def test_a_newcomer_s_first_token_waits_for_no_step_but_its_own() -> None:
    engine = Engine(async_scheduling=True)
    engine.add(make_request(1, [1, 2], 30, eos=None))
    for _ in range(4):
        engine.step()
    engine.add(make_request(2, [3, 4], 30, eos=None))
    first = len(engine.runner.plans)
    assert 2 not in {output.request_id for output in engine.step()}, "its step has been launched"
    assert 2 in {output.request_id for output in engine.step()}, (
        "and is collected right after the next launch"
    )
    assert len(engine.runner.plans) == first + 2 and len(engine.runner.in_flight) == 1
    engine.drain()
