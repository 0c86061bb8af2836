"""The state machine finds planted bugs: each of these breaks one line of the engine, as others have.

That it finds nothing where nothing is planted is `test_state_machine`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from fakes import Misuse
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from test_state_machine import MACHINES

from microvllm.runtime.core.drafts import Drafts
from microvllm.runtime.core.kv_cache import NO_BLOCK, BlockPool, KVCacheManager, LayerGroup
from microvllm.runtime.core.plan import Request, ScheduledRequest, StepPlan, StepResult
from microvllm.runtime.core.pool_audit import BrokenPoolError
from microvllm.runtime.core.prefix_keys import PrefixKeys
from microvllm.runtime.core.scheduler import Scheduler
from microvllm.runtime.request import FinishReason, StepOutput

MAX_EXAMPLES = 1500
SETTINGS = settings(
    max_examples=MAX_EXAMPLES,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    print_blob=False,
    verbosity=Verbosity.quiet,
    suppress_health_check=list(HealthCheck),
)
# Of bugs that the draws of all others find late. A seed finds them at once, or as late as before.
SEEDS = {
    "count_an_idle_prefix_as_available": 3,
    "an_aborted_request_is_followed_for_ever": 3,
    "preempt_in_flight": 1,
    "offer_blocks_before_their_tokens_are_known": 1,
    "blocks_behind_a_window_are_kept": 7,
    "blocks_run_out_for_the_last_group": 5,
    "rejected_drafts_keep_their_blocks": 3,
    "drafts_go_beyond_the_last_token": 2,
    "a_block_of_drafts_is_offered": 0,
    "a_reused_id_meets_its_predecessor": 8,
    "a_preempted_request_forgets_its_tokens": 5,
    "evict_a_referenced_block": 3,
    "reset_loses_the_cached_blocks": 0,
    "abort_keeps_the_blocks": 1,
    "a_preempted_request_goes_to_the_end": 6,
    "key_without_its_parent": 0,
}
# How an engine fails that is broken inside; a TypeError would be a mistake in the mutation itself.
FAILURES = (Misuse, BrokenPoolError, AssertionError, KeyError, IndexError)

Mutation = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: dict[str, tuple[str, Mutation]] = {}


def mutation(mode: str) -> Callable[[Mutation], Mutation]:
    """Register a planted bug that the state machine must find in this mode."""

    def register(plant: Mutation) -> Mutation:
        MUTATIONS[plant.__name__] = (mode, plant)
        return plant

    return register


# ---- the block pool --------------------------------------------------------------------------------


@mutation("sync")
def skip_one_decref(patch: pytest.MonkeyPatch) -> None:
    free = KVCacheManager.free

    def mutant(self: KVCacheManager, seq_id: int) -> None:
        self._tables[seq_id].blocks[0].pop()
        free(self, seq_id)

    patch.setattr(KVCacheManager, "free", mutant)


@mutation("sync")
def forget_the_salt(patch: pytest.MonkeyPatch) -> None:
    keys = KVCacheManager.prefix_keys
    patch.setattr(KVCacheManager, "prefix_keys", lambda self, token_ids, salt: keys(self, token_ids, ""))


@mutation("sync")
def hash_one_token_too_many(patch: pytest.MonkeyPatch) -> None:
    offer = KVCacheManager.cache_blocks
    patch.setattr(
        KVCacheManager, "cache_blocks", lambda self, seq, keys, num: offer(self, seq, keys, num + 1)
    )


@mutation("sync")
def key_without_its_parent(patch: pytest.MonkeyPatch) -> None:
    upto = PrefixKeys.upto

    def mutant(self: PrefixKeys, num_blocks: int) -> list[bytes]:
        while len(self._keys) <= num_blocks:
            tokens = self.token_ids[(len(self._keys) - 1) * self._block_size :]
            rest = PrefixKeys(tokens, self._block_size, self._keys[0])
            self._keys.append(upto(rest, 1)[0])
        return self._keys[1 : num_blocks + 1]

    patch.setattr(PrefixKeys, "upto", mutant)


@mutation("sync")
def match_the_whole_prompt(patch: pytest.MonkeyPatch) -> None:
    match = KVCacheManager.match_prefix
    patch.setattr(
        KVCacheManager, "match_prefix", lambda self, keys, num_tokens: match(self, keys, num_tokens + 1)
    )


@mutation("sync")
def evict_a_referenced_block(patch: pytest.MonkeyPatch) -> None:
    alloc = KVCacheManager.alloc

    def mutant(self: KVCacheManager, seq_id: int, num_tokens: int, prefix: list[list[int]]) -> bool:
        done = alloc(self, seq_id, num_tokens, prefix)
        self.pool.cached.update(dict.fromkeys(block for block in prefix[0] if block != NO_BLOCK))
        return done

    patch.setattr(KVCacheManager, "alloc", mutant)
    patch.setattr(KVCacheManager, "check", lambda self: None)  # found by its effect, not by the audit


@mutation("sync")
def evict_a_block_and_keep_its_key(patch: pytest.MonkeyPatch) -> None:
    take = BlockPool.take

    def mutant(self: BlockPool) -> int:
        named = [(index, key, index[key]) for index, key in self.entry_of.values()]
        block = take(self)
        for index, key, old in named:
            index[key] = old
        return block

    patch.setattr(BlockPool, "take", mutant)
    patch.setattr(KVCacheManager, "check", lambda self: None)


@mutation("sync")
def count_an_idle_prefix_as_available(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: KVCacheManager, num_tokens: int, prefix: list[list[int]]) -> bool:
        return self._blocks_for(num_tokens) - len(prefix[0]) <= self.num_available

    patch.setattr(KVCacheManager, "can_hold", mutant)


@mutation("sync")
def one_block_too_few(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCacheManager, "_blocks_for", lambda self, num_tokens: num_tokens // self.block_size)


@mutation("sync")
def reset_loses_the_cached_blocks(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: BlockPool) -> None:
        self.entry_of.clear()
        self.cached.clear()

    patch.setattr(BlockPool, "forget", mutant)


# ---- windows ---------------------------------------------------------------------------------------


@mutation("windows")
def a_window_is_one_token_short(patch: pytest.MonkeyPatch) -> None:
    seen = LayerGroup.first_seen
    patch.setattr(LayerGroup, "first_seen", lambda self, position: seen(self, position + 1))


@mutation("async")
def a_block_goes_back_a_step_too_early(patch: pytest.MonkeyPatch) -> None:
    """By what is scheduled, not by what is committed: the step in flight still reads it."""
    advance = Scheduler._advance

    def mutant(self: Scheduler, request: Request, num_new: int, first_block: int | None = None) -> Any:
        item = advance(self, request, num_new, first_block)
        for group, blocks in zip(self.kv.groups, self.kv._tables[request.seq_id].blocks, strict=True):
            first = group.first_seen(request.num_computed)
            self.kv.pool.release(block for block in blocks[:first] if block != NO_BLOCK)
            blocks[:first] = [NO_BLOCK] * first
        return item

    patch.setattr(Scheduler, "_advance", mutant)
    patch.setattr(KVCacheManager, "check", lambda self: None)


@mutation("windows")
def blocks_behind_a_window_are_kept(patch: pytest.MonkeyPatch) -> None:
    cache = KVCacheManager.cache_blocks

    def mutant(self: KVCacheManager, seq_id: int, keys: PrefixKeys, num_computed: int) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(LayerGroup, "first_seen", lambda self, position: 0)
            cache(self, seq_id, keys, num_computed)

    patch.setattr(KVCacheManager, "cache_blocks", mutant)
    patch.setattr(KVCacheManager, "check", lambda self: None)


@mutation("windows")
def the_first_group_alone_decides_a_hit(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: KVCacheManager, keys: PrefixKeys, num_tokens: int) -> list[list[int]]:
        found = keys.upto((num_tokens - 1) // self.block_size) if self.enable_prefix_caching else []
        found = found[: self.groups[0].longest_hit(found)]
        first = self.groups[0].hit(found)
        return [first, *([0] * len(first) for _ in self.groups[1:])]

    patch.setattr(KVCacheManager, "match_prefix", mutant)
    patch.setattr(KVCacheManager, "check", lambda self: None)


@mutation("windows")
def a_hit_covers_a_token_less_than_the_window(patch: pytest.MonkeyPatch) -> None:
    longest, hit, seen = LayerGroup.longest_hit, LayerGroup.hit, LayerGroup.first_seen

    def narrow(find: Callable[..., Any]) -> Callable[..., Any]:
        def mutant(self: LayerGroup, keys: list[bytes]) -> Any:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(LayerGroup, "first_seen", lambda self, at: seen(self, at + 1))
                return find(self, keys)

        return mutant

    patch.setattr(LayerGroup, "longest_hit", narrow(longest))
    patch.setattr(LayerGroup, "hit", narrow(hit))
    patch.setattr(KVCacheManager, "check", lambda self: None)


@mutation("windows")
def blocks_run_out_for_the_last_group(patch: pytest.MonkeyPatch) -> None:
    """A column takes a block for each group, not one for all."""
    patch.setattr(KVCacheManager, "num_available", property(lambda self: self.pool.num_available))


@mutation("windows")
def a_block_of_a_group_is_another_s(patch: pytest.MonkeyPatch) -> None:
    """Two groups write the same block, in other layers' memory."""
    append = KVCacheManager.append

    def mutant(self: KVCacheManager, seq_id: int, num_tokens: int = 1) -> bool:
        done = append(self, seq_id, num_tokens)
        first, second, *_ = self._tables[seq_id].blocks
        second[-1:] = first[-1:]
        return done

    patch.setattr(KVCacheManager, "append", mutant)
    patch.setattr(KVCacheManager, "check", lambda self: None)


@mutation("windows")
def a_hit_of_a_group_is_another_s(patch: pytest.MonkeyPatch) -> None:
    """All groups find their blocks by the same keys: what one of them has computed is no use to another."""
    init = LayerGroup.__init__

    def mutant(self: LayerGroup, pool: BlockPool, *args: Any) -> None:
        init(self, pool, *args)
        self.block_of = vars(pool).setdefault("block_of", self.block_of)

    patch.setattr(LayerGroup, "__init__", mutant)
    patch.setattr(KVCacheManager, "check", lambda self: None)


@mutation("windows")
def a_sequence_is_admitted_for_its_window_alone(patch: pytest.MonkeyPatch) -> None:
    """Without room for the step: it would run out of blocks half way."""
    init = LayerGroup.__init__

    def mutant(self: LayerGroup, *args: Any) -> None:
        init(self, *args)
        if self.window is not None:
            self.most_held = -(-self.window // self.pool.block_size)

    patch.setattr(LayerGroup, "__init__", mutant)


@mutation("drafts")
def windows_follow_drafts_that_are_rejected(patch: pytest.MonkeyPatch) -> None:
    cache = KVCacheManager.cache_blocks

    def mutant(self: KVCacheManager, seq_id: int, keys: PrefixKeys, num_computed: int) -> None:
        cache(self, seq_id, keys, num_computed)
        table = self._tables[seq_id]
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            first = group.first_seen(table.num_tokens)
            self.pool.release(block for block in blocks[:first] if block != NO_BLOCK)
            blocks[:first] = [NO_BLOCK] * first

    patch.setattr(KVCacheManager, "cache_blocks", mutant)
    patch.setattr(KVCacheManager, "check", lambda self: None)


# ---- the scheduler ---------------------------------------------------------------------------------


@mutation("sync")
def drop_the_budget(patch: pytest.MonkeyPatch) -> None:
    chunk = Scheduler._chunk
    patch.setattr(Scheduler, "_chunk", lambda self, *args: chunk(self, *args[:-1], 1000))


@mutation("sync")
def split_what_may_not_be_split(patch: pytest.MonkeyPatch) -> None:
    chunk = Scheduler._chunk

    def mutant(self: Scheduler, request: Request, start: int, missing: int, budget: int) -> int:
        limit = self._config.long_prefill_token_threshold or budget
        return min(chunk(self, request, start, missing, budget), limit)

    patch.setattr(Scheduler, "_chunk", mutant)


@mutation("sync")
def wrong_first_block(patch: pytest.MonkeyPatch) -> None:
    advance = Scheduler._advance

    def mutant(self: Scheduler, request: Request, num_new: int, first_block: int | None = None) -> Any:
        item = advance(self, request, num_new, first_block)
        return msgspec.structs.replace(item, first_block=item.start // self.kv.block_size)

    patch.setattr(Scheduler, "_advance", mutant)


@mutation("sync")
def row_not_cleared_on_reuse(patch: pytest.MonkeyPatch) -> None:
    schedule = Scheduler.schedule

    def mutant(self: Scheduler) -> StepPlan | None:
        plan = schedule(self)
        return plan and dataclasses.replace(plan, released_rows=())

    patch.setattr(Scheduler, "schedule", mutant)


@mutation("sync")
def a_preempted_request_forgets_its_tokens(patch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt

    def mutant(self: Scheduler, request: Request) -> None:
        del request.token_ids[request.prompt_len :]
        preempt(self, request)

    patch.setattr(Scheduler, "_preempt", mutant)


@mutation("sync")
def a_preempted_request_goes_to_the_end(patch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt

    def mutant(self: Scheduler, request: Request) -> None:
        preempt(self, request)
        self._arrivals += 1
        self._waiting.remove(request)
        request.order = (request.order[0], self._arrivals)
        self._waiting.append(request)

    patch.setattr(Scheduler, "_preempt", mutant)


@mutation("sync")
def preempt_the_oldest(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Scheduler, request: Request, num_new: int) -> bool:
        while not self.kv.append(request.seq_id, num_new):
            self._short_of_blocks = True
            victim = self._running[0]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    patch.setattr(Scheduler, "_make_room", mutant)


@mutation("sync")
def an_aborted_request_stays_in_the_queue(patch: pytest.MonkeyPatch) -> None:
    abort = Scheduler.abort

    def mutant(self: Scheduler, request_id: int, reason: FinishReason = FinishReason.ABORT) -> bool:
        request = self._requests.get(request_id)
        done = abort(self, request_id, reason)
        if request is not None and request.row < 0:
            self._enter(self._waiting, request)
        return done

    patch.setattr(Scheduler, "abort", mutant)


@mutation("sync")
def an_aborted_request_is_followed_for_ever(patch: pytest.MonkeyPatch) -> None:
    abort = Scheduler.abort

    def mutant(self: Scheduler, request_id: int, reason: FinishReason = FinishReason.ABORT) -> bool:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Scheduler, "_let_follow", lambda self, request: None)
            return abort(self, request_id, reason)

    patch.setattr(Scheduler, "abort", mutant)


@mutation("sync")
def abort_keeps_the_blocks(patch: pytest.MonkeyPatch) -> None:
    abort = Scheduler.abort

    def mutant(self: Scheduler, request_id: int, reason: FinishReason = FinishReason.ABORT) -> bool:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.kv, "free", lambda seq_id: None)
            return abort(self, request_id, reason)

    patch.setattr(Scheduler, "abort", mutant)


@mutation("sync")
def min_tokens_mask_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "end_ids", frozenset())


@mutation("sync")
def stop_at_length_one_token_late(patch: pytest.MonkeyPatch) -> None:
    init = Request.__init__

    def mutant(self: Request, *args: Any) -> None:
        init(self, *args)
        self.max_tokens += 1

    patch.setattr(Request, "__init__", mutant)


@mutation("sync")
def no_logits_is_a_token(patch: pytest.MonkeyPatch) -> None:
    take = Scheduler._take_tokens

    def mutant(self: Scheduler, request: Request, index: int, result: StepResult) -> StepOutput:
        tokens = [[max(token, 0) for token in each] for each in result.tokens]
        return take(self, request, index, dataclasses.replace(result, tokens=tokens))

    patch.setattr(Scheduler, "_take_tokens", mutant)


# ---- only with a step in flight --------------------------------------------------------------------


@mutation("async")
def free_before_the_last_step_in_flight(patch: pytest.MonkeyPatch) -> None:
    finish, release = Scheduler._finish, Scheduler._release

    def early(self: Scheduler, request: Request, reason: FinishReason) -> None:
        finish(self, request, reason)
        self._release(request)

    def once(self: Scheduler, request: Request) -> None:
        if request.row >= 0:
            release(self, request)

    patch.setattr(Scheduler, "_finish", early)
    patch.setattr(Scheduler, "_release", once)


@mutation("async")
def do_not_skip_finished(patch: pytest.MonkeyPatch) -> None:
    missing = Request.num_missing.fget
    assert missing is not None

    def mutant(self: Request) -> int:
        reason, self.finish_reason = self.finish_reason, None
        try:
            return missing(self)
        finally:
            self.finish_reason = reason

    patch.setattr(Request, "num_missing", property(mutant))


@mutation("async")
def preempt_in_flight(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Scheduler, request: Request, num_new: int) -> bool:
        while not self.kv.append(request.seq_id, num_new):
            self._short_of_blocks = True
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    patch.setattr(Scheduler, "_make_room", mutant)


@mutation("async")
def a_step_after_the_last_token(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Request) -> int:
        return 0 if self.finish_reason is not None else self.num_tokens - self.num_computed

    patch.setattr(Request, "num_missing", property(mutant))


@mutation("async")
def offer_blocks_before_their_tokens_are_known(patch: pytest.MonkeyPatch) -> None:
    advance = Scheduler._advance

    def mutant(
        self: Scheduler, request: Request, num_new: int, first_block: int | None = None
    ) -> ScheduledRequest:
        item = advance(self, request, num_new, first_block)
        self.kv.cache_blocks(request.seq_id, request.keys, request.num_computed)
        return item

    patch.setattr(Scheduler, "_advance", mutant)


@mutation("async")
def a_reused_id_meets_its_predecessor(patch: pytest.MonkeyPatch) -> None:
    init = Request.__init__

    def mutant(self: Request, *args: Any) -> None:
        init(self, *args)
        self.seq_id = self.id

    patch.setattr(Request, "__init__", mutant)


@mutation("async")
def the_token_of_an_ended_request_is_delivered(patch: pytest.MonkeyPatch) -> None:
    commit = Scheduler.commit

    def mutant(self: Scheduler, plan: StepPlan, result: StepResult) -> list[StepOutput]:
        ended = [
            StepOutput(item.request.id, list(tokens), None)
            for item, tokens in zip(plan.scheduled, result.tokens, strict=True)
            if item.samples and item.request.finish_reason is not None
        ]
        return commit(self, plan, result) + ended

    patch.setattr(Scheduler, "commit", mutant)


# ---- only with drafts ------------------------------------------------------------------------------


@mutation("drafts")
def rejected_drafts_stay_computed(patch: pytest.MonkeyPatch) -> None:
    settle = Drafts.settle
    patch.setattr(Drafts, "settle", lambda self, request, num: settle(self, request, num - 1))


@mutation("drafts")
def rejected_drafts_keep_their_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCacheManager, "shrink", lambda self, seq_id, num_tokens: None)


@mutation("drafts")
def a_block_of_drafts_is_offered(patch: pytest.MonkeyPatch) -> None:
    offer = KVCacheManager.cache_blocks

    def mutant(self: KVCacheManager, seq_id: int, keys: PrefixKeys, num_computed: int) -> None:
        offer(self, seq_id, keys, self._tables[seq_id].num_tokens)

    patch.setattr(KVCacheManager, "cache_blocks", mutant)


@mutation("drafts")
def drafts_go_beyond_the_last_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Drafts, "trim", lambda self, request, spare: len(request.drafts))


@mutation("drafts")
def tokens_behind_a_stop_are_delivered(patch: pytest.MonkeyPatch) -> None:
    take = Scheduler._take_tokens

    def mutant(self: Scheduler, request: Request, index: int, result: StepResult) -> StepOutput:
        output = take(self, request, index, result)
        return msgspec.structs.replace(output, token_ids=list(result.tokens[index]))

    patch.setattr(Scheduler, "_take_tokens", mutant)


# ---- the hunt --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, plant = MUTATIONS[name]
    plant(monkeypatch)
    machine = MACHINES[mode]
    if name in SEEDS:
        machine = seed(SEEDS[name])(type(machine.__name__, (machine,), {}))
    with pytest.raises(FAILURES):
        run_state_machine_as_test(machine, settings=SETTINGS)
