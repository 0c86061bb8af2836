"""`CoreThread`: the one thread that steps an engine core, for callers in any thread.

Nothing else touches the core, so callers need no lock, and what a signal raises in one of them
(KeyboardInterrupt, or an exception from the caller's own signal handler) never interrupts a step. Callers and
thread exchange messages through `SimpleQueue`s alone: a put is one call into C, which no signal divides.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from microvllm.runtime.errors import EngineError
from microvllm.runtime.request import EngineRequest, StepOutput

if TYPE_CHECKING:
    from microvllm.runtime.core import EngineCore

logger = logging.getLogger("microvllm.engine")

T = TypeVar("T")
Message: TypeAlias = "Callable[[], object] | None"  # None ends the thread


class Run:
    """The requests of one caller. `post(closing)` ends them at any moment; it may be called twice.

    A step runs only while a caller is inside `take`: a stream that is not read computes nothing, although its
    requests take part in the steps that others wait for.
    """

    __slots__ = ("closed", "closing", "inbox", "loop", "outputs", "post", "requests", "thread")

    def __init__(self, loop: _CoreLoop, thread: threading.Thread, requests: Sequence[EngineRequest]) -> None:
        self.requests = requests
        self.inbox: SimpleQueue[list[StepOutput] | _Raised] = SimpleQueue()
        self.closed: SimpleQueue[None] = SimpleQueue()
        self.outputs: list[StepOutput] = []  # not handed over yet
        self.loop, self.thread = loop, thread
        # Ready to be posted: after an interrupt nothing may be called that another interrupt could cut short.
        self.post, self.closing = loop.mail.put, partial(loop.close, self)

    def start(self) -> None:
        self.post(partial(self.loop.start, self))

    def take(self) -> list[StepOutput]:
        """Wait for the next outputs of these requests. Raises `EngineError` if the engine has failed."""
        self.post(partial(self.loop.want, self))
        found: list[StepOutput] = _answer_of(self.inbox, self.thread)
        return found

    def abort(self, request_id: int) -> None:
        self.post(partial(self.loop.abort, request_id))

    def wait_closed(self, timeout_s: float | None = None) -> None:
        """Wait until no step in flight holds blocks of these requests."""
        # The thread itself may close a run, when the garbage collector finds an abandoned stream there.
        if self.thread.is_alive() and threading.current_thread() is not self.thread:
            try:
                self.closed.get(timeout=timeout_s)
            except Empty:
                logger.info("A step is still running; its requests end with it.")


class CoreThread:
    """Starts the thread; it ends with this object, or before the interpreter does."""

    def __init__(self, core: EngineCore[Any]) -> None:
        self._loop = _CoreLoop(core)
        self._thread = threading.Thread(target=self._loop.serve, name="microvllm-engine", daemon=True)
        self._thread.start()
        # At exit the thread is joined: one that is inside a kernel while the process is torn down crashes it.
        weakref.finalize(self, _end, self._loop.mail, self._thread)

    def run(self, requests: Sequence[EngineRequest]) -> Run:
        return Run(self._loop, self._thread, requests)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function between two steps and return what it returns or raises."""
        answer: SimpleQueue[Any] = SimpleQueue()
        self._loop.mail.put(partial(_call, function, answer))
        found: T = _answer_of(answer, self._thread)
        return found


class _CoreLoop:
    """What runs in the thread. Every method but the put into `mail` belongs to it."""

    def __init__(self, core: EngineCore[Any]) -> None:
        self.mail: SimpleQueue[Message] = SimpleQueue()
        self._core = core
        self._runs: dict[int, Run] = {}  # by request
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
                self.want(run)

    def _step(self) -> None:
        self._deliver(self._core.step())

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            run = self._runs.get(output.request_id)
            if run is not None:
                run.outputs.append(output)
        for run in [run for run in self._waiting if run.outputs]:
            self._waiting.remove(run)
            self._hand_over(run)

    @staticmethod
    def _hand_over(run: Run) -> None:
        outputs, run.outputs = run.outputs, []
        run.inbox.put(outputs)

    # ---- messages ------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        for request in run.requests:
            refused = self._core.add(request)
            if refused is not None:
                run.outputs.append(refused)
            else:
                self._runs[request.request_id] = run

    def want(self, run: Run) -> None:
        if self._failure is not None:
            error = EngineError(f"the engine has failed: {self._failure}")
            error.__cause__ = self._failure
            run.inbox.put(_Raised(error))
        elif run.outputs:
            self._hand_over(run)
        else:
            self._waiting.append(run)

    def abort(self, request_id: int) -> None:
        self._core.abort(request_id)

    def close(self, run: Run) -> None:
        try:
            if run in self._waiting:
                self._waiting.remove(run)
            for request in run.requests:
                if self._runs.pop(request.request_id, None) is not None:
                    self._core.abort(request.request_id)
            if not self._waiting and self._failure is None:  # else the next step awaits the one in flight
                self._deliver(self._core.drain())
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
