"""Starts the processes of the ranks behind the first, and notices when one dies, hangs or differs.

Each ends with its socket pair, so that none outlives the process that started it. Imports no torch: a rank
imports it meanwhile.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError, EngineError
from microvllm.runtime.machine import thread_environment
from microvllm.runtime.process.channel import Link
from microvllm.runtime.process.heartbeat import Watch, longest_step_s
from microvllm.runtime.process.spawn import STOP_SIGNALS, blocked_signals, start_module
from microvllm.runtime.worker.parallel.messages import (
    FromRank,
    RankBeat,
    RankFailed,
    RankHello,
    RankReady,
    StartRank,
    ToRank,
)

TICK_S = 1.0
EXIT_S = 1.0  # for a process whose socket was closed, until it is killed
CAUSE_S = 2.0  # until a rank's end is noticed, after what it does to the others

OnFailure = Callable[[RankFailed], None]


class RankProcesses:
    """The ranks 1 to `tensor_parallel_size` - 1. `folder`: where all ranks find each other.

    When a rank has failed, all of them are ended, and a thread calls `on_failure` if there is one, then what
    `abort_with` was given: what rank 0 computes may never end by itself.
    """

    def __init__(self, config: EngineConfig, on_failure: OnFailure | None) -> None:
        self.folder = tempfile.mkdtemp(prefix="microvllm-")
        self.failure: RankFailed | None = None
        self._abort: weakref.WeakMethod[Callable[[], None]] | None = None
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._ranks: list[_Rank] = []
        self._ending = weakref.finalize(self, _end, self._ranks, self.folder)
        try:
            for rank in range(1, config.tensor_parallel_size):
                self._ranks.append(_Rank(rank, config))
        except BaseException:
            self._ending()
            raise

    def abort_with(self, abort: Callable[[], None]) -> None:
        """Call a method when a rank has failed, if its object is still there."""
        # Of torch's objects the last owner must not be a thread that outlives the interpreter.
        self._abort = weakref.WeakMethod(abort)

    def start(self, config: EngineConfig, stamp: str) -> None:
        """Give each rank its part, and wait until all are there.

        Raises `ConfigError` or `EngineError` that names a rank that is not, or that differs from this one.
        """
        watching = weakref.WeakMethod(self._watch)
        for each in self._ranks:
            each.send(each.link.encode(StartRank(config, each.rank, self.folder)))
            each.watch(watching)
        self._wait(lambda rank: rank.stamp is not None)
        for each in self._ranks:
            if each.stamp != stamp:
                raise ConfigError(
                    f"rank {each.rank} (process {each.pid}) differs from rank 0: {each.stamp} is not {stamp}"
                )

    def wait_ready(self) -> None:
        """Wait until every rank has loaded its part. Raises as `start` does."""
        self._wait(lambda rank: rank.ready)

    def send(self, message: ToRank) -> None:
        """Send a message to every rank. Raises `EngineError` if one is gone."""
        data = self._ranks[0].link.encode(message)
        try:
            for each in self._ranks:
                each.send(data)
        except OSError as error:
            raise self.error(str(error)) from error

    def error(self, reason: str) -> EngineError:
        """The error of a step that failed: the rank at fault if there is one, else the reason."""
        with self._changed:  # what rank 0 sees first may be what a rank's end does to it
            self._changed.wait_for(lambda: self.failure is not None, CAUSE_S)
        return EngineError(self.failure.message if self.failure else reason)

    def end(self) -> None:
        """End all processes, and wait for them."""
        self._ending()

    def _wait(self, done: Callable[[_Rank], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or all(map(done, self._ranks)))
        if self.failure is not None:
            raise ConfigError(self.failure.message, remedy=self.failure.remedy)

    def _watch(self, rank: _Rank) -> bool:
        """Read what a rank sends for a while; False once it has failed or was ended."""
        failure = rank.listen()
        if not self._ending.alive:
            return False
        if failure is not None:
            self._ending()
            if self._on_failure is not None:  # first of all: it may end the process
                self._on_failure(failure)
        with self._changed:
            self.failure = failure
            self._changed.notify_all()
        if failure is not None and self._abort is not None and (abort := self._abort()) is not None:
            abort()
        return failure is None


class _Rank:
    """One process, and this end of the socket pair to it."""

    def __init__(self, rank: int, config: EngineConfig) -> None:
        self.rank = rank
        self.stamp: str | None = None
        self.ready = False
        # Ctrl-C reaches all processes of a terminal, and rank 0 decides when the others may go.
        with blocked_signals(STOP_SIGNALS):
            self._process, ours = start_module(
                "microvllm.runtime.worker.parallel.rank_main",
                environment=thread_environment(config.cpu_threads),
            )
        self.link: Link[FromRank] = Link(ours, FromRank)
        self.pid = self._process.pid
        self._limit_s = longest_step_s(config)
        self._watched = Watch(self.pid, self._limit_s)
        self._sent = self._launched = 0
        self._thread: threading.Thread | None = None

    def watch(self, watching: Callable[[], Callable[[_Rank], bool] | None]) -> None:
        """Start a thread that calls what `watching` gives with this rank, until that is False or gone."""

        def run() -> None:
            while (call := watching()) is not None and call(self):
                del call

        self._thread = threading.Thread(target=run, name=f"rank {self.rank}", daemon=True)
        self._thread.start()

    def send(self, data: bytes) -> None:
        self._sent += 1
        self.link.send(data)

    def listen(self) -> RankFailed | None:
        """Read for at most `TICK_S` -> why the rank has failed, if it has."""
        try:
            message = self.link.receive(TICK_S)
        except TimeoutError:
            message = None
        except (EOFError, OSError):
            return RankFailed(self._named(f"died{self._status()}"))
        if isinstance(message, RankFailed):
            return RankFailed(self._named(f"failed: {message.message}"), message.remedy)
        if isinstance(message, RankHello):
            self.stamp = message.stamp
        elif isinstance(message, RankReady):
            self.ready, self._watched = True, Watch(self.pid, self._limit_s)
        elif isinstance(message, RankBeat):
            self._watched.on_beat(resting=True)
            if message.steps != self._launched:
                self._launched = message.steps
                self._watched.on_step()
        if not self.ready:
            return None
        problem = self._watched.tick(self._sent > self._launched, TICK_S)
        return RankFailed(self._named(problem)) if problem is not None else None

    def _named(self, problem: str) -> str:
        return f"rank {self.rank} (process {self.pid}) {problem}"

    def _status(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(EXIT_S)
            return f" (exit status {code})" if code >= 0 else f" (killed by signal {-code})"
        return ""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # also wakes the thread that reads it
            self.link.sock.shutdown(socket.SHUT_RDWR)

    def end(self, deadline: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self._process.kill()
        self._process.wait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(EXIT_S)
        self.link.sock.close()


def _end(ranks: Sequence[_Rank], folder: str) -> None:
    for each in ranks:
        each.close()
    deadline = time.monotonic() + EXIT_S
    for each in ranks:
        each.end(deadline)
    shutil.rmtree(folder, ignore_errors=True)
