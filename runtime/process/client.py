"""The async client of the engine process: starts it, sends requests, and restarts it when it dies.

Imports no torch. One `EngineClient` per server, one `TokenStream` per sequence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

import msgspec

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import EngineDeadError, EngineError, InvalidRequestError
from microvllm.runtime.kv_events.config import KVEventsConfig
from microvllm.runtime.machine import usable_cores
from microvllm.runtime.observer import EngineObserver, SampleGroup
from microvllm.runtime.process.admission import Admission, QueueFullError, shared_tokens
from microvllm.runtime.process.channel import (
    Abort,
    Add,
    Beat,
    Command,
    Event,
    Profiled,
    ResetPrefixCache,
    StartProfile,
    Step,
    StopProfile,
)
from microvllm.runtime.process.engine_process import DEAD, EngineProcess
from microvllm.runtime.process.heartbeat import Watch, longest_step_s
from microvllm.runtime.process.spawn import SpawnedEngine
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.request import EngineRequest, EngineStats, SamplingParams
from microvllm.runtime.text.input_processor import InputProcessor, load_text
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.worker.profiler import ProfilerConfig

logger = logging.getLogger("microvllm.engine")

P = ParamSpec("P")
T = TypeVar("T")

WATCH_INTERVAL_S = 1.0
EXIT_S = 3.0  # time for the engine process to leave after its socket was closed
MAX_NAMED = 100  # ids in one line of the log
RESTART_DELAYS_S = (0.0, 1.0, 5.0, 15.0, 30.0)
# For tokenising and templating. 250 prompts of 600 tokens that come at once are a second's work for one.
WORKER_THREADS = max(2, min(8, usable_cores() // 2))
INLINE_IDS = 10_000  # longer lists are checked in a worker thread
PROMPTS_AT_ONCE = 16


class EngineClient:
    """Owns the engine process. All methods belong to one event loop. `observer` may be replaced.

    `tokenizer_root` is a folder from which transformers loads the tokenizer.
    """

    def __init__(
        self, config: EngineConfig, tokenizer: Tokenizer, processor: InputProcessor, tokenizer_root: str
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer_root = tokenizer_root
        self.processor = processor
        self.stats = EngineStats()
        self.observer = EngineObserver()
        self._workers = ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="text")
        self._chat_workers = ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="chat")
        self._grammar_workers = ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="grammar")
        self._streams: dict[int, TokenStream] = {}
        self.admission = Admission(config)
        self._aborted: list[int] = []  # not sent yet
        self._submitted = 0  # to the engine process that runs now
        self._process: EngineProcess | None = None
        self._profiling: deque[asyncio.Future[Profiled]] = deque()  # pending answers
        self._ready = False
        self._watch = Watch(0, 0.0)  # of the process that runs now
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        on_progress: OnProgress | None = None,
        spawned: SpawnedEngine | None = None,
    ) -> EngineClient:
        """Start the engine process, load the tokenizer meanwhile, wait until the model is ready.

        `spawned` is an engine process that runs already. `chat_template` replaces the model's own. Raises
        `ConfigError` with one line when the model or the tokenizer cannot be loaded, `EngineError` when the
        engine process dies while loading.
        """
        starting = asyncio.ensure_future(EngineProcess.start(config, on_progress, spawned))
        try:
            text = await asyncio.get_running_loop().run_in_executor(None, load_text, config, chat_template)
            process = await starting
        except BaseException:
            starting.cancel()
            (outcome,) = await asyncio.gather(starting, return_exceptions=True)
            if isinstance(outcome, EngineProcess):
                await outcome.end()
            raise
        if process.max_model_len < config.max_model_len:  # the memory of a GPU holds no more
            config = msgspec.structs.replace(config, max_model_len=process.max_model_len)
            text[1].use_config(config)
        client = cls(config, *text)
        client._use(process)
        client._tasks = [
            asyncio.ensure_future(client._serve()),
            asyncio.ensure_future(client._watch_engine()),
        ]
        return client

    def healthy(self) -> bool:
        """Return whether requests are being served: the engine is loaded, alive, not frozen and not hung."""
        return self._ready and self._watch.problem is None

    def kv_event_sources(self) -> dict[int, KVEventsConfig]:
        """Return where each engine publishes the events of its KV cache, by its rank."""
        found = None if self._process is None else self._process.kv_events
        return {} if found is None else {0: found}

    async def wait_given_up(self) -> None:
        """Wait until the engine cannot be started again: raises `EngineError` then."""
        await asyncio.shield(self._tasks[0])

    async def run_blocking(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a slow function in a worker thread."""
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._workers, call)

    async def run_rendering(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that renders a chat template, in threads whose delays concern chats alone."""
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._chat_workers, call)

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> list[TokenStream]:
        """Send one prompt to the engine: `params.n` streams.

        Raises `InvalidRequestError` (and `ContextLengthError`) naming the field, `EngineBusyError` when
        the waiting queue is full, `EngineDeadError` while there is no engine.
        """
        self.processor.check_prompt(prompt_ids)
        prepared = self.processor.prepare(params, priority=priority, cache_salt=cache_salt)
        return self._start(prepared, [self.processor.samples(prompt_ids, prepared)])

    async def submit_all(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[TokenStream]:
        """Send all prompts of a request or none, without holding up the event loop; raises as `submit` does.

        Sample i of prompt p is stream p * n + i. The prompts have passed `InputProcessor.check_prompt`.
        """
        options: dict[str, Any] = {"priority": priority, "cache_salt": cache_salt}
        prepare = self.processor.prepare
        if params.structured_outputs is not None:  # compiled in a child process, which may take seconds
            call = partial(prepare, params, **options)
            prepared = await asyncio.get_running_loop().run_in_executor(self._grammar_workers, call)
        elif params.bad_words or len(params.allowed_token_ids or ()) > INLINE_IDS:
            prepared = await self.run_blocking(prepare, params, **options)
        else:
            prepared = prepare(params, **options)
        found: list[list[EngineRequest]] = []
        for prompt in prompts:
            if len(found) % PROMPTS_AT_ONCE == PROMPTS_AT_ONCE - 1:
                await asyncio.sleep(0)
            found.append(self.processor.samples(prompt, prepared))
        return self._start(prepared, found)

    def check_room(self, count: int = 1, tokens: int = 1) -> None:
        """Raise `EngineBusyError` unless `count` sequences of `tokens` together may join the queue."""
        in_flight = self._submitted - self.stats.requests
        try:
            self.admission.check(self.stats, in_flight + count, tokens)
        except QueueFullError as error:
            self.observer.on_rejected(error.option)
            raise

    def _start(
        self, prepared: EngineRequest, prompts: Sequence[Sequence[EngineRequest]]
    ) -> list[TokenStream]:
        """Register the samples of every prompt and send them to the engine in one message."""
        if not self._ready:
            raise EngineDeadError(DEAD)
        count = sum(map(len, prompts))
        shared = shared_tokens(prepared)
        self.check_room(count, shared + sum(len(each[0].prompt_token_ids) * len(each) for each in prompts))
        self._submitted += count
        streams: list[TokenStream] = []
        for samples in prompts:
            group = SampleGroup(len(samples), len(samples))
            streams += [TokenStream(self, request, group) for request in samples]
        if streams:
            streams[0].queue_tokens += shared
        self._streams.update((stream.request_id, stream) for stream in streams)
        for stream in streams:
            self.admission.enter(stream.queue_tokens)
        self._send(Add.of(prepared, prompts))
        return streams

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self._send(ResetPrefixCache())

    async def start_profile(self, config: ProfilerConfig, prefix: str = "") -> str:
        """Start a profile of the engine process -> the file that it will be in.

        Raises `InvalidRequestError` if one runs already, `EngineError` if it fails.
        """
        return await self._profile(StartProfile(config, prefix))

    async def stop_profile(self) -> str:
        """End the profile and write it -> its file. Raises as `start_profile` does, also if none runs."""
        return await self._profile(StopProfile())

    async def _profile(self, command: StartProfile | StopProfile) -> str:
        if not self._ready:
            raise EngineDeadError(DEAD)
        answer: asyncio.Future[Profiled] = asyncio.get_running_loop().create_future()
        self._profiling.append(answer)
        self._send(command)
        found = await answer
        if found.problem is not None:
            raise InvalidRequestError(found.problem) if found.refused else EngineError(found.problem)
        return found.file

    async def close(self, drain_s: float = 0) -> None:
        """Wait up to `drain_s` seconds for open streams, then end the engine process."""
        deadline = time.monotonic() + drain_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all(EngineDeadError("The server is shutting down."))
        if self._process is not None:
            await self._process.end(EXIT_S)
        for workers in (self._workers, self._chat_workers, self._grammar_workers):
            workers.shutdown(wait=False, cancel_futures=True)

    def abort_request(self, request_id: int) -> None:
        """Send an abort for a stream that has ended by itself."""
        if self._streams.pop(request_id, None) is None:
            return
        if not self._aborted:  # thousands of sequences may end together: one message
            asyncio.get_running_loop().call_soon(self._send_aborted)
        self._aborted.append(request_id)

    def _send_aborted(self) -> None:
        aborted, self._aborted = self._aborted, []
        self._send(Abort(aborted))

    def forget_request(self, request_id: int) -> None:
        """Drop a stream whose request the engine has ended."""
        self._streams.pop(request_id, None)

    # ---- the engine process --------------------------------------------------------------------

    def _use(self, process: EngineProcess) -> None:
        self._process, self.stats = process, process.first_stats
        self._watch = Watch(process.pid, longest_step_s(self.config))
        self._submitted, self._ready = 0, True
        self.admission.restart()

    def _send(self, command: Command) -> None:
        if self._process is not None:
            self._process.send_command(command)

    async def _serve(self) -> None:
        """Handle the engine's events; when the process dies, fail all open requests and start another."""
        while self._process is not None:
            try:
                while True:
                    self._handle(await self._process.read_event())
            except EngineDeadError:
                pass
            except Exception:
                logger.exception("An event of the engine process could not be handled.")
            self._ready = False
            self._fail_all(EngineDeadError(DEAD))
            self.observer.on_engine_death()
            logger.error("%s%s", DEAD, await self._process.end())
            self._use(await self._restart())

    async def _watch_engine(self) -> None:
        """Kill an engine that is frozen or hangs; it is then started again like one that died."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if not self._ready or self._process is None:
                continue
            if self._profiling:
                self._watch.on_step()  # writing a profile may take longer than any step
            problem = self._watch.tick(bool(self._streams), WATCH_INTERVAL_S)
            if problem is not None:
                self._ready = False
                logger.error(
                    "The engine process %s; it is killed with %s.", problem, _named(self._streams.values())
                )
                await self._process.kill_with_stacks()

    def _handle(self, event: Event) -> None:
        if isinstance(event, Profiled):
            answer = self._profiling.popleft()
            if not answer.done():  # done: its client has left
                answer.set_result(event)
        elif isinstance(event, Beat):
            self._watch.on_beat(event.resting)
        if not isinstance(event, Step):
            return
        self._watch.on_step()
        self.stats, now = event.stats, time.monotonic()
        self.admission.measure(event.stats, now)
        for output in event.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.on_output(output, now)
        self.observer.on_step(event.stats)

    def _fail_all(self, error: EngineError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
        while self._profiling:
            answer = self._profiling.popleft()
            if not answer.done():
                answer.set_exception(error)

    async def _restart(self) -> EngineProcess:
        """Start another engine process. Raises `EngineError` when it fails after each of the delays."""
        problem: Exception | None = None
        for delay_s in RESTART_DELAYS_S:
            await asyncio.sleep(delay_s)
            try:
                process = await EngineProcess.start(self.config)
            except Exception as error:  # also no memory, no file handles: they may come back
                problem = error
                logger.error("The engine could not be started again: %s", error or type(error).__name__)
            else:
                logger.info("The engine process was started again.")
                return process
        times = len(RESTART_DELAYS_S)
        raise EngineError(f"the engine could not be started again in {times} attempts: {problem}")


def _named(streams: Collection[TokenStream]) -> str:
    """Return the requests that were running, by id."""
    ids = list(dict.fromkeys(stream.name or str(stream.request_id) for stream in streams))
    more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
    return f"{len(ids)} requests: {', '.join(ids[:MAX_NAMED])}{more}" if ids else "no requests"
