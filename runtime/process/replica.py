"""One engine process of a server: its requests, its watch, and its restarts. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import EngineDeadError, EngineError, InvalidRequestError
from microvllm.runtime.metrics.observer import EngineObserver
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.admission import Admission, QueueRate
from microvllm.runtime.process.channel import (
    Abort,
    Beat,
    Command,
    Event,
    Profiled,
    Sleep,
    SleepChanged,
    StartProfile,
    Step,
    StopProfile,
    WakeUp,
)
from microvllm.runtime.process.engine_process import DEAD, EngineProcess
from microvllm.runtime.process.heartbeat import Watch, longest_step_s
from microvllm.runtime.process.routing import MIN_CHUNK, PrefixIndex
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.text.tokenizer import Tokenizer

logger = logging.getLogger("microvllm.engine")

WATCH_INTERVAL_S = 1.0
WAIT_S = 0.02  # between two looks at an engine that starts
EXIT_S = 3.0  # time for the engine process to leave after its socket was closed
MAX_NAMED = 100  # ids in one line of the log
RESTART_DELAYS_S = (0.0, 1.0, 5.0, 15.0, 30.0)


class Replica:
    """Owns an engine process and the streams that it computes. All methods belong to one event loop.

    `config` is that of the process, with its number. `observer` may be replaced. `take_over` is called with
    each open stream when the process dies, and returns whether another replica computes it from now on;
    `others_serve` returns whether one does.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        admission: Admission,
        take_over: Callable[[TokenStream], bool],
        others_serve: Callable[[], bool],
    ) -> None:
        self.config = config
        self.index = config.data_parallel_rank
        self.tokenizer = tokenizer
        self.admission = admission
        self.rate: QueueRate = admission.rates[self.index]
        self.stats = EngineStats()
        self.observer = EngineObserver()
        self.streams: dict[int, TokenStream] = {}
        self.prefixes = PrefixIndex(max(MIN_CHUNK, config.block_size))
        self.waiting_tokens = 0  # to prefill, of prompts without an output yet
        self.submitted = 0  # to the engine process that runs now
        self.ready = False
        self.watch = Watch(0, 0.0)  # of the process that runs now
        self.process: EngineProcess | None = None
        self._take_over = take_over
        self._others_serve = others_serve
        self._aborted: list[int] = []  # not sent yet
        self._profiling: deque[asyncio.Future[Profiled]] = deque()  # pending answers
        self._changing: deque[asyncio.Future[SleepChanged]] = deque()  # pending answers
        self._awake = asyncio.Event()  # unset while no process is to be started in place of one that died
        self._awake.set()
        self._sleep_level = 0  # the last one
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def name(self) -> str:
        """What the log calls it."""
        return "The engine process" if self.config.data_parallel_size == 1 else f"Engine {self.index}"

    def run(self, process: EngineProcess) -> None:
        """Begin to serve with a process that is ready."""
        self.use(process)
        self._tasks = [asyncio.ensure_future(self.serve()), asyncio.ensure_future(self._watch_engine())]

    def use(self, process: EngineProcess) -> None:
        """Go on with a process that is ready, and holds no request."""
        self.process, self.stats = process, process.first_stats
        self.watch = Watch(process.pid, longest_step_s(self.config))
        self.submitted, self.ready = 0, True
        self.rate.restart()
        self.prefixes.clear()

    def healthy(self) -> bool:
        """Return whether requests are being served: the engine is loaded, alive, not frozen and not hung."""
        return self.ready and self.watch.problem is None

    async def wait_given_up(self) -> None:
        """Wait until the engine cannot be started again: raises `EngineError` then."""
        await asyncio.shield(self._tasks[0])

    async def close(self, error: EngineError) -> None:
        """End the process; what is open ends with the error."""
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all(error)
        if self.process is not None:
            await self.process.end(EXIT_S)

    # ---- requests ------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Sequences that were sent, and of which the engine's numbers do not know yet."""
        return self.submitted - self.stats.requests

    @property
    def num_open(self) -> int:
        return len(self.streams)

    @property
    def predicted_wait(self) -> float:
        """Seconds until another request would be begun."""
        return self.rate.wait_for(max(0, len(self.streams) + 1 - self.config.max_num_seqs))

    def open(self, streams: Sequence[TokenStream], keys: Sequence[int]) -> None:
        """Register the streams of one prompt, which is sent to the process next; `keys` are the prompt's."""
        self.submitted += len(streams)
        for stream in streams:
            self.streams[stream.request_id] = stream
            self.admission.enter(stream.queue_tokens)
        if self.config.data_parallel_size > 1:
            first = streams[0]
            first.prefill_tokens = len(first.prompt_token_ids) - self.prefixes.matched(keys)
            self.waiting_tokens += first.prefill_tokens
            self.prefixes.note(keys, self.stats.kv_tokens_total)

    def abort_request(self, request_id: int) -> None:
        """Send an abort for a stream that has ended by itself."""
        if self.streams.pop(request_id, None) is None:
            return
        if not self._aborted:  # thousands of sequences may end together: one message
            asyncio.get_running_loop().call_soon(self._send_aborted)
        self._aborted.append(request_id)

    def _send_aborted(self) -> None:
        aborted, self._aborted = self._aborted, []
        if aborted:
            self.send(Abort(aborted))

    def forget_request(self, request_id: int) -> None:
        """Drop a stream whose request the engine has ended."""
        self.streams.pop(request_id, None)

    def leave_queue(self, stream: TokenStream, *, started: bool) -> None:
        """Note that a stream has its first output, or ends without one."""
        self.admission.leave(stream.queue_tokens)
        self.waiting_tokens -= stream.prefill_tokens
        self.rate.began += started

    async def profile(self, command: StartProfile | StopProfile) -> str:
        """Start or stop a profile of the process -> its file.

        Raises `InvalidRequestError` if the command does not fit, `EngineError` if it fails.
        """
        if not self.ready:
            raise EngineDeadError(DEAD)
        answer: asyncio.Future[Profiled] = asyncio.get_running_loop().create_future()
        self._profiling.append(answer)
        self.send(command)
        found = await answer
        if found.problem is not None:
            raise InvalidRequestError(found.problem) if found.refused else EngineError(found.problem)
        return found.file

    # ---- sleep ---------------------------------------------------------------------------------

    def end_requests(self, error: EngineError) -> None:
        """End all streams with an error, and their requests."""
        for stream in list(self.streams.values()):
            self.abort_request(stream.request_id)
            stream.fail(error)

    async def sleep(self, level: int) -> None:
        """Have the process give its memory back; no stream may be open, nor is any until it is awake again.

        A process that is gone has none; it is started again by `wake_up`.
        """
        self._awake.clear()
        self._sleep_level = level
        self._send_aborted()  # first of all: the process sleeps once it has no request
        with suppress(EngineDeadError):
            await self._change(Sleep(level))
        self.stats = msgspec.structs.replace(self.stats, kv_blocks_used=0, num_running=0, num_waiting=0)
        self.observer.on_sleep(level)

    async def wake_up(self, tags: Collection[str], *, last: bool) -> None:
        """Have the process take the memory of these tags, the `last` ones or not.

        One that died asleep is started by the last ones, and waited for unless another replica serves. Raises
        `EngineError` with the reason why it cannot.
        """
        found = SleepChanged()
        if self.ready:
            with suppress(EngineDeadError):
                found = await self._change(WakeUp(sorted(tags)))
        if found.problem is not None:
            raise EngineError(f"The engine cannot wake up: {found.problem}")
        if not last:
            return
        self._awake.set()
        if found.stats is not None and self.process is not None:
            self.process.kv_events, self.stats = found.kv_events, found.stats
            self.submitted = found.stats.requests  # 0, unless it was awake already
            self.rate.restart()
            self.prefixes.clear()
        while not (self.ready or self._others_serve()):
            if self._tasks[0].done():
                raise EngineError("The engine cannot wake up: it could not be started again.")
            await asyncio.sleep(WAIT_S)
        self.observer.on_sleep(0)
        self.observer.on_step(self.stats)  # the size of the cache

    async def _change(self, command: Sleep | WakeUp) -> SleepChanged:
        if not self.ready:
            raise EngineDeadError(DEAD)
        return await self._send_change(command)

    def _send_change(self, command: Sleep | WakeUp) -> asyncio.Future[SleepChanged]:
        answer: asyncio.Future[SleepChanged] = asyncio.get_running_loop().create_future()
        self._changing.append(answer)
        self.send(command)
        return answer

    def send(self, command: Command) -> None:
        """Send a command; one to a process that is gone is lost."""
        if self.process is not None:
            self.process.send_command(command)

    # ---- the engine process --------------------------------------------------------------------

    async def serve(self) -> None:
        """Handle the engine's events; when the process dies, give up its requests and start another."""
        while self.process is not None:
            try:
                while True:
                    self.handle(await self.process.read_event())
            except EngineDeadError:
                pass
            except Exception:
                logger.exception("An event of the engine process could not be handled.")
            self.ready = False
            moved = self._fail_all(EngineDeadError(DEAD))
            self.observer.on_engine_death()
            ending = await self.process.end()
            more = f" {moved} requests without an output go to others." if moved else ""
            when = "being started" if self._awake.is_set() else "to be started"
            logger.error("%s died; it is %s again.%s%s", self.name, when, ending, more)
            await self._awake.wait()
            self.use(await self.restart())
            if not self._awake.is_set():  # put to sleep while it started
                self._send_change(Sleep(self._sleep_level))

    async def _watch_engine(self) -> None:
        """Kill an engine that is frozen or hangs; it is then started again like one that died."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if not self.ready or self.process is None:
                continue
            unbounded = bool(self._profiling or self._changing)  # writing a profile, or loading
            problem = self.watch.tick(bool(self.streams), WATCH_INTERVAL_S, unbounded=unbounded)
            if problem is not None:
                self.ready = False
                named = _named(self.streams.values())
                logger.error("%s %s; it is killed with %s.", self.name, problem, named)
                await self.process.kill_with_stacks()

    def handle(self, event: Event) -> None:
        """Handle one event of the process."""
        if isinstance(event, Profiled):
            answer = self._profiling.popleft()
            if not answer.done():  # done: its client has left
                answer.set_result(event)
        elif isinstance(event, SleepChanged):
            changed = self._changing.popleft()
            if not changed.done():  # done: its client has left
                changed.set_result(event)
        elif isinstance(event, Beat):
            self.watch.on_beat(event.resting)
        if not isinstance(event, Step):
            return
        self.watch.on_step()
        self.stats, now = event.stats, time.monotonic()
        self.rate.measure(event.stats, now)
        for output in event.outputs:
            stream = self.streams.get(output.request_id)
            if stream is not None:
                stream.on_output(output, now)
        self.observer.on_step(event.stats)

    def _fail_all(self, error: EngineError) -> int:
        """End all streams but those that another replica takes over, and return how many these are."""
        moved = 0
        for stream in list(self.streams.values()):
            if self._take_over(stream):
                moved += 1
                self.forget_request(stream.request_id)
            else:
                stream.fail(error)
        waiting: tuple[deque[Any], ...] = (self._profiling, self._changing)
        for pending in waiting:
            while pending:
                answer = pending.popleft()
                if not answer.done():
                    answer.set_exception(error)
        return moved

    async def restart(self) -> EngineProcess:
        """Start another engine process.

        Raises `EngineError` when it fails after each of the delays, unless another replica serves: then it
        is tried again for as long.
        """
        problem: Exception | None = None
        attempts = 0
        while attempts < len(RESTART_DELAYS_S) or self._others_serve():
            await asyncio.sleep(RESTART_DELAYS_S[min(attempts, len(RESTART_DELAYS_S) - 1)])
            attempts += 1
            try:
                process = await EngineProcess.start(self.config)
            except Exception as error:  # also no memory, no file handles: they may come back
                problem = error
                logger.error("%s could not be started again: %s", self.name, error or type(error).__name__)
            else:
                logger.info("%s was started again.", self.name)
                return process
        raise EngineError(f"the engine could not be started again in {attempts} attempts: {problem}")


def _named(streams: Collection[TokenStream]) -> str:
    """Return the requests that were running, by id."""
    ids = list(dict.fromkeys(stream.name or str(stream.request_id) for stream in streams))
    more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
    return f"{len(ids)} requests: {', '.join(ids[:MAX_NAMED])}{more}" if ids else "no requests"
