"""Continuous batching on a token budget. Imports no torch.

The one rule: a request has `num_tokens` (known + in flight) and `num_computed`; each step hands out
budget so that computed catches up. There is no prefill phase and no decode phase: a decode is a
request with one token to compute. Chunked prefill, prefix hits and preemption are the same rule
(after vLLM v1's scheduler).

`schedule()` only needs lengths, so step k+1 may be scheduled while step k runs; `commit()` brings the
tokens of a step when they are known. Three rules make that safe:

  * a request with a step in flight is not preempted: the step is awaited first;
  * the row and the blocks of a finished request are freed at the commit of its last step in flight;
  * blocks are offered to the prefix cache in `commit()`, when all their tokens are known.

A prompt that several requests share, as the `n` samples of one do, is computed once: those that come while
the first computes it follow it, out of the queue, until its blocks are in the prefix cache. Without prefix
caching each computes the prompt itself.

This file decides how many tokens of which request a step computes, and when a request ends. Keep everything
else out; rare features belong in the modules below: the order of requests in `policies.py`, blocks in
`kv_cache.py`, proposed tokens in `drafts.py`, and what changes tokens but not their number in the worker. A
new kind of step is no new phase here: it is a number of tokens to compute.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.deadlines import Deadlines
from microvllm.runtime.core.drafts import Drafter, Drafts
from microvllm.runtime.core.kv_cache import KVCacheManager
from microvllm.runtime.core.no_token import why_no_token, withdraw_prefix
from microvllm.runtime.core.plan import NO_TOKEN, Request, ScheduledRequest, StepPlan, StepResult
from microvllm.runtime.core.policies import POLICIES
from microvllm.runtime.core.repetition import repeats
from microvllm.runtime.errors import EngineBusyError, InvalidRequestError
from microvllm.runtime.grammar.masks import GrammarMasks
from microvllm.runtime.request import EngineRequest, FinishReason, StepOutput


class Scheduler:
    """Decides what each step computes. `add` and `abort` may be called between any two calls.

    A request is in one list at a time, sorted by its order: waiting, following another one, or running.
    """

    def __init__(
        self, config: EngineConfig, kv: KVCacheManager, masks: GrammarMasks, drafter: Drafter | None = None
    ) -> None:
        self.kv = kv
        self.drafts = Drafts(kv, drafter)
        self._masks = masks
        self._config = config
        self._policy = POLICIES[config.scheduling_policy]()
        self._requests: dict[int, Request] = {}  # waiting and running
        self._waiting: list[Request] = []
        self._following: dict[bytes, list[Request]] = {}  # by what the running request `leads`
        self._running: list[Request] = []
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._released_rows: list[int] = []  # since the last plan
        self._arrivals = 0
        self._deadlines = Deadlines(config.queue_timeout, config.request_timeout)
        self._short_of_blocks = False  # whether the last step lacked blocks for a running request
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._following.values()))

    def has_work(self) -> bool:
        return bool(self._requests or self._running)

    # ---- add and abort -------------------------------------------------------------------------

    def add(self, source: EngineRequest, like: Request | None = None) -> Request:
        """Queue a request. Raises `RequestError` for one that could never be served, or a full queue.

        `like` was just added for the same prompt with the same parameters: it has passed the checks, and what
        was derived from its prompt is shared.
        """
        config = self._config
        if source.request_id in self._requests:
            raise InvalidRequestError(f"request id {source.request_id} is already in use", "request_id")
        if like is None:
            self._check(source)
        limit = config.max_num_queued_reqs
        if limit is not None and self.num_waiting - len(self._free_rows) >= limit:
            raise EngineBusyError("The engine is currently busy and cannot accept new requests.")
        self._arrivals += 1
        order = (self._policy.rank(source), self._arrivals)
        if like is None:
            keys = self.kv.prefix_keys(source.prompt_token_ids, source.cache_salt)
            request = Request(source, order, keys, frozenset(source.stop_token_ids))
        else:
            request = Request(source, order, like.keys, like.stop_ids)
        self._requests[request.id] = request
        self._deadlines.add(request)
        self._enter(self._waiting, request)
        return request

    def _check(self, source: EngineRequest) -> None:
        """Refuse what could never be scheduled. Token ids are `InputProcessor`'s to check."""
        tokens, config = source.prompt_token_ids, self._config
        fewest = 1 if config.spec.pooling is None else 0  # a vector needs no room for a token
        if not tokens or not fewest <= (source.params.max_tokens or 0) <= config.max_model_len - len(tokens):
            raise InvalidRequestError(
                f"a prompt of {len(tokens)} tokens and {source.params.max_tokens} output tokens do not fit "
                f"the context of {config.max_model_len} tokens",
                "prompt",
            )

    def abort(self, request_id: int, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request at once, at any moment; False if it is unknown or already finished."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, reason)
        return True

    def expire(self) -> list[StepOutput]:
        """End requests that waited or took too long: see `Deadlines`."""
        outputs: list[StepOutput] = []
        for request, reason in self._deadlines.passed():
            self._finish(request, reason)
            outputs.append(StepOutput(request.id, [], reason, num_preemptions=request.num_preemptions))
        return outputs

    # ---- one step ------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Hand out this step's token budget; None when nothing can be computed now.

        Running requests come before waiting ones, and each eligible one gets at least one token: a prompt
        takes what the others leave of the budget. When blocks run out the newest running request is
        preempted: it gives its blocks back and is computed again later.
        """
        budget = self._config.max_num_batched_tokens  # at least one for every row
        scheduled: list[ScheduledRequest] = []
        # While blocks are short every request is eligible, the oldest first: one that was denied blocks is
        # the next to get them, which the policy's choice could put off indefinitely.
        eligible = self._running if self._short_of_blocks else self._policy.eligible(self._running)
        self._short_of_blocks = False
        for index, request in enumerate(eligible):
            if request.row < 0:
                break  # preempted for an older one, as were all after it
            missing = request.num_missing
            if missing <= 0:
                continue
            if request.source.grammar and not self._masks.ready(request.row, request.num_in_flight):
                continue
            spare = budget - (len(eligible) - index)  # beyond a token for each of those that are left
            num_new = 1 if missing == 1 else self._chunk(request, request.num_computed, missing, spare + 1)
            if request.drafts:
                num_new += self.drafts.trim(request, spare)
            if not self._make_room(request, num_new):
                break  # it was preempted, or blocks come free when the steps in flight are committed
            scheduled.append(self._advance(request, num_new))
            budget -= num_new
        admitted = [] if self._short_of_blocks else self._admit(budget, scheduled)
        if not scheduled:
            return None
        released, self._released_rows = tuple(self._released_rows), []
        return StepPlan(released, tuple(admitted), tuple(scheduled), *self.kv.states.copies())

    def commit(self, plan: StepPlan, result: StepResult) -> list[StepOutput]:
        """Add a step's tokens to its requests. Plans are committed in the order of `schedule`."""
        outputs: list[StepOutput] = []
        for index, (item, tokens) in enumerate(zip(plan.scheduled, result.tokens, strict=True)):
            # KV behind non-finite logits may be corrupt; do not cache it.
            request, is_sound = item.request, not item.samples or NO_TOKEN not in tokens
            if not self._land(item, is_sound):
                continue
            if is_sound:
                known = item.start + item.num_new - item.num_draft_tokens
                self.kv.cache_blocks(request.seq_id, request.keys, known)
            if index in result.prompt_logprobs:
                request.prompt_logprobs += result.prompt_logprobs[index]
                request.num_prompt_logprobs = len(request.prompt_logprobs)
            if item.samples:
                self._let_follow(request)
                outputs.append(self._take_tokens(request, index, result))
                if item.num_draft_tokens:
                    self.drafts.settle(request, 1 + item.num_draft_tokens - len(tokens))
        return outputs

    def fail(self, plan: StepPlan, message: str) -> list[StepOutput]:
        """Give up a step that could not be launched, and every request in it."""
        outputs: list[StepOutput] = []
        for item in plan.scheduled:
            if self._land(item, is_sound=False):
                self._finish(item.request, FinishReason.ERROR)
                outputs.append(StepOutput(item.request.id, [], FinishReason.ERROR, error=message))
        return outputs

    # ---- the parts of a step -------------------------------------------------------------------

    def _chunk(self, request: Request, start: int, missing: int, budget: int) -> int:
        """How many of a request's missing tokens, from `start` on, one step computes."""
        limit = self._config.long_prefill_token_threshold
        if limit and self._config.enable_chunked_prefill:  # else a longer prompt would never be scheduled
            budget = min(budget, limit)
        num_new = min(missing, budget)
        return self.kv.states.cut(request, start, num_new) if self._config.enable_chunked_prefill else num_new

    def _make_room(self, request: Request, num_new: int) -> bool:
        """Take blocks for `num_new` more tokens, by preemption if need be; False if there are none."""
        while not self.kv.append(request.seq_id, num_new):
            self._short_of_blocks = True
            victim = self._running[-1]
            if victim.steps_in_flight:
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _admit(self, budget: int, scheduled: list[ScheduledRequest]) -> list[Request]:
        """Start waiting requests, in their order, with what is left of the budget.

        One whose prompt a running request computes follows that; the first without room ends the round.
        """
        admitted: list[Request] = []
        while budget > 0 and self._free_rows and self._waiting:
            request = self._waiting[0]
            # What is in the cache is not computed, so it would have no log probabilities.
            whole = request.params.prompt_logprobs is not None
            key = self.kv.last_key(request.keys, request.num_tokens)
            followers = None if whole or key is None else self._following.get(key)
            if followers is not None:
                self._enter(followers, request)
                continue
            prefix = self.kv.match_prefix(request.keys, 0 if whole else request.num_tokens)
            num_cached = len(prefix[0]) * self.kv.block_size
            missing = request.num_tokens - num_cached
            num_new = self._chunk(request, num_cached, missing, budget)
            if not self._config.enable_chunked_prefill and num_new < missing:
                break
            # Room for all of its known tokens, not only for this chunk: otherwise several long prompts
            # are admitted together, run out of blocks half way, and preempt each other in turn.
            if not self.kv.can_hold(request.num_tokens, prefix):
                break
            self.kv.alloc(request.seq_id, num_cached + num_new, prefix)
            self._enter(self._running, request)
            request.row = self._free_rows.pop()
            request.num_computed = num_cached
            self.kv.states.restore(request)
            if request.num_cached is None:  # a preempted request hits its own blocks: not a reuse to count
                request.num_cached = num_cached
                request.scheduled_at = time.monotonic()
            if key is not None and missing > self.kv.block_size and key not in self._following:
                request.leads, self._following[key] = key, []
            admitted.append(request)
            scheduled.append(self._advance(request, num_new, first_block=0))
            budget -= num_new
        return admitted

    def _advance(self, request: Request, num_new: int, first_block: int | None = None) -> ScheduledRequest:
        """Count `num_new` tokens as computed, before they are: lengths run ahead of values."""
        start = request.num_computed
        if first_block is None:
            first_block = -(-start // self.kv.block_size)
        blocks = self.kv.blocks_from(request.seq_id, first_block)
        request.num_computed += num_new
        request.steps_in_flight += 1
        num_drafts = len(request.drafts)
        samples = request.num_computed == len(request.token_ids) + request.num_in_flight + num_drafts
        request.num_in_flight += samples
        if self.kv.states.rows:
            self.kv.states.keep(request)
        return ScheduledRequest(request, start, num_new, samples, first_block, blocks, num_drafts)

    def _land(self, item: ScheduledRequest, is_sound: bool) -> bool:
        """Count an entry of a step in flight as done; False if its request has ended: its token is void."""
        request = item.request
        request.steps_in_flight -= 1
        request.num_in_flight -= item.samples
        is_alive = request.finish_reason is None
        if self.kv.states.rows:
            self.kv.states.settle(item, is_known=is_alive and is_sound)
        if not is_alive and request.steps_in_flight == 0:
            self._release(request)
        return is_alive

    def _take_tokens(self, request: Request, index: int, result: StepResult) -> StepOutput:
        """Append what was chosen, up to a token that ends the request; a vector ends it without a token."""
        tokens, logprobs, pooled = result.tokens[index], result.logprobs.get(index), result.pooled.get(index)
        if NO_TOKEN in tokens:
            message, param = why_no_token(request, self._masks)
            if param is None:  # not what the request asks for: its prefix may be corrupt
                withdraw_prefix(self.kv, request)
            self._finish(request, FinishReason.ERROR)
            return StepOutput(request.id, [], FinishReason.ERROR, error=message, param=param)
        is_first = request.num_output == 0
        if is_first:  # from here on it differs from the other samples of its prompt
            request.token_ids = request.token_ids.copy()
            request.keys = request.keys.fork(request.token_ids)
        token_ids, first = request.token_ids, len(request.token_ids)
        reason, stop_reason = None if pooled is None else FinishReason.STOP, None
        for token in tokens:
            token_ids.append(token)
            reason, stop_reason = self._why_stop(request, token)
            if reason is not None:
                break
        if reason is not None:
            self._finish(request, reason)
        taken = token_ids[first:]
        has_prompt = is_first and request.params.prompt_logprobs is not None
        output = StepOutput(
            request.id,
            taken,
            reason,
            stop_reason,
            request.num_cached or 0,
            logprobs=None if logprobs is None else list(logprobs[: len(taken)]),
            prompt_logprobs=request.prompt_logprobs if has_prompt else None,
            scheduled_at=request.scheduled_at,
            num_preemptions=request.num_preemptions,
            pooled=pooled,
        )
        request.scheduled_at = None
        return output

    def _why_stop(self, request: Request, token: int) -> tuple[FinishReason | None, int | None]:
        num_output, params = request.num_output, request.params
        if num_output >= params.min_tokens:
            if token == request.source.eos_token_id:
                return FinishReason.STOP, None
            if token in request.stop_ids:
                return FinishReason.STOP, token
        if num_output >= request.max_tokens:
            return FinishReason.LENGTH, None
        if params.repetition_detection is not None and repeats(request):
            return FinishReason.REPETITION, None
        return None, None

    # ---- where a request is: waiting, following, running, or gone ------------------------------

    def _enter(self, queue: list[Request], request: Request) -> None:
        """Put a request into a list, out of that which it was in."""
        self._leave(request)
        insort(queue, request)
        request.queue = queue

    def _leave(self, request: Request) -> None:
        if request.queue:
            del request.queue[bisect_left(request.queue, request)]
            request.queue = []

    def _let_follow(self, request: Request) -> None:
        """Queue the requests again that have waited for this one's blocks, each at its old place."""
        if request.leads is not None:
            followers, request.leads = self._following.pop(request.leads), None
            for follower in followers:
                follower.queue = self._waiting
            # Merges two sorted runs: to insert one after the other would be quadratic.
            self._waiting[:] = sorted(self._waiting + followers)

    def _preempt(self, request: Request) -> None:
        """Give back row and blocks and wait again, at the old place in the queue."""
        self._let_follow(request)
        self._release(request)
        request.num_computed, request.drafts = 0, ()
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enter(self._waiting, request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        self._let_follow(request)
        del self._requests[request.id]
        if request.row < 0:
            self._leave(request)
        elif request.steps_in_flight == 0:
            self._release(request)

    def _release(self, request: Request) -> None:
        """Give blocks and row back; the runner zeroes the row with the next plan."""
        self.kv.free(request.seq_id)
        self._leave(request)
        self._free_rows.append(request.row)
        self._released_rows.append(request.row)
        request.row = -1
