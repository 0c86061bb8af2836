"""Starts an engine process and holds our end of the channel to it. Imports no torch."""

from __future__ import annotations

import asyncio
import subprocess

import msgspec

from microvllm.runtime.channel import HEADER_BYTES, Command, Event, Failed, Progress, Ready, Start, frame
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError, EngineDeadError, EngineError
from microvllm.runtime.program import EngineProgram
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.request import EngineStats

DEAD = "The engine process died; it is being started again."


class EngineProcess:
    """One engine process, alive until `end`; made by `start`."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.first_stats = EngineStats()
        self._process = process
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)

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
        try:
            # From here on only the loop may close the socket: it would go on watching the number, and
            # be deaf to the next socket that gets it.
            streams = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
        except BaseException:
            process.kill()
            process.wait()
            raise
        engine = cls(process, *streams)
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
        if not self._writer.is_closing():
            self._writer.write(frame(self._encoder, command))

    async def receive(self) -> Event:
        """The next event. Raises `EngineDeadError` when there will be none."""
        try:
            size = int.from_bytes(await self._reader.readexactly(HEADER_BYTES), "little")
            event: Event = self._decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EngineDeadError(DEAD) from error
        return event

    def kill(self) -> None:
        """End the process this instant; `receive` then raises."""
        self._process.kill()

    async def end(self, patience_s: float = 0.1) -> str:
        """Close the channel, wait, kill if need be -> " (how the process ended)"."""
        self._writer.close()
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
        while True:
            event = await self.receive()
            if isinstance(event, Progress) and on_progress is not None:
                on_progress(event.what, event.done, event.total, event.note)
            elif isinstance(event, Failed):
                raise ConfigError(event.message)
            elif isinstance(event, Ready):
                self.first_stats = event.stats
                return
