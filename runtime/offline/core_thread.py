"""`CoreThread`: the one thread that steps an engine core, for callers in any thread.

Nothing else touches the core, so callers need no lock, and what a signal raises in one of them
(KeyboardInterrupt, or an exception from the caller's own signal handler) never interrupts a step. Callers and
thread exchange messages through `SimpleQueue`s alone: a put is one call into C, which no signal divides.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from microvllm.runtime.errors import EngineError
from microvllm.runtime.metrics.observer import EngineObserver, SampleGroup, TrackedSequence
from microvllm.runtime.request import EngineRequest, FinishReason, StepOutput
from microvllm.runtime.text.detokenizer import OutputProcessor, TextDelta
from microvllm.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from microvllm.runtime.core.engine_core import EngineCore

logger = logging.getLogger("microvllm.engine")

T = TypeVar("T")
Message: TypeAlias = "Callable[[], object] | None"  # None ends the thread


class OfflineSequence(TrackedSequence):
    """One sequence of a caller, and the text of its output."""

    def __init__(self, request: EngineRequest, group: SampleGroup, tokenizer: Tokenizer) -> None:
        super().__init__(request, group, time.monotonic())
        self.request = request
        self.text = OutputProcessor(tokenizer, request)


SequenceOutput: TypeAlias = tuple[OfflineSequence, StepOutput]


class Run:
    """The sequences of one caller, who may add more. `post(close_message())` ends them, at any moment.

    A step runs only while a caller is inside `next_deltas`: a stream that is not read computes nothing,
    although its requests take part in the steps that others wait for.
    """

    __slots__ = ("_loop", "_thread", "closed", "inbox", "outputs", "post", "unfinished")

    def __init__(self, loop: _CoreLoop, thread: threading.Thread) -> None:
        self.unfinished: set[OfflineSequence] = set()
        self.inbox: SimpleQueue[list[SequenceOutput] | _Raised] = SimpleQueue()
        self.closed: SimpleQueue[None] = SimpleQueue()
        self.outputs: list[SequenceOutput] = []  # not sent to the caller yet
        self._loop, self._thread, self.post = loop, thread, loop.mail.put

    def close_message(self) -> Callable[[], None]:
        """Return the message that ends the run. Made before it is needed: no interrupt can divide a post."""
        return partial(self._loop.close_run, self)

    def add_sequences(self, sequences: Sequence[OfflineSequence]) -> None:
        """Start to generate the sequences."""
        self.unfinished.update(sequences)
        self.post(partial(self._loop.add_sequences, self, sequences))

    def next_deltas(self) -> list[tuple[OfflineSequence, TextDelta]]:
        """Wait for the next step with tokens of these sequences; returns the delta of each.

        Raises `EngineError` if the engine has failed.
        """
        self.post(partial(self._loop.request_outputs, self))
        outputs: list[SequenceOutput] = _answer_of(self.inbox, self._thread)
        found = []
        for sequence, output in outputs:
            if sequence not in self.unfinished:
                continue
            delta = sequence.text.process(output)
            if delta.finish_reason is not None:
                self.unfinished.remove(sequence)
                if output.finish_reason is None:  # a stop string, which the engine does not look for
                    self._end(sequence, FinishReason.STOP)
            found.append((sequence, delta))
        return found

    def abort(self, sequence: OfflineSequence) -> None:
        """End a sequence now; nothing more of it is returned."""
        if sequence in self.unfinished:
            self.unfinished.remove(sequence)
            self._end(sequence, FinishReason.ABORT)

    def _end(self, sequence: OfflineSequence, reason: FinishReason) -> None:
        self.post(partial(self._loop.end_request, sequence.request.request_id, str(reason)))

    def wait_closed(self, timeout_s: float | None = None) -> None:
        """Wait until no step in flight holds blocks of these requests."""
        # The thread itself may close a run, when the garbage collector finds an abandoned stream there.
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            try:
                self.closed.get(timeout=timeout_s)
            except Empty:
                logger.info("A step is still running; its requests end with it.")


class CoreThread:
    """Starts the thread; it ends with this object, or before the interpreter does."""

    def __init__(self, core: EngineCore[Any], observer: EngineObserver) -> None:
        self._loop = _CoreLoop(core, observer)
        self._thread = threading.Thread(target=self._loop.serve, name="microvllm-engine", daemon=True)
        self._thread.start()
        # At exit the thread is joined: one that is inside a kernel while the process is torn down crashes it.
        weakref.finalize(self, _end, self._loop.mail, self._thread)

    def open_run(self) -> Run:
        """Return a run without sequences."""
        return Run(self._loop, self._thread)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function between two steps and return what it returns or raises."""
        answer: SimpleQueue[Any] = SimpleQueue()
        self._loop.mail.put(partial(_call, function, answer))
        found: T = _answer_of(answer, self._thread)
        return found


class _CoreLoop:
    """Runs in the thread, and so do all of its methods; other threads put messages into `mail`."""

    def __init__(self, core: EngineCore[Any], observer: EngineObserver) -> None:
        self.mail: SimpleQueue[Message] = SimpleQueue()
        self._core = core
        self._observer = observer
        self._open: dict[int, tuple[OfflineSequence, Run]] = {}  # by request id
        self._waiting: list[Run] = []
        self._failure: Exception | None = None

    def serve(self) -> None:
        while True:
            while not self._waiting or not self.mail.empty():
                message = self.mail.get()
                if message is None:
                    return
                self._guard(message)
                del message  # it would keep the caller's run alive until the next one comes
            self._guard(self._step)

    def _guard(self, action: Callable[[], object]) -> None:
        """Run a message or a step. An error of the core is final: its state is unknown after one."""
        try:
            action()
        except Exception as error:
            self._failure = error
            waiting, self._waiting = self._waiting, []
            for run in waiting:
                self.request_outputs(run)

    def _step(self) -> None:
        self._deliver(self._core.step())
        self._observer.on_step(self._core.stats())

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        now = time.monotonic()
        for output in outputs:
            found = self._open.get(output.request_id)
            if found is None:
                continue
            sequence, run = found
            run.outputs.append((sequence, output))
            sequence.record_output(output, len(output.token_ids), now, self._observer)
            if output.finish_reason is not None:
                del self._open[output.request_id]
                sequence.record_end(str(output.finish_reason), self._observer)
        for run in [run for run in self._waiting if run.outputs]:
            self._waiting.remove(run)
            self._send_outputs(run)

    @staticmethod
    def _send_outputs(run: Run) -> None:
        outputs, run.outputs = run.outputs, []
        run.inbox.put(outputs)

    # ---- messages ------------------------------------------------------------------------------

    def add_sequences(self, run: Run, sequences: Sequence[OfflineSequence]) -> None:
        for sequence in sequences:
            refused = self._core.add(sequence.request)
            self._open[sequence.request.request_id] = sequence, run
            if refused is not None:
                self._deliver([refused])

    def request_outputs(self, run: Run) -> None:
        if self._failure is not None:
            error = EngineError(f"the engine has failed: {self._failure}")
            error.__cause__ = self._failure
            run.inbox.put(_Raised(error))
        elif run.outputs:
            self._send_outputs(run)
        elif run not in self._waiting:  # it may ask again after an interrupt
            self._waiting.append(run)

    def end_request(self, request_id: int, reason: str) -> None:
        found = self._open.pop(request_id, None)
        if found is not None:
            self._core.abort(request_id)
            found[0].record_end(reason, self._observer)

    def close_run(self, run: Run) -> None:
        try:
            if run in self._waiting:
                self._waiting.remove(run)
            for request_id in [key for key, (_, owner) in self._open.items() if owner is run]:
                self.end_request(request_id, str(FinishReason.ABORT))
            if not self._waiting and self._failure is None:  # else the next step awaits the one in flight
                self._deliver(self._core.drain())
                self._observer.on_step(self._core.stats())
                if not self._core.has_work():
                    self._core.rest()
        finally:
            run.closed.put(None)


def _call(function: Callable[[], Any], answer: SimpleQueue[Any]) -> None:
    try:
        answer.put(function())
    except BaseException as error:
        answer.put(_Raised(error))


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _answer_of(inbox: SimpleQueue[Any], thread: threading.Thread) -> Any:
    if not thread.is_alive():  # in a forked process, or after the interpreter began to exit
        raise EngineError("the engine's thread has ended: an engine cannot be used in a forked process")
    answer = inbox.get()
    if isinstance(answer, _Raised):
        raise answer.error
    return answer


def _end(mail: SimpleQueue[Message], thread: threading.Thread) -> None:
    mail.put(None)
    if threading.current_thread() is not thread:
        thread.join()
