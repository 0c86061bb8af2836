"""The main program of the ranks behind the first: loads its part of the model and computes what it is sent.

It ends when the other end of its socket closes, whatever it is at: a collective waits for ever for a rank
that is gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import threading

import msgspec

from microvllm.runtime.errors import NO_MEMORY_REMEDY, ConfigError, MicroVLLMError
from microvllm.runtime.machine import return_freed_memory
from microvllm.runtime.process.channel import Link
from microvllm.runtime.process.heartbeat import beat_until_hangup, print_stacks_on_signal
from microvllm.runtime.process.spawn import STOP_SIGNALS
from microvllm.runtime.worker.parallel.messages import (
    PlanMessage,
    PlanReader,
    RankBeat,
    RankFailed,
    RankHello,
    RankReady,
    StartRank,
    ToRank,
    stamp_of,
)

CONNECT_S = 60  # until the rank is connected with the others, or is ended by the system


def main() -> None:
    """Run a rank on the socket whose descriptor is the first argument."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # they were blocked until here
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print_stacks_on_signal()
    logging.disable(logging.WARNING)  # rank 0 logs them
    link: Link[ToRank] = Link(socket.socket(fileno=int(sys.argv[1])), ToRank)
    follower = _Follower(link)
    gc.disable()  # until the model is loaded: nothing of what is imported is ever freed
    importlib.import_module("microvllm.runtime.worker.pooling")  # torch takes longest
    try:
        follower.run()
    except (EOFError, OSError):
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            follower.send(_failure(error))
            link.sock.shutdown(socket.SHUT_WR)
    # Without the ends of torch's objects, which may wait for other ranks.
    os._exit(0)


def _failure(error: Exception) -> RankFailed:
    if isinstance(error, MicroVLLMError):
        return RankFailed(str(error), error.remedy)
    reason = next(iter(str(error).splitlines()), "")
    remedy = NO_MEMORY_REMEDY if isinstance(error, (MemoryError, RuntimeError)) else None
    return RankFailed(f"{type(error).__name__}: {reason}", remedy)


class _Follower:
    """Owns the link; a thread of it beats, and ends the process when the other side is gone."""

    def __init__(self, link: Link[ToRank]) -> None:
        self._link = link
        self._sending = threading.Lock()
        self._steps = 0
        self._folder: str | None = None
        threading.Thread(target=self._beat_until_hangup, name="heartbeat", daemon=True).start()

    def send(self, message: RankHello | RankReady | RankFailed | RankBeat) -> None:
        with self._sending:
            self._link.send(self._link.encode(message))

    def run(self) -> None:
        """Compute until the link ends. Raises `EOFError` or `OSError` then, and what goes wrong."""
        from microvllm.runtime.worker.parallel.groups import TorchRanks
        from microvllm.runtime.worker.pooling import make_runner

        start = self._link.receive()
        if not isinstance(start, StartRank):
            raise TypeError(f"the first message must be StartRank, not {type(start).__name__}")
        config, self._folder = start.config, start.folder
        self.send(RankHello(stamp_of(config)))
        # Torch holds the interpreter's lock while it waits: no thread would see that the others are gone.
        signal.alarm(CONNECT_S)
        ranks = TorchRanks(start.rank, config.tensor_parallel_size, config.device, start.folder)
        signal.alarm(0)
        runner = make_runner(msgspec.structs.replace(config, log_step_times=False), None, ranks)
        self.send(RankReady())
        gc.collect()
        return_freed_memory()
        gc.freeze()
        gc.enable()
        reader = PlanReader()
        while True:
            self._steps += 1
            message = self._link.receive()
            if not isinstance(message, PlanMessage):
                raise ConfigError(f"{type(message).__name__} came while plans were expected")
            runner.launch(reader.plan(message))

    def _beat_until_hangup(self) -> None:
        beat_until_hangup(self._link, lambda: self.send(RankBeat(self._steps)))
        if self._folder is not None:  # rank 0 may have been killed
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(0)
