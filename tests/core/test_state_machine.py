"""A random life of the engine: every rule at any moment, every invariant after each of them.

10,000 steps of the engine take some 25 s of processor time; `scripts/state_machine 1000000` takes more.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from fakes import EOS, Answer, Engine, FakeDrafter, make_request, run_alone
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from microvllm.runtime.core.plan import Request, StepPlan
from microvllm.runtime.core.policies import POLICIES
from microvllm.runtime.request import EngineRequest, FinishReason

CONTEXT = 16
MAX_STEPS_TO_ADMIT = 400  # a waiting head that fits is admitted long before
STEPS = int(os.environ.get("MICROVLLM_STATE_MACHINE_STEPS", "10000"))

IDS = st.integers(0, 4)  # few, so that they come again
# A shared stem and a short tail over two letters: prefixes are hit, missed, hit in part, and hit wholly.
STEM = [5, 6, 7, 8, 9, 10, 11, 12]
TAILS = [[3], [4], [3, 3], [3, 4], [3, 4, 3], [3, 3, 3, 3], [3, 3, 3, 4], [4, 3, 3, 3, 3, 3]]
PROMPTS = st.builds(
    lambda stem, tail: STEM[:stem] + tail, st.sampled_from([0, 1, 4, 8]), st.sampled_from(TAILS)
)


# Of a layer each.
ANY_WINDOWS = [(None,), (None,), (None,), (3,), (None, 1), (5, None), (None, 2, 6), (4, 9)]
SEVERAL_WINDOWS = [(None, 6), (6, None, 6), (None, 9), (None, 2, 5), (8, 3)]


@st.composite
def shapes(draw: st.DrawFn, windows: list[tuple[int | None, ...]] = ANY_WINDOWS) -> dict[str, object]:
    """Small engines: blocks for hardly more than one request, budgets of a few tokens."""
    block_size = draw(st.sampled_from([1, 2, 4]))
    chunked = draw(st.booleans())
    budget = draw(st.integers(3, 8)) if chunked else CONTEXT
    return {
        "max_model_len": CONTEXT,
        "block_size": block_size,
        "spare_blocks": draw(st.sampled_from([0, 0, 1, 3, CONTEXT])),
        "windows": draw(st.sampled_from(windows)),
        "max_num_batched_tokens": budget,
        "max_num_seqs": draw(st.sampled_from([3, 2, 1])),
        "enable_chunked_prefill": chunked,
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 2])),
        "enable_prefix_caching": draw(st.sampled_from([True, True, True, False])),
        "scheduling_policy": draw(st.sampled_from(sorted(POLICIES))),
    }


class EngineMachine(RuleBasedStateMachine):
    """Drives `EngineCore` on the fake runner; the oracle is each request run alone."""

    async_scheduling = False
    drafter: FakeDrafter | None = None
    steps = 0  # of the engine, of all examples together

    @initialize(shape=shapes())
    def start(self, shape: dict[str, object]) -> None:
        self.engine = Engine(drafter=self.drafter, async_scheduling=self.async_scheduling, **shape)
        self.requests: dict[int, EngineRequest] = {}  # every id ever used -> its newest request
        self.live: dict[int, Request] = {}  # what the scheduler still knows
        self.ended: list[Request] = []  # aborted or finished, perhaps with a step in flight
        self.faulty: set[int] = set()
        self.waited: dict[int, int] = {}  # steps
        self.arrivals = 0
        self.place: dict[int, tuple[int, int]] = {}  # in the order of service
        self.contents: dict[tuple[int, bytes], tuple[object, ...]] = {}  # of each block under a prefix key

    # ---- rules ---------------------------------------------------------------------------------

    @rule(
        request_id=IDS,
        prompt=PROMPTS,
        max_tokens=st.sampled_from([CONTEXT, 8, 3, 2, 1]),
        min_tokens=st.integers(0, 4),
        eos=st.sampled_from([None, EOS]),
        stop_ids=st.sampled_from([(), (), (3, 4), (12, 13, 14, 15)]),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "salt"]),
    )
    def add(
        self,
        request_id: int,
        prompt: list[int],
        max_tokens: int,
        min_tokens: int,
        eos: int | None,
        stop_ids: tuple[int, ...],
        priority: int,
        salt: str,
    ) -> None:
        max_tokens = min(max_tokens, CONTEXT - len(prompt))
        request = make_request(
            request_id,
            prompt,
            max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            eos=eos,
            stop_ids=stop_ids,
            priority=priority,
            salt=salt,
        )
        self.submit(request)

    @precondition(lambda self: bool(self.requests))
    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        """The same id and prompt once more: whole prefix hits, and ids reused with a step in flight."""
        self.submit(self.requests[data.draw(st.sampled_from(sorted(self.requests)))])

    @rule(request_id=IDS, prompt=st.sampled_from([[], [3] * CONTEXT]))
    def add_what_can_never_run(self, request_id: int, prompt: list[int]) -> None:
        refusal = self.engine.core.add(make_request(request_id, prompt, 1))
        assert refusal is not None and refusal.finish_reason is FinishReason.ERROR

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Waiting, in the middle of its prompt, decoding, in flight, or preempted."""
        self.abort_any(data.draw(st.sampled_from(sorted(self.live))))

    @rule(request_id=st.integers(0, 5))
    def abort_any(self, request_id: int) -> None:
        """Also finished, already aborted, or never seen (5)."""
        assert self.engine.core.abort(request_id) == (request_id in self.live)
        if request_id in self.live:
            self.ended.append(self.live.pop(request_id))

    @rule(steps=st.sampled_from([1, 1, 2, 3, 6]))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.step_once()

    def step_once(self) -> None:
        type(self).steps += 1
        engine, scheduler = self.engine, self.engine.core.scheduler
        in_flight = [request for request in self.live.values() if request.steps_in_flight]
        waiting = [request for request in self.live.values() if request.row < 0]
        running = [request for request in self.live.values() if request.row >= 0]
        ended, num_plans = list(self.ended), len(engine.runner.plans)
        following: list[Request] = []
        launch = engine.runner.launch

        def note(plan: StepPlan) -> Any:
            # Here, since with synchronous scheduling a leader comes and goes within one step.
            following.extend(request for request in waiting if self.follows(request))
            return launch(plan)

        engine.runner.launch = note  # type: ignore[method-assign]
        outputs = engine.step()
        del engine.runner.launch
        queued = [request for request in waiting if request not in following]
        self.check_order(queued, running, [r for p in engine.runner.plans[num_plans:] for r in p.admitted])
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            assert output.request_id in self.live, "output of a request that ended"
            self.compare(output.request_id)
            if output.finish_reason is not None:
                request = self.live.pop(output.request_id)
                self.ended.append(request)
                foreseen = output.finish_reason is FinishReason.LENGTH
                assert not (foreseen and request.steps_in_flight), "a step after the last token"
        # What ended before this step has given everything back with it.
        assert all(request.row < 0 for request in ended), "an ended request holds its row after a step"
        self.ended = [request for request in self.ended if request.row >= 0]
        for request in in_flight:
            assert request.row >= 0 or request.finish_reason is not None, "preempted with a step in flight"
        for request_id, request in self.live.items():
            self.waited[request_id] = self.waited[request_id] + 1 if request.row < 0 else 0
        head = min((r for r in self.live.values() if r.row < 0), default=None, key=lambda r: r.order)
        if head is not None:
            assert self.waited[head.id] < MAX_STEPS_TO_ADMIT, "the head of the queue is never admitted"
        assert scheduler.has_work() == bool(self.live or self.ended)

    def check_order(self, waiting: list[Request], running: list[Request], admitted: list[Request]) -> None:
        """Nobody is admitted before one who is to be served earlier, or preempted instead of a later one."""
        left_out = [request for request in waiting if request not in admitted]
        assert all(self.place[a.id] < self.place[b.id] for a in admitted for b in left_out)
        preempted = [request for request in running if request.row < 0 and request.finish_reason is None]
        kept = [request for request in running if request.row >= 0]
        assert all(self.place[a.id] < self.place[b.id] for a in kept for b in preempted)

    def follows(self, request: Request) -> bool:
        """Whether it waits for blocks that another computes: the only reason to be passed over."""
        following = self.engine.core.scheduler._following
        key = next((key for key, followers in following.items() if request in followers), None)
        if key is None:
            return False
        leader = next(r for r in [*self.live.values(), *self.ended] if r.leads == key)
        size = self.engine.config.block_size
        shared = (len(request.token_ids) - 1) // size * size
        assert leader.row >= 0 and leader.finish_reason is None and self.engine.config.enable_prefix_caching
        assert shared and leader.token_ids[:shared] == request.token_ids[:shared]
        assert leader.source.cache_salt == request.source.cache_salt
        return True

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data())
    def lose_logits(self, data: st.DataObject) -> None:
        """The next step of one request gives no finite logits."""
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        self.engine.runner.no_logits.add(request_id)
        self.faulty.add(request_id)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.engine.core.reset_prefix_cache()
        assert not any(group.block_of for group in self.engine.core.kv.groups)
        self.contents.clear()

    @rule()
    def drain(self) -> None:
        for _ in range(2000):
            if not self.engine.core.has_work():
                break
            self.step_once()
        assert not self.live, "a request is never finished"
        self.engine.check_rest()

    def submit(self, request: EngineRequest) -> None:
        refusal = self.engine.core.add(request)
        if request.request_id in self.live:
            assert refusal is not None and refusal.finish_reason is FinishReason.ERROR
            return
        assert refusal is None
        self.requests[request.request_id] = request
        self.engine.answers.pop(request.request_id, None)
        self.faulty.discard(request.request_id)
        self.engine.runner.no_logits.discard(request.request_id)
        self.live[request.request_id] = self.engine.core.scheduler._requests[request.request_id]
        self.waited[request.request_id] = 0
        self.arrivals += 1
        urgency = request.priority if self.engine.config.scheduling_policy == "priority" else 0
        self.place[request.request_id] = (urgency, self.arrivals)

    # ---- the oracle ----------------------------------------------------------------------------

    def compare(self, request_id: int) -> None:
        """What the request gave so far is what it gives alone, up to where it was cut off."""
        answer, expected = self.engine.answers[request_id], run_alone(self.requests[request_id])
        if answer.finish_reason is FinishReason.ERROR:
            assert request_id in self.faulty
            assert answer.tokens == expected.tokens[: len(answer.tokens)]
        elif answer.finish_reason is None:
            assert answer.same_text(Answer(expected.tokens[: len(answer.tokens)]))
        else:
            assert answer.same_text(expected)

    # ---- invariants ----------------------------------------------------------------------------

    @invariant()
    def pool_is_sound(self) -> None:
        self.engine.core.kv.check()

    @invariant()
    def refcount_is_the_number_of_tables(self) -> None:
        kv = self.engine.core.kv
        tables = [blocks for table in kv._tables.values() for blocks in table.blocks]
        held = Counter(block for table in tables for block in set(table))
        assert kv.pool.refcount == [held[block] for block in range(kv.pool.num_blocks)]
        holders = [r for r in [*self.live.values(), *self.ended] if r.row >= 0]
        assert sorted(kv._tables) == sorted(r.seq_id for r in holders), "tables without a running request"

    @invariant()
    def table_is_as_long_as_its_tokens(self) -> None:
        kv, size = self.engine.core.kv, self.engine.config.block_size
        for request in self.live.values():
            if request.row >= 0:
                blocks = -(-request.num_computed // size)
                assert len(kv.blocks_from(request.seq_id, 0)) == blocks * len(kv.groups)

    @invariant()
    def a_key_names_what_it_named_before(self) -> None:
        """The tokens behind a prefix key never change while the key is offered, and fill its block."""
        kv, size = self.engine.core.kv, self.engine.config.block_size
        named = [(index, *item) for index, group in enumerate(kv.groups) for item in group.block_of.items()]
        for index, key, block in named:
            content = self.engine.runner.block_content(block)
            positions = [cell.position for cell in content if cell is not None and cell.group == index]
            assert len(positions) == size and positions[0] % size == 0
            assert positions == list(range(positions[0], positions[0] + size))
            assert self.contents.setdefault((index, key), content) == content
        assert kv.enable_prefix_caching or not named
        for request in self.live.values():
            assert (len(request.keys._keys) - 1) * size <= len(request.token_ids), (
                "an unknown token is hashed"
            )

    @invariant()
    def each_request_is_in_one_place(self) -> None:
        scheduler = self.engine.core.scheduler
        assert scheduler._requests == self.live
        running = {id(r) for r in scheduler._running}
        leads = [r.leads for r in scheduler._running if r.leads is not None]
        assert sorted(leads) == sorted(scheduler._following), "followers of none, or of two"
        queues = [scheduler._running, scheduler._waiting, *scheduler._following.values()]
        assert all(r.queue is queue for queue in queues for r in queue)
        waits = [id(r) for queue in queues[1:] for r in queue]
        waiting = set(waits)
        assert len(waiting) == len(waits), "a request waits in two places"
        assert len(running) == len(scheduler._running) <= self.engine.config.max_num_seqs
        assert not running & waiting
        assert running == {id(r) for r in [*self.live.values(), *self.ended] if r.row >= 0}
        assert waiting == {id(r) for r in self.live.values() if r.row < 0}
        assert (scheduler.num_running, scheduler.num_waiting) == (len(running), len(waiting))
        assert all(queue == sorted(queue) for queue in queues)
        rows = [r.row for r in scheduler._running]
        assert sorted(rows + scheduler._free_rows) == list(range(self.engine.config.max_num_seqs))

    @invariant()
    def counts_add_up(self) -> None:
        for request in self.live.values():
            steps = [
                step
                for step in self.engine.runner.in_flight
                for item in step.plan.scheduled
                if item.request is request
            ]
            assert request.steps_in_flight == len(steps) <= 1
            assert request.num_in_flight <= request.steps_in_flight
            assert 0 <= request.num_computed <= request.num_tokens
            assert request.num_output + request.num_in_flight <= request.max_tokens
            assert request.num_tokens <= CONTEXT

    def teardown(self) -> None:
        if hasattr(self, "engine") and sys.exc_info()[0] is None:  # else the first failure would be hidden
            self.drain()


class AsyncEngineMachine(EngineMachine):
    async_scheduling = True


class DraftingEngineMachine(EngineMachine):
    drafter = FakeDrafter()


class WindowEngineMachine(EngineMachine):
    """Layers of several windows, in groups that share the blocks."""

    @initialize(shape=shapes(SEVERAL_WINDOWS))
    def start(self, shape: dict[str, object]) -> None:
        super().start(shape)


MACHINES = {
    "sync": EngineMachine,
    "async": AsyncEngineMachine,
    "drafts": DraftingEngineMachine,
    "windows": WindowEngineMachine,
}
SETTINGS = settings(
    max_examples=100,
    stateful_step_count=40,
    derandomize=False,  # it is by the seed: else each hundred would be the same
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("mode", MACHINES)
def test_any_life_of_the_engine(mode: str) -> None:
    machine = MACHINES[mode]
    machine.steps, hundreds = 0, 0
    # Two hundreds: they find 44 of the 45 bugs of test_mutations.py, and a third not the last one either.
    while machine.steps < STEPS // 3:
        if settings.default.derandomize:  # the same in every run
            seed(hundreds)(machine)
        run_state_machine_as_test(machine, settings=SETTINGS)
        hundreds += 1
