"""The engine without text: token ids in, token ids out, one step at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.checkpoints import StateCheckpoints
from microvllm.runtime.core.kv_cache import BlockPool, KVCacheManager, LayerGroup
from microvllm.runtime.core.plan import Request, StepPlan, StepResult
from microvllm.runtime.core.scheduler import Scheduler
from microvllm.runtime.errors import EngineError, RequestError
from microvllm.runtime.grammar.masks import GrammarMasks
from microvllm.runtime.rank_layout import rank_layout
from microvllm.runtime.request import EngineRequest, EngineStats, FinishReason, StepOutput
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
    def padded_tokens(self) -> int: ...

    @property
    def masks(self) -> GrammarMasks | None:
        """The grammars of its requests; None where it refuses none and enforces none, as in tests."""
        ...

    def collect(self, step: StepT) -> StepResult:
        """Wait for a launched step and read its result."""
        ...


class Drafter(Protocol):
    """Proposes tokens, which the runner checks in one step (Leviathan et al., 2023, arXiv:2211.17192)."""

    def propose(self, requests: Sequence[Request]) -> Sequence[Sequence[int]]:
        """For each request the tokens that may follow its `token_ids`, in order; none where it cannot say."""
        ...


class EngineCore(Generic[StepT]):
    """Scheduler + KV manager + runner. Single-threaded; only `step` and `drain` wait for the device.

    `report` has the times of the steps, if the configuration asks for them. With a drafter each step is
    awaited before the next is scheduled, since drafts follow tokens that have to be known; the runner has to
    check the drafts of a plan, which `ModelGraphRunner` cannot yet.
    """

    def __init__(self, config: EngineConfig, runner: Runner[StepT], drafter: Drafter | None = None) -> None:
        self.config = config
        pool = BlockPool(config.num_blocks, config.block_size)
        length, layout = config.max_model_len, rank_layout(config)
        self._kv_tokens = layout.tokens(config.num_blocks, length)
        groups = [LayerGroup(pool, *group) for group in layout.groups(length)]
        self.kv = KVCacheManager(groups, config.enable_prefix_caching)
        self.kv.states = StateCheckpoints.of(config, self.kv.groups[0].longest_hit)
        self.scheduler = Scheduler(config, self.kv)
        self.clock = runner.clock
        self.report = StepReport(runner) if config.log_step_times else None
        self._runner = runner
        self._drafter = drafter
        self._masks = self.scheduler.masks = runner.masks
        self._in_flight: StepT | None = None
        self._num_steps = 0
        self._num_decode_steps = 0
        self._num_requests = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def add(self, request: EngineRequest) -> StepOutput | None:
        """Queue a request; a refusal is that request's output and concerns no other."""
        return next(iter(self.add_samples([request])), None)

    def add_samples(self, requests: Sequence[EngineRequest]) -> list[StepOutput]:
        """Queue the samples of one prompt, which share all lists; return the outputs of those refused."""
        self._num_requests += len(requests)
        if self._masks is not None and requests and requests[0].grammar:
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
        dropped = self._masks is not None and self._masks.drop(request_id)
        return dropped or self.scheduler.abort(request_id)

    def reset_prefix_cache(self) -> None:
        self.kv.reset_prefix_cache()

    def has_work(self) -> bool:
        held = self._masks is not None and self._masks.held
        return held or self.scheduler.has_work() or self._in_flight is not None

    def step(self) -> list[StepOutput]:
        """Launch one step and return the tokens that became known.

        With asynchronous scheduling these are the previous step's, so the host schedules step k+1
        while step k runs; otherwise the step is awaited at once. One loop serves both.
        """
        self.clock.enter("schedule")
        expired = self._queue_compiled() + self.scheduler.expire()
        plan = self.scheduler.schedule()
        self.clock.enter("prepare")
        self._in_flight, failed = self._attempt(self._runner.finish, self._in_flight)
        done, failures = self._attempt(self._runner.launch, plan)
        failed += failures
        if self.config.async_scheduling and self._drafter is None:
            done, self._in_flight = self._in_flight, done
        if done is None:
            if plan is None and self._masks is not None:
                self._masks.wait()
            self.clock.enter("messages")
            return expired + failed
        return expired + failed + self._collect(done)

    def _queue_compiled(self) -> list[StepOutput]:
        """Queue the requests whose grammar is compiled; returns the outputs of those refused."""
        if self._masks is None or not self._masks.held:
            return []
        compiled, refusals = self._masks.take_compiled()
        for requests in compiled:
            refusals += self._queue(requests)
        return refusals

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
        result = self._runner.collect(done)
        self.clock.enter("commit")
        scheduled = done.plan.scheduled
        outputs = self.scheduler.commit(done.plan, result)
        if self._masks is not None and self._masks.active:
            self._masks.begin(scheduled)
        num_tokens = sum(item.num_new for item in scheduled)
        if self._drafter is not None:
            num_tokens -= sum(item.num_draft_tokens for item in scheduled)
            decoding = [i.request for i in scheduled if i.samples and i.request.finish_reason is None]
            for request, drafts in zip(decoding, self._drafter.propose(decoding), strict=True):
                request.drafts = drafts
        self._num_steps += 1
        self._num_decode_steps += num_tokens == len(scheduled)
        self._prompt_tokens += sum(
            min(item.num_new, item.request.prompt_len - item.start)
            for item in scheduled
            if item.start < item.request.prompt_len
        )
        self._generation_tokens += sum(len(output.token_ids) for output in outputs)
        self.clock.enter("messages")
        if self.report is not None:
            self.report.add(scheduled, num_tokens)
        return outputs

    def _attempt(self, start: Callable[[S], StepT], step: S | None) -> tuple[StepT | None, list[StepOutput]]:
        """The started step, if there is one, or the errors of all requests of one that could not be started.

        Its blocks are not in the prefix cache yet, so nothing of it outlives them.
        """
        if step is None:
            return None, []
        plan = step if isinstance(step, StepPlan) else step.plan
        try:
            return start(step), []
        except EngineError:
            raise
        except Exception as error:
            logger.exception("A step of %d requests failed.", len(plan.scheduled))
            return None, self.scheduler.fail(plan, f"the step failed ({type(error).__name__})")

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_blocks_used=self.kv.num_used,
            kv_blocks_total=self.kv.pool.num_blocks,
            kv_tokens_total=self._kv_tokens,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            prefix_state_misses=self.kv.states.missed_tokens,
            preemptions=scheduler.num_preemptions,
            steps=self._num_steps,
            decode_steps=self._num_decode_steps,
            requests=self._num_requests,
            kv_unused_slots=self.kv.num_unused_slots,
            graph_replays=self._runner.graph_replays,
            padded_tokens=self._runner.padded_tokens,
            step_seconds=self.clock.read(self._runner.device_clock),
        )
