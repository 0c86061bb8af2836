"""The engine's program in a process of its own, before it is told what to load.

It imports torch meanwhile, which takes most of a start: `serve` begins with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

from microvllm.runtime.machine import default_threads, thread_environment

# What stops a service: the API process lets its requests finish, and the engine process leaves it to that.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)

# Unlike `python -m`, this does not let files of the current folder take the place of modules.
CODE = """
import sys
sys.path[:] = filter(None, sys.path)
from microvllm.runtime.process.engine_main import main
main()
"""


class EngineProgram:
    """A process and our end of the socket pair to it.

    As a context of the main thread it ends, unless somebody has taken it, and a signal that stops a service
    is a `SystemExit` with 128 + its number until an event loop handles it (SIGINT is a `KeyboardInterrupt`):
    nothing is left running by a signal that comes early.
    """

    def __init__(self, cpu_threads: int | None = None) -> None:
        """For so many threads, or as many as the processor has cores."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        try:
            # Ctrl-C reaches all processes of a terminal: blocked, it cannot interrupt the new one's imports.
            with theirs, _blocked(STOP_SIGNALS):
                self._process = subprocess.Popen(
                    [sys.executable, "-c", CODE, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **thread_environment(cpu_threads or default_threads())},
                )
        except BaseException:
            ours.close()
            raise
        self._socket = ours
        self._taken = False

    def take(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The process and the socket, now the caller's to end and to close."""
        self._taken = True
        return self._process, self._socket

    def __enter__(self) -> EngineProgram:
        # A SIGHUP that is ignored stays so: this is what nohup does.
        caught = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        self._handlers = {number: signal.signal(number, _leave) for number in caught}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if not self._taken:
            self._process.kill()
            self._process.wait()
            self._socket.close()


@contextlib.contextmanager
def _blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(number: int, _: Any) -> NoReturn:
    sys.exit(128 + number)
