"""Spawns the engine process before its model is known, so that it imports torch meanwhile.

That takes most of a start, so `serve` begins with it: nothing that loads slowly may be imported here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn

from microvllm.runtime.machine import default_threads, thread_environment

# These stop a service: the API process lets its requests finish, and the engine process ignores them.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)

# Unlike `python -m`, this does not let files of the current folder take the place of modules.
CODE = """
import sys
sys.path[:] = filter(None, sys.path)
from {module} import main
main()
"""


class SpawnedEngine:
    """A process that waits for `Start`, and the server's end of the socket pair to it.

    As a context manager of the main thread it kills the process on exit unless `detach` was called. Until an
    event loop handles them, the signals that stop a service raise `SystemExit` with 128 + their number
    (SIGINT a `KeyboardInterrupt`), so a signal that comes early leaves no process behind.
    """

    def __init__(self, cpu_threads: int | None = None, environment: Mapping[str, str] | None = None) -> None:
        """`cpu_threads`: compute threads; by default as many as the processor has cores.

        `environment`: further variables of the process.
        """
        variables = {**thread_environment(cpu_threads or default_threads()), **(environment or {})}
        # Ctrl-C reaches all processes of a terminal: blocked, it cannot interrupt the new one's imports.
        with blocked_signals(STOP_SIGNALS):
            self._process, self._socket = start_module(
                "microvllm.runtime.process.engine_main", environment=variables
            )
        self._socket.setblocking(False)
        self._detached = False

    def detach(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Return the process and the socket. The caller has to end the one and close the other."""
        self._detached = True
        return self._process, self._socket

    def __enter__(self) -> SpawnedEngine:
        # A SIGHUP that is ignored stays so: this is what nohup does.
        caught = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        self._handlers = {number: signal.signal(number, _leave) for number in caught}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if not self._detached:
            self._process.kill()
            self._process.wait()
            self._socket.close()


def start_module(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the `main` of a module in a process of its own -> it, and our end of a socket pair to it.

    In its `sys.argv` are the number of its end, and the arguments. `environment`: further variables. Raises
    `OSError` if the system lets no process start.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", CODE.format(module=module), str(theirs.fileno()), *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
    except BaseException:
        ours.close()
        raise
    return process, ours


@contextlib.contextmanager
def blocked_signals(signals: Collection[signal.Signals]) -> Iterator[None]:
    """What is started meanwhile begins with these signals blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(number: int, _: Any) -> NoReturn:
    sys.exit(128 + number)
