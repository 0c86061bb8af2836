"""Starts an engine process and holds the server's end of the channel to it. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
import subprocess

import msgspec

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError, EngineDeadError, EngineError
from microvllm.runtime.kv_events.config import KVEventsConfig
from microvllm.runtime.machine import device_environment
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.channel import (
    HEADER_BYTES,
    Command,
    Event,
    Failed,
    Progress,
    Ready,
    Start,
    frame,
    frame_bytes,
)
from microvllm.runtime.process.heartbeat import STACKS_SIGNAL, threads_of
from microvllm.runtime.process.spawn import SpawnedEngine
from microvllm.runtime.progress import OnProgress

logger = logging.getLogger("microvllm.engine")

READ_BUFFER_BYTES = 1 << 20
STACKS_S = 1.0  # for the stacks to be written
DEAD = "The engine process died; it is being started again."


class EngineProcess:
    """One engine process, alive until `end`; made by `start`."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.first_stats = EngineStats()
        self.max_model_len = 0  # in tokens, once it is ready
        self.kv_events: KVEventsConfig | None = None
        self._process = process
        self._reader, self._writer = reader, writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        on_progress: OnProgress | None = None,
        spawned: SpawnedEngine | None = None,
    ) -> EngineProcess:
        """Load the model in `spawned`, or in a new process, and return once it is ready.

        Of several engines each gets the next GPUs; a spawned process is the first's. Raises `ConfigError`
        with the engine's own line if it cannot load, `EngineError` if it dies.
        """
        rank, size = config.data_parallel_rank, config.tensor_parallel_size
        devices = device_environment(rank * size, size) if config.device == "cuda" and rank else {}
        process, sock = (spawned or SpawnedEngine(config.cpu_threads, devices)).detach()
        try:
            # From here on only the loop may close the socket: it would go on watching the number, and
            # miss the events of the next socket that gets it.
            streams = await asyncio.open_unix_connection(sock=sock, limit=READ_BUFFER_BYTES)
        except BaseException:
            process.kill()
            process.wait()
            raise
        engine = cls(process, *streams)
        try:
            engine.send_command(Start(config))
            await engine.wait_ready(on_progress)
        except EngineDeadError:
            ending = await engine.end()
            name = "the engine process" if config.data_parallel_size == 1 else f"engine {rank}"
            raise EngineError(f"{name} died while it was loading the model{ending}") from None
        except ConfigError as error:
            await engine.end()
            if config.data_parallel_size == 1:
                raise
            raise ConfigError(f"engine {rank}: {error}", remedy=error.remedy) from None
        except BaseException:
            await engine.end()
            raise
        return engine

    @property
    def pid(self) -> int:
        return self._process.pid

    def send_command(self, command: Command) -> None:
        """Send without blocking. A command to a dead process is lost."""
        if not self._writer.is_closing():
            self._writer.write(frame(self._encoder, command))

    async def read_event(self) -> Event:
        """Return the next event. Raises `EngineDeadError` when there will be none."""
        try:
            size = frame_bytes(await self._reader.readexactly(HEADER_BYTES))
            return self._decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            raise EngineDeadError(DEAD) from None

    async def wait_ready(self, on_progress: OnProgress | None) -> None:
        """Read events until the model is loaded. Raises `ConfigError` if it cannot be."""
        while not isinstance(event := await self.read_event(), Ready):
            if isinstance(event, Failed):
                raise ConfigError(event.message, remedy=event.remedy)
            if isinstance(event, Progress) and on_progress is not None:
                on_progress(event.what, event.done, event.total, event.note)
        self.first_stats, self.max_model_len = event.stats, event.max_model_len
        self.kv_events = event.kv_events

    def kill(self) -> None:
        """Kill the process; `read_event` then raises."""
        self._process.kill()

    async def kill_with_stacks(self) -> None:
        """Make the process print the stacks of its threads on stderr, then kill it."""
        states, _ = threads_of(self.pid)
        if states and not set(states) - set("Tt"):
            logger.error("The engine process is stopped (SIGSTOP or a debugger): it cannot print its stacks.")
        elif STACKS_SIGNAL is not None:
            logger.error("The stacks of the engine's threads follow.")
            self._process.send_signal(STACKS_SIGNAL)
            await asyncio.sleep(STACKS_S)
        self.kill()

    async def end(self, timeout_s: float = 0.1) -> str:
        """Close the channel, wait, kill the process if need be -> " (how the process ended)"."""
        self._writer.close()
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._wait, timeout_s))

    def _wait(self, timeout_s: float) -> str:
        try:
            code = self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return ""
        return f" (exit status {code})" if code >= 0 else f" (killed by signal {-code})"
