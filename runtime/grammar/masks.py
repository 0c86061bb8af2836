"""Follows the grammars of running requests, and computes which tokens may come next, in worker threads.

A mask belongs to a length of the output: it is valid for the token behind exactly so many, and `bits`
compares the two, so that no stale mask is applied. Masks are computed as soon as a token is known, while the
device runs the model on it: only the sampling of that step waits. A request whose masks take long is
scheduled when its mask is known and not before (`ready`), so that it does not hold up the others.

Imports no torch.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import MicroVLLMError
from microvllm.runtime.grammar.compiled import CompiledGrammars, Start, num_lexers
from microvllm.runtime.machine import usable_cores
from microvllm.runtime.request import EngineRequest, FinishReason, StepOutput, StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from microvllm.runtime.core.plan import Request, ScheduledRequest
    from microvllm.runtime.worker.bitmask import Output

logger = logging.getLogger("microvllm.grammar")

MAX_THREADS = 16
MANY = 16  # rows whose masks take longer than to hand them to a thread (docs/benchmarks.md)
SLOW_S = 5e-3
USUAL_S = 1e-4  # of a mask among others, at most
BEGIN_S = 2e-4  # for a thread to begin
WAIT_S = 0.05  # of a step without anything to compute: commands are read between two steps
MASK_DEADLINE_S = 2.0
# Why a matcher stops at the end of its grammar; any other reason is a fault.
_COMPLETE = ("NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence")


class Row:
    """One request's place in its grammar. One thread at a time advances it.

    `num_sent`: tokens of the output that were given to it; `num_taken`: those that the mask follows.
    `advance` is `take`, the mask if it is `due`, and `settle`, which a job of many rows leaves to the
    engine's thread. `place`: the engine's row; those of which it differs modulo `num_lexers()` do not wait
    for each other.
    """

    def __init__(
        self, form: StructuredOutput, matcher: Callable[[], LLMatcher], vocab_size: int, place: int = 0
    ) -> None:
        self.form, self.place = form, place
        self.words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        self.matcher: LLMatcher | None = None
        self.num_sent = self.num_taken = 0
        self.problem: str | None = None
        self.slow = False
        self.job: Future[None] | None = None
        self.group: Group | None = None  # that the job computes
        # While the output may begin with `opens`: what is left of it. Beside that it may be the form already.
        self._opening = list(form.opens) if form.after else []
        # What is left of `head` in front of the form; None if the output cannot be the form from its start.
        self._head: list[int] | None = list(form.head) if self._opening else []
        # The last tokens of the reasoning, which may be about to end it; None outside of it.
        self._free: list[int] | None = [] if form.after and not self._opening else None
        self._make = matcher

    def advance(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the output and compute the mask behind them; in a worker thread."""
        start, words = time.thread_time(), None  # without the time in which the thread waits for a core
        self.take(tokens)
        try:
            if self.due and self.matcher is not None:
                words = np.empty_like(self.words)
                self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        except Exception as error:
            self.fail(error)
        self.slow = time.thread_time() - start > SLOW_S * (1 + len(tokens))
        self.settle(words, len(tokens))

    def take(self, tokens: Sequence[int]) -> None:
        """Follow the next tokens of the output."""
        try:
            self.matcher = matcher = self.matcher or self._make()
            for token in tokens:
                if token >= 0 and self.problem is None:  # else the step has chosen none
                    self._take(token, matcher)
        except Exception as error:
            self.fail(error)

    def _take(self, token: int, matcher: LLMatcher) -> None:
        after, free = self.form.after, self._free
        if free is not None:
            free.append(token)
            self._free = None if free[-len(after) :] == after else free[-len(after) :]
            return
        reasons = self._opening[:1] == [token]
        self._opening = self._opening[1:] if reasons else []
        if reasons and not self._opening:
            self._free, self._head = [], []
            matcher.reset()  # it has followed what might have been the form
        elif self._head:
            self._head = self._head[1:] if self._head[0] == token else None
        elif self._head is not None and reasons:
            self._head = [] if matcher.try_consume_tokens([token]) else None
        # Behind its end a grammar allows the end token, which `ignore_eos` repeats.
        elif self._head is not None and (matcher.is_stopped() or matcher.consume_token(token)):
            return
        else:
            self._head = None
        if self._head is None and not self._opening:
            self.problem = matcher.get_error().partition("\n")[0] or "it does not allow the last token"

    @property
    def done(self) -> bool:
        """Whether nothing is left to write of its masks."""
        if self.job is not None:
            return self.job.done()
        return self.group is None or self.group.settled

    @property
    def due(self) -> bool:
        """Whether the matcher decides what may come next."""
        if self.problem is not None or self.matcher is None:
            return False
        return self._free is None and self._head == []

    def settle(self, words: np.ndarray | None, num_tokens: int) -> None:
        """Have the mask behind `num_tokens` more tokens: [ceil(vocab / 32)] int32, None if not due."""
        try:
            if words is not None and self.matcher is not None:
                self.words = words
                if self.matcher.is_stopped() and self.matcher.stop_reason() not in _COMPLETE:
                    self.problem = self.matcher.get_error().partition("\n")[0] or self.matcher.stop_reason()
            elif self._free is None:
                self.words = np.zeros_like(self.words)
            for begins in (self._opening, self._head):
                if begins:
                    self.words.view(np.uint32)[begins[0] // 32] |= np.uint32(1 << begins[0] % 32)
        except Exception as error:
            self.fail(error)
        self.num_taken += num_tokens

    def fail(self, error: BaseException) -> None:
        """Note a bug, here or in the library. It ends this request alone."""
        logger.error("A grammar failed.", exc_info=error)
        self.problem = f"it failed ({type(error).__name__})"

    def mask(self, length: int) -> np.ndarray | None:
        """The mask behind `length` tokens: [ceil(vocab / 32)] int32; None where any token may come."""
        if self.problem is None and self.num_taken != length:
            self.problem = f"its mask is for {self.num_taken} tokens, not for {length}"
        if self.problem is not None:
            return np.zeros_like(self.words)
        return self.words if self._free is None else None


@dataclass(slots=True, eq=False)
class Group:
    """Rows whose masks are computed together, each with its number of new tokens, and whether it is due.

    table: [rows, ceil(vocab / 32)] int32, where the masks go, by `Row.place`. Seconds: until a thread began,
    and what the masks then took. Without a job the engine's thread computes them.
    """

    rows: Sequence[tuple[Row, int, bool]]
    table: np.ndarray
    made: float = field(default_factory=time.perf_counter)
    begin_seconds: float = 0.0
    seconds: float = 0.0
    slow: bool = False
    settled: bool = False

    def compute(self, executor: LLExecutor, begun: threading.Event) -> None:
        """Compute the masks, in a worker thread and in one call without the interpreter's lock."""
        due = [(row.matcher, row.place) for row, _, due in self.rows if due and row.matcher is not None]
        table = self.table
        begun.set()
        start, processor = time.perf_counter(), time.process_time()
        if due:
            executor.unsafe_compute_mask_ptr(due, table.ctypes.data, table[0].nbytes, len(table))
        self.begin_seconds, self.seconds = start - self.made, time.perf_counter() - start
        # Several threads take longer in sum, and other work on the machine takes their cores.
        seconds = min(self.seconds, time.process_time() - processor)
        self.slow = seconds > SLOW_S + USUAL_S * len(due)

    def compute_here(self) -> None:
        """Compute the masks in the engine's thread: for a few it takes as long to have another begin."""
        start, table = time.thread_time(), self.table
        for row, _, due in self.rows:
            try:
                if due and row.matcher is not None:
                    words = table[row.place]
                    row.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            except Exception as error:
                row.fail(error)
        self.slow = time.thread_time() - start > SLOW_S + USUAL_S * len(self.rows)
        self.settle(None)

    def settle(self, error: BaseException | None) -> None:
        """Have the masks; in the engine's thread, for which a worker would wait to do the same."""
        if self.settled:
            return
        self.settled = True
        for row, num_tokens, due in self.rows:
            row.slow = self.slow  # if one of them is: the next time each is alone
            if error is not None:
                row.fail(error)
            row.settle(self.table[row.place] if due else None, num_tokens)


@dataclass(slots=True)
class MaskCounts:
    """What the masks of an engine have taken. Seconds of wall time, "waits" of the engine's thread.

    jobs: of many rows, `begin_seconds` until a thread began and `job_seconds` from then on. own_seconds: of
    few rows, in the engine's thread. alone: rows in a job of their own, as they are new or slow.
    """

    steps: int = 0  # that were sampled by masks
    waits: int = 0  # of these, for masks that were not there yet
    wait_seconds: float = 0.0
    own_seconds: float = 0.0
    jobs: int = 0
    begin_seconds: float = 0.0
    job_seconds: float = 0.0
    alone: int = 0


class GrammarMasks:
    """The grammars of an engine's requests: a `TokenMask`, and what the engine core needs of it.

    All methods are called by the engine's thread. Requests with a grammar are held until it is compiled;
    `held` says whether there are such, `active` whether any row has a grammar. on_ready: called when
    the masks of a step are there. `counts`: what they took so far.
    """

    def __init__(self, config: EngineConfig, on_ready: Callable[[], None]) -> None:
        self._config = config
        self._on_ready = on_ready
        self.counts = MaskCounts()
        self._vocab_size = config.spec.vocab_size
        self._pool = ThreadPoolExecutor(
            min(MAX_THREADS, max(2, usable_cores())), thread_name_prefix="grammar"
        )  # starts its threads with the first job
        self._compiled = CompiledGrammars(config, self._pool)
        self._num_lexers = num_lexers()
        self._held: list[tuple[Future[Start], list[EngineRequest]]] = []
        self._rows: dict[int, Row] = {}
        self._table: np.ndarray | None = None  # of groups' masks, by the row: [rows, words] int32

    # ---- before a request is queued ------------------------------------------------------------

    @property
    def held(self) -> bool:
        return bool(self._held)

    @property
    def active(self) -> bool:
        return bool(self._rows)

    def hold(self, requests: Sequence[EngineRequest]) -> None:
        """Compile the grammar of the samples of one prompt."""
        self._held.append((self._compiled.compile(requests[0].grammar), list(requests)))

    def drop(self, request_id: int) -> bool:
        """Forget a request that is held; False if none of this id is."""
        for _, requests in self._held:
            found = [request for request in requests if request.request_id == request_id]
            if found:
                requests.remove(found[0])
                return True
        return False

    def take_compiled(self) -> tuple[list[list[EngineRequest]], list[StepOutput]]:
        """Return the held requests whose grammar is compiled, and the outputs of those that are refused."""
        compiled, refusals = [], []
        held, self._held = self._held, []
        for future, requests in held:
            error = future.exception() if future.done() else None
            if not future.done():
                self._held.append((future, requests))
            elif error is None:
                compiled.append(requests)
            else:
                refusals += [_refusal(request, error) for request in requests]
        return compiled, refusals

    def wait(self) -> None:
        """Wait, at most `WAIT_S`, for a compilation or a mask; returns at once if none is under way."""
        jobs: list[Future[Any]] = [future for future, _ in self._held]
        jobs += [row.job for row in self._rows.values() if row.job is not None and not row.job.done()]
        if jobs and not any(job.done() for job in jobs):
            wait(jobs, WAIT_S, FIRST_COMPLETED)

    # ---- while it runs -------------------------------------------------------------------------

    def ready(self, row: int, num_in_flight: int) -> bool:
        """Whether a row may be scheduled: one with slow masks only with all tokens and its mask known."""
        found = self._rows.get(row)
        if found is None or not found.slow:
            return True
        return num_in_flight == 0 and (found.job is None or found.job.done())

    def begin(self, scheduled: Iterable[ScheduledRequest]) -> None:
        """Start to compute the masks behind the tokens that were just committed."""
        work = []
        for item in scheduled:
            request = item.request
            row = self._rows.get(request.row) if item.samples and request.source.grammar else None
            if row is not None and request.finish_reason is None:
                work.append((row, request.token_ids[request.prompt_len + row.num_sent :]))
        self._submit(work)

    def problem(self, request: Request) -> tuple[str, str]:
        """Why a request has no token to choose from, and the field at fault."""
        form = request.params.structured_outputs or StructuredOutput(kind="json_object")
        row = self._rows.get(request.row)
        reason = row.problem if row is not None else None
        if row is not None and row.matcher is not None and row.matcher.is_error():
            self._compiled.drop(request.source.grammar)
        if reason is None and row is not None and not row.words.any():
            reason = "no token of the vocabulary continues it"
        if reason is None:
            reason = "allowed_token_ids, bad_words and min_tokens leave no token that continues it"
        return f"{form.field}: the output cannot follow the grammar: {reason}", form.field

    # ---- TokenMask -----------------------------------------------------------------------------

    def set_row(self, row: int, request: EngineRequest, output: Sequence[int]) -> None:
        """A request was admitted to the row. output: what it has generated before a preemption."""
        if request.grammar and request.params.structured_outputs is not None:
            matcher = functools.partial(self._compiled.copy, request.grammar, row)
            made = Row(request.params.structured_outputs, matcher, self._vocab_size, row)
            self._rows[row] = made
            self._submit([(made, output)])

    def clear_row(self, row: int) -> None:
        cleared = self._rows.pop(row, None)
        if cleared is not None and not cleared.done:
            self._table = None  # the job outlasts its request, whose place another's mask may need before

    def concerns(self, rows: Sequence[int]) -> bool:
        return bool(self._rows) and not self._rows.keys().isdisjoint(rows)

    def bits(
        self, rows: Sequence[int], output: Callable[[int], Output]
    ) -> tuple[list[int], list[np.ndarray]]:
        outputs = [output(i) if row in self._rows else ((), False) for i, row in enumerate(rows)]
        return self._bits(rows, [len(known) + in_flight for known, in_flight in outputs])

    def bits_of(self, scheduled: Sequence[ScheduledRequest]) -> tuple[list[int], list[np.ndarray]]:
        """`bits` of the requests of a step."""
        requests = [item.request for item in scheduled]
        lengths = [item.start + item.num_new - item.request.prompt_len for item in scheduled]
        return self._bits([request.row for request in requests], lengths)

    def _bits(self, rows: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[np.ndarray]]:
        found = [(i, row) for i, index in enumerate(rows) if (row := self._rows.get(index)) is not None]
        self._wait_for([row for _, row in found])
        self._on_ready()
        masks = [(i, mask) for i, row in found if (mask := row.mask(lengths[i])) is not None]
        return [i for i, _ in masks], [mask for _, mask in masks]

    def _wait_for(self, rows: Sequence[Row]) -> None:
        jobs = {row.job: row.group for row in rows if row.job is not None}
        counts, start = self.counts, time.perf_counter()
        counts.steps += bool(rows)
        few = {row.group for row in rows if row.group is not None and not row.done and row.job is None}
        for own in few:
            own.compute_here()
        counts.own_seconds += time.perf_counter() - start if few else 0.0
        start = time.perf_counter()
        waits = not all(job.done() for job in jobs)
        deadline, late = time.monotonic() + MASK_DEADLINE_S, set()
        for job, group in jobs.items():
            try:
                error = job.exception(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                late.add(job)
            else:
                if group is not None and not group.settled:
                    group.settle(error)
                    counts.jobs += 1
                    counts.begin_seconds += group.begin_seconds
                    counts.job_seconds += group.seconds
        counts.waits += waits
        counts.wait_seconds += time.perf_counter() - start if waits else 0.0
        for row in rows if late else ():
            if row.job in late:
                row.problem = f"the mask of a token took more than {MASK_DEADLINE_S:g} s"

    # ---- jobs ----------------------------------------------------------------------------------

    def _submit(self, work: Sequence[tuple[Row, Sequence[int]]]) -> None:
        """Advance rows: new and slow ones each in a thread of its own, the others together.

        Those take their tokens before this returns (4 us each; on several threads it takes longer). Their
        masks are computed while the engine goes on; of a few by itself, when it needs them.
        """
        together = []
        # Threads get rows that stand together: those of one lexer.
        for row, tokens in sorted(work, key=lambda pair: pair[0].place % self._num_lexers):
            row.num_sent += len(tokens)
            if row.slow or row.matcher is None:
                row.group, row.job = None, self._pool.submit(row.advance, tokens)
                self.counts.alone += 1
            else:
                row.take(tokens)
                together.append((row, len(tokens), row.due))
        if not together:
            return
        group, job, begun = Group(together, self._masks_table()), None, threading.Event()
        if len(together) >= MANY:
            job = self._pool.submit(group.compute, self._executor, begun)
            # Else it would not get the interpreter's lock before this thread has to wait for something.
            begun.wait(BEGIN_S)
        for row, _, _ in together:
            row.group, row.job = group, job

    def _masks_table(self) -> np.ndarray:
        if self._table is None:
            shape = self._config.max_num_seqs, -(-self._vocab_size // 32)
            self._table = np.zeros(shape, dtype=np.int32)
        return self._table

    @functools.cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(min(MAX_THREADS, usable_cores()))


def _refusal(request: EngineRequest, error: BaseException) -> StepOutput:
    problem = str(error) if isinstance(error, (ValueError, MicroVLLMError)) else type(error).__name__
    if problem != str(error):
        logger.error("A grammar could not be compiled.", exc_info=error)
    form = request.params.structured_outputs
    field = form.field if form is not None else None
    message = f"{field}: the grammar cannot be compiled: {problem}"
    return StepOutput(request.request_id, [], FinishReason.ERROR, error=message, param=field)
