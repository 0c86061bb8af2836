"""The async client of the engines: starts them, sends each request to one of them, and reports on all.

Imports no torch. One `EngineClient` per server, one `Replica` per engine, one `TokenStream` per sequence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from typing import Any, ParamSpec, TypeVar

import msgspec

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import EngineAsleepError, EngineDeadError, InvalidRequestError
from microvllm.runtime.kv_events.config import KVEventsConfig
from microvllm.runtime.machine import usable_cores
from microvllm.runtime.metrics.observer import SampleGroup
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.admission import Admission, QueueFullError, shared_tokens
from microvllm.runtime.process.channel import Add, ResetPrefixCache, StartProfile, StopProfile
from microvllm.runtime.process.engine_process import DEAD, EngineProcess
from microvllm.runtime.process.replica import WAIT_S, Replica
from microvllm.runtime.process.routing import Router, prompt_keys
from microvllm.runtime.process.spawn import SpawnedEngine
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.text.input_processor import InputProcessor, load_text
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.worker.profiler import ProfilerConfig

P = ParamSpec("P")
T = TypeVar("T")

# For tokenising and templating. 250 prompts of 600 tokens that come at once are a second's work for one.
WORKER_THREADS = max(2, min(8, usable_cores() // 2))
INLINE_IDS = 10_000  # longer lists are checked in a worker thread
PROMPTS_AT_ONCE = 16
SLEEP_TAGS = ("weights", "kv_cache")


class EngineClient:
    """Owns the engines, `data_parallel_size` of them. All methods belong to one event loop.

    `tokenizer_root` is a folder from which transformers loads the tokenizer.
    """

    def __init__(
        self, config: EngineConfig, tokenizer: Tokenizer, processor: InputProcessor, tokenizer_root: str
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer_root = tokenizer_root
        self.processor = processor
        self._workers = ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="text")
        self._chat_workers = ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="chat")
        self._grammar_workers = ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="grammar")
        self.admission = Admission(config)
        self.sleep_level = 0  # of all engines; 0: awake
        self.asleep: frozenset[str] = frozenset()  # tags whose memory was given back
        self._changing = asyncio.Lock()
        self._router = Router(config.max_num_seqs, self.admission.max_wait_s)
        self.replicas = [
            Replica(each, tokenizer, self.admission, self._take_over, self._any_serves)
            for each in _configs(config)
        ]

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        on_progress: OnProgress | None = None,
        spawned: SpawnedEngine | None = None,
    ) -> EngineClient:
        """Start the engine processes, load the tokenizer meanwhile, wait until the models are ready.

        `spawned` is an engine process that runs already. `chat_template` replaces the model's own. Raises
        `ConfigError` with one line when the model or the tokenizer cannot be loaded, `EngineError` when an
        engine process dies while loading.
        """
        first, *others = _configs(config)
        starting = [asyncio.ensure_future(EngineProcess.start(first, on_progress, spawned))]
        starting += [asyncio.ensure_future(EngineProcess.start(each)) for each in others]
        try:
            text = await asyncio.get_running_loop().run_in_executor(None, load_text, config, chat_template)
            processes = await asyncio.gather(*starting)
        except BaseException:
            for each in starting:
                each.cancel()
            for outcome in await asyncio.gather(*starting, return_exceptions=True):
                if isinstance(outcome, EngineProcess):
                    await outcome.end()
            raise
        shortest = min(process.max_model_len for process in processes)
        if shortest < config.max_model_len:  # the memory of a GPU holds no more
            config = msgspec.structs.replace(config, max_model_len=shortest)
            text[1].use_config(config)
        client = cls(config, *text)
        for replica, process in zip(client.replicas, processes, strict=True):
            replica.run(process)
        return client

    @property
    def stats(self) -> EngineStats:
        """What all engines count and hold together."""
        return total_stats([replica.stats for replica in self.replicas])

    def healthy(self) -> bool:
        """Return whether requests are being served, by one engine at least."""
        return any(replica.healthy() for replica in self.replicas)

    def kv_event_sources(self) -> dict[int, KVEventsConfig]:
        """Return where each engine publishes the events of its KV cache, by its rank."""
        running = [(each.index, each.process) for each in self.replicas if each.process is not None]
        return {index: process.kv_events for index, process in running if process.kv_events is not None}

    async def wait_given_up(self) -> None:
        """Wait until no engine can be started again: raises `EngineError` then."""
        await asyncio.gather(*(replica.wait_given_up() for replica in self.replicas))

    async def run_blocking(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a slow function in a worker thread."""
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._workers, call)

    async def run_rendering(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that renders a chat template, in threads whose delays concern chats alone."""
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._chat_workers, call)

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        rank: int | None = None,
    ) -> list[TokenStream]:
        """Send one prompt to an engine: `params.n` streams. `rank`: the number of the engine, if it matters.

        Raises `InvalidRequestError` (and `ContextLengthError`) naming the field, `EngineBusyError` when
        the waiting queue is full, `EngineDeadError` while there is no engine.
        """
        self.processor.check_prompt(prompt_ids)
        prepared = self.processor.prepare(params, priority=priority, cache_salt=cache_salt)
        return self._start(prepared, [self.processor.samples(prompt_ids, prepared)], rank)

    async def submit_all(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        rank: int | None = None,
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
        return self._start(prepared, found, rank)

    def check_room(self, count: int = 1, tokens: int = 1) -> None:
        """Raise `EngineBusyError` unless `count` sequences of `tokens` together may join the queue.

        `EngineAsleepError` while the engines sleep.
        """
        if self.sleep_level:
            raise EngineAsleepError
        serving = self._serving() or self.replicas
        in_flight = sum(replica.in_flight for replica in serving)
        stats = total_stats([replica.stats for replica in serving])
        try:
            self.admission.check(stats, in_flight + count, tokens, len(serving))
        except QueueFullError as error:
            self.replicas[0].observer.on_rejected(error.option)
            raise

    def _start(
        self, prepared: EngineRequest, prompts: Sequence[Sequence[EngineRequest]], rank: int | None
    ) -> list[TokenStream]:
        """Register the samples of every prompt, and send each engine its own in one message."""
        serving = self._serving()
        if rank is not None:
            serving = [replica for replica in serving if replica.index == rank]
        if not serving and not self.sleep_level:
            raise EngineDeadError(DEAD)
        count = sum(map(len, prompts))
        shared = shared_tokens(prepared)
        self.check_room(count, shared + sum(len(each[0].prompt_token_ids) * len(each) for each in prompts))
        streams: list[TokenStream] = []
        batches: dict[int, list[Sequence[EngineRequest]]] = {}
        for samples in prompts:
            replica, keys = self._choose(serving, samples[0])
            group = SampleGroup(len(samples), len(samples))
            made = [TokenStream(replica, request, group) for request in samples]
            if not streams:
                made[0].queue_tokens += shared
            replica.open(made, keys)
            batches.setdefault(replica.index, []).append(samples)
            streams += made
        if rank is not None:
            for stream in streams:
                stream.stays = True
        for index, batch in batches.items():
            self.replicas[index].send(Add.of(prepared, batch))
        return streams

    # ---- which engine --------------------------------------------------------------------------

    def _serving(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.ready]

    def _any_serves(self) -> bool:
        return bool(self._serving())

    def _choose(self, serving: Sequence[Replica], request: EngineRequest) -> tuple[Replica, Sequence[int]]:
        """Return the engine for a prompt, and the prompt's keys; a lone engine needs none.

        One that misses beats gets no prompt while another beats: it may be frozen.
        """
        if len(self.replicas) == 1:
            return serving[0], ()
        serving = [replica for replica in serving if not replica.watch.missed] or serving
        keys: Sequence[int] = ()
        if self.config.enable_prefix_caching:
            keys = prompt_keys(request.prompt_token_ids, serving[0].prefixes.chunk, request.cache_salt)
        return self._router.choose(serving, keys), keys

    def _take_over(self, stream: TokenStream) -> bool:
        """Send a stream whose engine has died to another one, if it has no output yet -> whether it is sent.

        Once only: a request that ends its engine must not end one after the other.
        """
        serving = self._serving()
        if not serving or stream.stays or not stream.queued:
            return False
        stream.owner.leave_queue(stream, started=False)
        self._send_alone(stream, serving)
        return True

    def start_again(self, stream: TokenStream) -> TokenStream | None:
        """Compute a stream whose engine has died on another one, from its beginning; None if it cannot be.

        For those of whose output nothing was used.
        """
        serving = self._serving()
        if not serving or stream.stays or self.asleep:  # one that sleeps ignores requests
            return None
        again = TokenStream(serving[0], stream.request, SampleGroup(1, 1))
        again.name = stream.name
        self._send_alone(again, serving)
        return again

    def _send_alone(self, stream: TokenStream, serving: Sequence[Replica]) -> None:
        stream.stays = True
        replica, keys = self._choose(serving, stream.request)
        stream.owner = replica
        replica.open([stream], keys)
        request, params = stream.request, stream.request.params
        # Within a message samples are numbered from 0, and the number is added to the seed.
        params = msgspec.structs.replace(params, seed=request.seed)
        shared = msgspec.structs.replace(request, prompt_token_ids=[], params=params)
        replica.send(Add.of(shared, [[request]]))

    # ---- for all engines -----------------------------------------------------------------------

    async def sleep(self, level: int, *, wait: bool = False) -> None:
        """Have all engines give their memory back: vLLM's level 1 or 2.

        New requests are refused from now on. Open ones end with an `EngineAsleepError`, or are waited for. Of
        engines that are asleep, what a wake-up has taken meanwhile is given back.
        """
        if not wait and self.sleep_level == level:  # perhaps another call waits for them
            self._end_requests()
        async with self._changing:
            if self.sleep_level not in (0, level):
                raise InvalidRequestError(f"The engine is asleep at level {self.sleep_level}.", "level")
            self.sleep_level = level
            try:
                while wait and any(replica.streams for replica in self.replicas):
                    await asyncio.sleep(WAIT_S)
            except BaseException:
                self.sleep_level = 0
                raise
            self._end_requests()
            self.asleep = frozenset(SLEEP_TAGS)
            await asyncio.gather(*(replica.sleep(level) for replica in self.replicas))

    def _end_requests(self) -> None:
        for replica in self.replicas:
            replica.end_requests(EngineAsleepError())

    async def wake_up(self, tags: Collection[str] = SLEEP_TAGS) -> None:
        """Have all engines take the memory of these tags again; with the last of them they serve.

        Raises `EngineError` with the reason why one cannot; it may be tried again.
        """
        async with self._changing:
            if not self.sleep_level:
                return
            last = self.asleep <= set(tags)
            waking = [replica.wake_up(tags, last=last) for replica in self.replicas]
            for failure in await asyncio.gather(*waking, return_exceptions=True):  # all have come to an end
                if failure is not None:
                    raise failure
            self.asleep -= set(tags)
            if last:
                self.sleep_level = 0

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        for replica in self.replicas:
            replica.prefixes.clear()
            replica.send(ResetPrefixCache())

    async def start_profile(self, config: ProfilerConfig, prefix: str = "") -> str:
        """Start a profile of the engine processes -> the files that they will be in.

        Raises `InvalidRequestError` if one runs already, `EngineError` if it fails.
        """
        return await self._profile(partial(StartProfile, config), prefix or "engine")

    async def stop_profile(self) -> str:
        """End the profile and write it -> its files. Raises as `start_profile` does, also if none runs."""
        return await self._profile(lambda _: StopProfile(), "")

    async def _profile(self, command: Callable[[str], StartProfile | StopProfile], prefix: str) -> str:
        serving = self._serving()
        if not serving:
            raise EngineDeadError(DEAD)
        alone = len(self.replicas) == 1
        commands = [command(prefix if alone else f"{prefix}-dp{replica.index}") for replica in serving]
        files = [replica.profile(each) for replica, each in zip(serving, commands, strict=True)]
        return ", ".join(await asyncio.gather(*files))

    async def close(self, drain_s: float = 0) -> None:
        """Wait up to `drain_s` seconds for open streams, then end the engine processes."""
        deadline = time.monotonic() + drain_s
        while any(replica.streams for replica in self.replicas) and time.monotonic() < deadline:
            await asyncio.sleep(WAIT_S)
        for replica in self.replicas:  # of all, before one of them could take over what another has
            replica.ready = False
        error = EngineDeadError("The server is shutting down.")
        await asyncio.gather(*(replica.close(error) for replica in self.replicas))
        for workers in (self._workers, self._chat_workers, self._grammar_workers):
            workers.shutdown(wait=False, cancel_futures=True)


def _configs(config: EngineConfig) -> list[EngineConfig]:
    """Return the configuration of each engine process.

    Each has a seed of its own: equal requests without one would get equal answers from two engines.
    """
    return [
        msgspec.structs.replace(config, data_parallel_rank=index, seed=config.seed + index)
        for index in range(config.data_parallel_size)
    ]


def total_stats(parts: Sequence[EngineStats]) -> EngineStats:
    """Return the sums of what several engines count and hold."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name in EngineStats.__struct_fields__ if name != "step_seconds"]
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    times = zip_longest(*(part.step_seconds for part in parts), fillvalue=0.0)
    return EngineStats(**sums, step_seconds=list(map(sum, times)))
