"""The engine's program in a process of its own, before it is told what to load.

It imports torch meanwhile, which takes most of a start: `serve` begins with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import Any, NoReturn

from microvllm.runtime.cpu import default_threads
from microvllm.runtime.threads import thread_environment

# Unlike `python -m`, this does not let files of the current folder take the place of modules.
CODE = """
import sys
sys.path[:] = filter(None, sys.path)
from microvllm.runtime.process.engine_main import main
main()
"""


class EngineProgram:
    """A process and our end of the socket pair to it.

    As a context of the main thread it ends, unless somebody has taken it, and SIGTERM is a `SystemExit` with
    128 + its number until an event loop handles it: nothing is left running by a signal that comes early.
    """

    def __init__(self, cpu_threads: int | None = None) -> None:
        """For so many threads, or as many as the processor has cores."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        try:
            with theirs:
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
        self._handler = signal.signal(signal.SIGTERM, _leave)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._handler)
        if not self._taken:
            self._process.kill()
            self._process.wait()
            self._socket.close()


def _leave(number: int, _: Any) -> NoReturn:
    sys.exit(128 + number)
