"""Starts an engine process and holds our end of the channel to it. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Callable

import msgspec

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError, EngineDeadError, EngineError
from microvllm.runtime.process.channel import Command, Event, Failed, Frames, Progress, Ready, Start, frame
from microvllm.runtime.process.heartbeat import STACKS_SIGNAL, threads_of
from microvllm.runtime.process.program import EngineProgram
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.request import EngineStats

logger = logging.getLogger("microvllm.engine")

STACKS_S = 1.0  # for the stacks to be written
DEAD = "The engine process died; it is being started again."


class EngineProcess(asyncio.Protocol):
    """One engine process, alive until `end`; made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.first_stats = EngineStats()
        self._process = process
        self._transport: asyncio.Transport
        self._encoder = msgspec.msgpack.Encoder()
        self._frames: Frames[Event] = Frames(Event)
        self._on_event: Callable[[Event], bool | None] | None = None
        self._heard: asyncio.Future[None]  # done when whoever hears need not any more, or cannot
        self._gone = False

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        on_progress: OnProgress | None = None,
        program: EngineProgram | None = None,
    ) -> EngineProcess:
        """A process that has loaded the model: the given program's, which is taken, or a new one's.

        Raises `ConfigError` with the engine's own line if it cannot load, `EngineError` if it dies.
        """
        process, ours = (program or EngineProgram(config.cpu_threads)).take()
        engine = cls(process)
        try:
            # From here on only the loop may close the socket: it would go on watching the number, and
            # be deaf to the next socket that gets it.
            await asyncio.get_running_loop().create_unix_connection(lambda: engine, sock=ours)
        except BaseException:
            process.kill()
            process.wait()
            raise
        try:
            engine.send(Start(config))
            await engine._await_ready(on_progress)
        except EngineDeadError:
            ending = await engine.end()
            raise EngineError(f"the engine process died while it was loading the model{ending}") from None
        except BaseException:
            await engine.end()
            raise
        return engine

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Never blocks; what is sent to a dead process is lost."""
        if not self._transport.is_closing():
            self._transport.write(frame(self._encoder, command))

    async def hear(self, on_event: Callable[[Event], bool | None]) -> None:
        """Hand over every event as it arrives, until the function says that this was the last one.

        It is called where the event arrives: to wake a task for each would take longer than the rest. Raises
        what it raises, and `EngineDeadError` when there will be no more events.
        """
        self._on_event, self._heard = on_event, asyncio.get_running_loop().create_future()
        try:
            self._hand_over()
            if self._gone and not self._heard.done():
                raise EngineDeadError(DEAD)
            await self._heard
        finally:
            self._on_event = None

    def _hand_over(self) -> None:
        try:
            while self._on_event is not None and not self._heard.done():
                event = self._frames.take()
                if event is None:
                    break
                if self._on_event(event):
                    self._heard.set_result(None)
        except Exception as error:
            self._heard.set_exception(error)

    # ---- what the event loop calls -------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._frames.feed(data)
        self._hand_over()

    def connection_lost(self, error: Exception | None) -> None:
        self._gone = True
        if self._on_event is not None and not self._heard.done():
            self._heard.set_exception(EngineDeadError(DEAD))

    # ---- its end -------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the process this instant; `hear` then raises."""
        self._process.kill()

    async def kill_with_stacks(self) -> None:
        """Let the process print the stacks of its threads on stderr, then end it; `hear` then raises."""
        states, _ = threads_of(self.pid)
        if states and not set(states) - set("Tt"):
            logger.error("The engine process is stopped (SIGSTOP or a debugger): it cannot print its stacks.")
        elif STACKS_SIGNAL is not None:
            logger.error("The stacks of the engine's threads follow.")
            self._process.send_signal(STACKS_SIGNAL)
            await asyncio.sleep(STACKS_S)
        self.kill()

    async def end(self, patience_s: float = 0.1) -> str:
        """Close the channel, wait, kill if need be -> " (how the process ended)"."""
        self._transport.close()
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._wait, patience_s))

    def _wait(self, patience_s: float) -> str:
        try:
            code = self._process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return ""
        return f" (exit status {code})" if code >= 0 else f" (killed by signal {-code})"

    async def _await_ready(self, on_progress: OnProgress | None) -> None:
        def on_event(event: Event) -> bool:
            if isinstance(event, Progress) and on_progress is not None:
                on_progress(event.what, event.done, event.total, event.note)
            elif isinstance(event, Failed):
                raise ConfigError(event.message, remedy=event.remedy)
            elif isinstance(event, Ready):
                self.first_stats = event.stats
                return True
            return False

        await self.hear(on_event)
