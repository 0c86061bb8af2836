"""The engine without text: token ids in, token ids out, one step at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.counters import EngineCounters
from microvllm.runtime.core.drafts import Drafter
from microvllm.runtime.core.kv_cache import KVCacheManager
from microvllm.runtime.core.plan import Request, StepPlan, StepResult
from microvllm.runtime.core.scheduler import Scheduler
from microvllm.runtime.errors import EngineError, RequestError
from microvllm.runtime.grammar.masks import GrammarMasks
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.request import EngineRequest, FinishReason, StepOutput
from microvllm.runtime.worker.step_times import Measured, StepReport

logger = logging.getLogger("microvllm.engine")


class StepInFlight(Protocol):
    """A step that was launched and whose tokens were not read yet."""

    @property
    def plan(self) -> StepPlan: ...


S = TypeVar("S", bound="StepPlan | StepInFlight")
StepT = TypeVar("StepT", bound=StepInFlight)


class Runner(Measured, Protocol[StepT]):
    """Executes plans: the model runner, or a fake in tests."""

    def launch(self, plan: StepPlan) -> StepT:
        """Start a step; must not wait for its tokens."""
        ...

    def finish(self, step: StepT) -> StepT:
        """Start what is left of a step: what had to wait until the step before was collected."""
        ...

    @property
    def masks(self) -> GrammarMasks:
        """The grammars of its requests."""
        ...

    def collect(self, step: StepT) -> StepResult:
        """Wait for a launched step and read its result."""
        ...


class EngineCore(Generic[StepT]):
    """Scheduler + KV manager + runner. Single-threaded; only `step` and `drain` wait for the device.

    `report` has the times of the steps, if the configuration asks for them. With a drafter each step is
    awaited before the next is scheduled, since drafts follow tokens that have to be known; the runner has to
    check the drafts of a plan, which `ModelGraphRunner` cannot yet.
    """

    def __init__(self, config: EngineConfig, runner: Runner[StepT], drafter: Drafter | None = None) -> None:
        self.config = config
        self.kv = KVCacheManager.of(config)
        self.scheduler = Scheduler(config, self.kv, runner.masks, drafter)
        self.clock = runner.clock
        self.report = StepReport(runner) if config.log_step_times else None
        self._runner = runner
        self._masks = runner.masks
        self._counters = EngineCounters(config)
        self._runs_ahead = config.async_scheduling and drafter is None
        self._in_flight: StepT | None = None

    def add(self, request: EngineRequest) -> StepOutput | None:
        """Queue a request; a refusal is that request's output and concerns no other."""
        return next(iter(self.add_samples([request])), None)

    def add_samples(self, requests: Sequence[EngineRequest]) -> list[StepOutput]:
        """Queue the samples of one prompt, which share all lists; return the outputs of those refused."""
        self._counters.requests += len(requests)
        if requests and requests[0].grammar:
            self._masks.hold(requests)
            return []
        return self._queue(requests)

    def _queue(self, requests: Sequence[EngineRequest]) -> list[StepOutput]:
        refusals: list[StepOutput] = []
        first: Request | None = None
        for request in requests:
            try:
                first = self.scheduler.add(request, first)
            except RequestError as error:
                message, param = error.message, error.param
                refusal = StepOutput(request.request_id, [], FinishReason.ERROR, error=message, param=param)
                refusals.append(refusal)
        return refusals

    def abort(self, request_id: int) -> bool:
        """End a request at any moment; its blocks are free within one step."""
        return self._masks.drop(request_id) or self.scheduler.abort(request_id)

    def reset_prefix_cache(self) -> None:
        self.kv.reset_prefix_cache()

    def has_work(self) -> bool:
        return self._masks.held or self.scheduler.has_work() or self._in_flight is not None

    def step(self) -> list[StepOutput]:
        """Launch one step and return the tokens that became known.

        With asynchronous scheduling these are the previous step's, so the host schedules step k+1
        while step k runs; otherwise the step is awaited at once. One loop serves both.
        """
        self.clock.enter("schedule")
        compiled, outputs = self._masks.take_compiled()
        for requests in compiled:
            outputs += self._queue(requests)
        outputs += self.scheduler.expire()
        plan = self.scheduler.schedule()
        self.clock.enter("prepare")
        # In the order of their work on the device: the step in flight may still have to be sampled.
        self._in_flight = self._attempt(self._runner.finish, self._in_flight, outputs)
        done = self._attempt(self._runner.launch, plan, outputs)
        if self._runs_ahead:
            done, self._in_flight = self._in_flight, done
        if done is not None:
            return outputs + self._collect(done)
        if plan is None:
            self._masks.wait()
        self.clock.enter("messages")
        return outputs

    def drain(self) -> list[StepOutput]:
        """Await the step in flight, if there is one, without launching another; returns its tokens."""
        done, self._in_flight = self._in_flight, None
        return [] if done is None else self._collect(done)

    def rest(self) -> None:
        """Count the time until the next step as idle, and write the report of the steps so far."""
        self.clock.enter("idle")
        if self.report is not None:
            self.report.write()

    def _collect(self, done: StepT) -> list[StepOutput]:
        self.clock.enter("wait")
        plan, result = done.plan, self._runner.collect(done)
        self.clock.enter("commit")
        outputs = self.scheduler.commit(plan, result)
        if self._masks.active:
            self._masks.begin(plan.scheduled)
        self.scheduler.drafts.propose(plan.scheduled)
        self._counters.count(plan, outputs)
        self.clock.enter("messages")
        if self.report is not None:
            self.report.add(plan.scheduled)
        return outputs

    def _attempt(
        self, start: Callable[[S], StepT], step: S | None, outputs: list[StepOutput]
    ) -> StepT | None:
        """Start a step, if there is one; if it cannot be started, the errors of its requests go to `outputs`.

        Its blocks are not in the prefix cache yet, so nothing of it outlives them.
        """
        if step is None:
            return None
        plan = step if isinstance(step, StepPlan) else step.plan
        try:
            return start(step)
        except EngineError:
            raise
        except Exception as error:
            logger.exception("A step of %d requests failed.", len(plan.scheduled))
            outputs += self.scheduler.fail(plan, f"the step failed ({type(error).__name__})")
            return None

    def stats(self) -> EngineStats:
        return self._counters.stats(self.scheduler, self._runner)
