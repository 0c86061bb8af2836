"""A fake model: its next token is a hash of the whole context, read back through simulated KV memory.

Any wrong KV slot, position, prefix hit, preemption or row reuse therefore shows as a wrong token, and
what would be silent corruption on a GPU (a write into a shared block, a row used twice) is a `Misuse`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec

from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.rope_spec import RopeSpec
from microvllm.adapters.spec import Attention, LayerSpec, ModelSpec
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.drafts import Drafter
from microvllm.runtime.core.engine_core import EngineCore, StepInFlight
from microvllm.runtime.core.plan import NO_TOKEN, Request, ScheduledRequest, StepPlan, StepResult
from microvllm.runtime.grammar.masks import GrammarMasks
from microvllm.runtime.rank_layout import rank_layout
from microvllm.runtime.request import EngineRequest, FinishReason, SamplingParams, StepOutput
from microvllm.runtime.worker.step_times import StepClock

VOCAB = 24
EOS = 2
NO_BLOCK = -1


class Misuse(Exception):
    """The engine gave the runner a plan that would corrupt memory or compute the wrong thing."""


class Answer(NamedTuple):
    """All that one request gave; `num_cached` is what its first output said."""

    tokens: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached: int = 0

    def same_text(self, other: Answer) -> bool:
        """Equal in everything but where the prompt's keys and values came from."""
        return self[:3] == other[:3]


def next_token(context: Sequence[int], banned: Collection[int | None] = ()) -> int:
    """The fake model: a token that depends on every token of the context and on their order."""
    allowed = [token for token in range(VOCAB) if token not in banned] if banned else range(VOCAB)
    return allowed[hash(tuple(context)) % len(allowed)]


def run_alone(request: EngineRequest) -> Answer:
    """The oracle: what the request must give, without any engine."""
    limits = request.params.min_tokens, request.params.max_tokens
    return _run_alone(
        tuple(request.prompt_token_ids), request.eos_token_id, tuple(request.stop_token_ids), *limits
    )


@lru_cache(1 << 14)
def _run_alone(
    prompt: tuple[int, ...], eos: int | None, stop_ids: tuple[int, ...], min_tokens: int, max_tokens: int
) -> Answer:
    context, output = list(prompt), list[int]()
    while True:
        token = next_token(context, (*stop_ids, eos) if len(output) < min_tokens else ())
        context.append(token)
        output.append(token)
        if len(output) >= min_tokens and token == eos:
            return Answer(output, FinishReason.STOP)
        if len(output) >= min_tokens and token in stop_ids:
            return Answer(output, FinishReason.STOP, token)
        if len(output) == max_tokens:
            return Answer(output, FinishReason.LENGTH)


def make_config(**overrides: Any) -> EngineConfig:
    """A small engine: pool of 64 blocks of 4 tokens, 8 rows, 32 tokens a step, context of 64.

    windows: of a layer each; there are as many blocks as one sequence holds, and `spare_blocks`, if given.
    """
    spare = overrides.pop("spare_blocks", None)
    attention = Attention(num_heads=1, num_kv_heads=1, head_dim=8, rope=RopeSpec())
    layer = LayerSpec(mixer=attention, mlp=MLP(size=8))
    spec = ModelSpec(
        architecture="fake",
        vocab_size=VOCAB,
        hidden_size=8,
        layers=tuple(layer.with_mixer(window=window) for window in overrides.pop("windows", (None,))),
        max_position=1024,
        rms_norm_eps=1e-5,
    )
    config = EngineConfig(
        model="fake",
        model_path="",
        tokenizer_path="",
        spec=spec,
        load_format="dummy",
        dtype="float32",
        kv_dtype="float32",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=4,
        num_blocks=64,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        long_prefill_token_threshold=0,
        scheduling_policy="fcfs",
        async_scheduling=False,
        max_num_queued_reqs=None,
        seed=0,
        attention_backend="torch",
        cpu_threads=1,
    )
    config = msgspec.structs.replace(config, **overrides)
    layout, needed = rank_layout(config), config.max_model_len
    if spare is not None:
        config = msgspec.structs.replace(config, num_blocks=layout.blocks_for(needed) + spare)
    # What `EngineArgs.resolve` guarantees, without which a request could wait for ever.
    if config.num_blocks < layout.blocks_for(needed):
        raise ValueError("the blocks do not hold one request of full length")
    if config.max_num_seqs > config.max_num_batched_tokens:
        raise ValueError("more rows than tokens a step")
    if not config.enable_chunked_prefill and config.max_num_batched_tokens < config.max_model_len:
        raise ValueError("a prompt that may not be split does not fit a step")
    return config


def make_request(
    request_id: int,
    prompt: Iterable[int],
    max_tokens: int = 8,
    *,
    min_tokens: int = 0,
    eos: int | None = EOS,
    stop_ids: Sequence[int] = (),
    priority: int = 0,
    salt: str = "",
) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, temperature=0.0)
    return EngineRequest(request_id, list(prompt), params, eos, list(stop_ids), priority, salt)


class Cell(NamedTuple):
    """The keys and values of one token: what they depend on, on whose behalf, and for which layers.

    `before`: a hash of all tokens in front of it, whether a window shows them or not: a layer sees them
    through the layers below it.
    """

    token: int
    position: int
    salt: str
    before: int
    group: int


@dataclass
class _Row:
    """One row of every device array. A fresh one is what a zeroed row looks like."""

    in_use: bool = False
    request_id: int = 0
    tables: list[list[int]] = field(default_factory=list)  # of each group of layers
    tokens: list[int] = field(default_factory=list)  # those known at admission, and every token sampled since
    num_computed: int = 0
    salt: str = ""
    prompt_len: int = 0
    min_tokens: int = 0
    end_ids: frozenset[int] = frozenset()


@dataclass
class FakeStep:
    plan: StepPlan
    rows: frozenset[int]
    tokens: list[list[int]]


class FakeRunner:
    """`core.Runner` over simulated KV memory.

    The host's token lists are read once, at admission. Every later token is the row's own, as on a GPU, so a
    step that runs ahead of its predecessor's results is really tested. Groups of layers share the memory;
    every step reads, for each of them, all that its tokens see.
    """

    graph_replays = padded_tokens = 0
    device_clock = None

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.clock = StepClock()
        self.masks = GrammarMasks(config, lambda: None)
        self.windows = config.spec.cache_plan.windows
        self.memory: list[Cell | None] = [None] * (config.num_blocks * config.block_size)
        self.rows = [_Row() for _ in range(config.max_num_seqs)]
        self.in_flight: deque[FakeStep] = deque()
        self.plans: list[StepPlan] = []
        self.no_logits: set[int] = set()  # requests whose next logits are not finite

    @property
    def rows_in_use(self) -> set[int]:
        return {index for index, row in enumerate(self.rows) if row.in_use}

    def block_content(self, block: int) -> tuple[Cell | None, ...]:
        """What every slot of a block holds; None where nothing was ever written."""
        size = self.config.block_size
        return tuple(self.memory[block * size : (block + 1) * size])

    # ---- core.Runner ---------------------------------------------------------------------------

    def finish(self, step: FakeStep) -> FakeStep:
        return step

    def launch(self, plan: StepPlan) -> FakeStep:
        self.plans.append(plan)
        self._release(plan)
        for request in plan.admitted:
            row = self.rows[request.row]
            _require(row == _Row(), f"row {request.row} was not zeroed before it is used again")
            width = -(-self.config.max_model_len // self.config.block_size)
            self.rows[request.row] = _Row(
                in_use=True,
                request_id=request.id,
                tables=[[NO_BLOCK] * width for _ in self.windows],
                tokens=list(request.token_ids),
                num_computed=next(item.start for item in plan.scheduled if item.request is request),
                salt=request.source.cache_salt,
                prompt_len=request.prompt_len,
                min_tokens=request.params.min_tokens,
                end_ids=request.end_ids,
            )
        rows = [item.request.row for item in plan.scheduled]
        _require(len(set(rows)) == len(rows) > 0, "a step computes nothing, or one row twice")
        budget = self.config.max_num_batched_tokens
        _require(sum(item.num_new for item in plan.scheduled) <= budget, "more tokens than the budget")
        for item in plan.scheduled:  # the tables first: then a block in two of them is seen from both
            row, count = self._row(item), len(item.new_blocks) // len(self.windows)
            for group, table in enumerate(row.tables):
                new = item.new_blocks[group * count : (group + 1) * count]
                table[item.first_block : item.first_block + count] = new
        for item in plan.scheduled:  # all of them before one is read: then a block of two is seen, too
            self._write(item)
        tokens = [self._compute(item) for item in plan.scheduled]
        step = FakeStep(plan, frozenset(rows), tokens)
        self.in_flight.append(step)
        _require(len(self.in_flight) <= 1 + self.config.async_scheduling, "too many steps in flight")
        return step

    def collect(self, step: StepInFlight) -> StepResult:
        oldest = self.in_flight.popleft()
        _require(oldest is step, "steps are collected out of order")
        return StepResult(oldest.tokens)

    # ---- the device ----------------------------------------------------------------------------

    def _release(self, plan: StepPlan) -> None:
        busy = {row for step in self.in_flight for row in step.rows}
        for index in plan.released_rows:
            _require(self.rows[index].in_use, f"row {index} is released but was not in use")
            _require(index not in busy, f"row {index} is released while a step that uses it is in flight")
            self.rows[index] = _Row()

    def _row(self, item: ScheduledRequest) -> _Row:
        _require(0 <= item.request.row < len(self.rows), "a request without a row is scheduled")
        row = self.rows[item.request.row]
        _require(row.in_use and row.request_id == item.request.id, "a row belongs to another request")
        return row

    def _write(self, item: ScheduledRequest) -> None:
        row, end = self._row(item), item.start + item.num_new
        drafts = list(item.request.drafts[: item.num_draft_tokens])
        known = end - len(drafts)
        _require(item.num_new > 0, "a request is scheduled without tokens")
        _require(item.start == row.num_computed, "tokens are skipped or computed twice")
        _require(known <= len(row.tokens), "a token is computed before it exists")
        _require(item.samples == (known == len(row.tokens)), "a token is sampled at the wrong place")
        context = [*row.tokens[:known], *drafts]
        before, size = _before(context), self.config.block_size
        for group, table in enumerate(row.tables):
            for column in range(item.start // size, (end - 1) // size + 1):
                self._require_sole_owner(table, self._slot(row, group, column * size) // size)
            for position in range(item.start, end):
                cell = Cell(context[position], position, row.salt, before[position], group)
                self.memory[self._slot(row, group, position)] = cell

    def _compute(self, item: ScheduledRequest) -> list[int]:
        """Read all that the step's tokens see, and sample."""
        row = self._row(item)
        drafts = list(item.request.drafts[: item.num_draft_tokens])
        row.num_computed = item.start + item.num_new - len(drafts)
        context = self._read(row, item.start, row.num_computed, row.tokens)
        if not item.samples:
            self._leave_windows(row)
            return [NO_TOKEN]  # of no meaning: the scheduler must not look at it
        tokens: list[int] = []
        for draft in (*drafts, None):
            held_back = row.num_computed - row.prompt_len < row.min_tokens
            tokens.append(next_token(context, row.end_ids if held_back else ()))
            if tokens[-1] != draft:
                break
            context.append(draft)
            row.num_computed += 1
            context = self._read(row, row.num_computed - 1, row.num_computed, context)
        row.tokens += tokens
        kept = -(-row.num_computed // self.config.block_size)
        for table in row.tables:
            table[kept:] = [NO_BLOCK] * (len(table) - kept)  # what was there held drafts at most
        self._leave_windows(row)
        if row.request_id in self.no_logits:
            self.no_logits.discard(row.request_id)
            return [*tokens[:-1], NO_TOKEN]
        return tokens

    def _leave_windows(self, row: _Row) -> None:
        """Forget the blocks that no later token of the row sees: a later step may write them for another."""
        for table, window in zip(row.tables, self.windows, strict=True):
            first = 0 if window is None else max(0, row.num_computed - window + 1)
            passed = first // self.config.block_size
            table[:passed] = [NO_BLOCK] * passed

    def _slot(self, row: _Row, group: int, position: int) -> int:
        size = self.config.block_size
        block = row.tables[group][position // size]
        _require(0 <= block < self.config.num_blocks, f"position {position} is in no block of group {group}")
        return block * size + position % size

    def _read(self, row: _Row, start: int, end: int, context: list[int]) -> list[int]:
        """What tokens [start, end) see in every group; the tokens in front of `end` as they are read."""
        read, before, size = context[:end], _before(context[:end]), self.config.block_size
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, start - window + 1)
            while first < end:  # block by block
                slot, last = self._slot(row, group, first), min(end, (first // size + 1) * size)
                cells = self.memory[slot : slot + last - first]
                for position, cell in enumerate(cells, first):
                    wanted = (position, row.salt, before[position], group)
                    if cell is None or cell[1:] != wanted:
                        raise Misuse(f"group {group} has {cell} where {wanted} is wanted")
                    read[position] = cell.token
                first = last
        return read

    def _require_sole_owner(self, own: list[int], block: int) -> None:
        tables = (table for other in self.rows if other.in_use for table in other.tables)
        shared = any(block in table for table in tables if table is not own)
        _require(not shared, f"block {block} is written while another table holds it")


def _before(context: Iterable[int]) -> list[int]:
    """Of each position a hash of all tokens in front of it, and of their order."""
    return list(accumulate(context, lambda before, token: hash((before, token)), initial=0))


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise Misuse(problem)


class FakeDrafter:
    """Proposes up to four tokens, of which the context decides how many are right."""

    def propose(self, requests: Sequence[Request]) -> list[list[int]]:
        return [self._drafts(request) for request in requests]

    def _drafts(self, request: Request) -> list[int]:
        context = list(request.token_ids)
        for _ in range(hash((*context, 1)) % 5):
            few = len(context) - request.prompt_len < request.params.min_tokens
            right = next_token(context, request.end_ids if few else ())
            wrong = hash((*context, 2)) % 4 == 0
            context.append((right + 1) % VOCAB if wrong else right)
        return context[len(request.token_ids) :]


class Engine:
    """`EngineCore` on the fake, gathering what each request gives."""

    def __init__(self, *, drafter: Drafter | None = None, **overrides: Any) -> None:
        self.config = make_config(**overrides)
        self.runner = FakeRunner(self.config)
        self.core = EngineCore(self.config, self.runner, drafter)
        self.answers: dict[int, Answer] = {}
        self.errors: dict[int, str] = {}

    def add(self, *requests: EngineRequest) -> None:
        for request in requests:
            refusal = self.core.add(request)
            if refusal is not None:
                raise ValueError(refusal.error)

    def step(self) -> list[StepOutput]:
        """One step of the engine, followed by the audit of its pool."""
        outputs = self.core.step()
        for output in outputs:
            self._take(output)
        self.core.kv.check()
        return outputs

    def drain(self, max_steps: int = 5000) -> dict[int, Answer]:
        """Step until nothing is left to do, and see that everything was given back."""
        for _ in range(max_steps):
            if not self.core.has_work():
                break
            self.step()
        assert not self.core.has_work(), "the engine does not come to rest"
        self.check_rest()
        return self.answers

    def check_rest(self) -> None:
        """At rest no block is referenced, no row is held, and no request is remembered."""
        core, scheduler = self.core, self.core.scheduler
        core.kv.check()
        assert core.kv.num_used == 0
        assert core.kv.pool.num_available == self.config.num_blocks
        assert core.kv.num_unused_slots == 0
        assert not scheduler._requests and not scheduler._running and not scheduler._waiting
        assert sorted(scheduler._free_rows) == list(range(self.config.max_num_seqs))
        assert self.runner.rows_in_use == set(scheduler._released_rows)
        assert not self.runner.in_flight

    def run(self, *requests: EngineRequest) -> list[Answer]:
        """Add the requests together, run them to their ends, and give their answers in order."""
        self.add(*requests)
        self.drain()
        return [self.answers[request.request_id] for request in requests]

    def _take(self, output: StepOutput) -> None:
        before = self.answers.get(output.request_id)
        if before is not None and before.finish_reason is not None:
            raise Misuse(f"request {output.request_id} gives output after its end")
        tokens = [] if before is None else before.tokens
        num_cached = output.num_cached_tokens if before is None else before.num_cached
        if output.error is not None:
            self.errors[output.request_id] = output.error
        self.answers[output.request_id] = Answer(
            tokens + output.token_ids, output.finish_reason, output.stop_reason, num_cached
        )
