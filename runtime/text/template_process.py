"""Renders chat templates in child processes, which are killed at a limit of time or memory.

A comparison of two nested lists or `"a" * 10**9` is one call into C: nothing inside the process can interrupt
it, and it holds the interpreter's lock. A child has a limit on its address space and on its processor time;
its parent kills it at the deadline and starts another at once. A frame is 4 bytes of length (little endian)
and a map as msgpack, or as JSON where it holds an integer beyond 64 bits or an unpaired surrogate.

Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import msgspec

from microvllm.runtime.errors import EngineError, InvalidRequestError
from microvllm.runtime.text.template_sandbox import Sandbox

logger = logging.getLogger("microvllm.templates")

CHILDREN = 2  # while one is at a long template, the other serves
DEADLINE_S = 3.0
COMPILE_DEADLINES = 5  # of these a first compilation may take: without it the model has no chat
START_S = 60.0  # for Python and Jinja, on a machine that is busy or short of memory
MAX_CHARS = 8_000_000
MEMORY_BYTES = 512 << 20  # of address space, of each child
HEADER_BYTES = 4
TOO_DEEP = "The conversation is nested too deeply for a chat template."
# Unlike `python -m`, this does not let files of the current folder take the place of modules.
CODE = """
import sys
sys.path[:] = filter(None, sys.path)
from microvllm.runtime.text.template_process import main
main()
"""


class SandboxProcesses:
    """Renders chat templates as `Sandbox` does, in child processes; safe to use from threads.

    A call waits for a free child; `render` takes at most `deadline_s` seconds from then on. Raises
    `InvalidRequestError` for what the sandbox refuses and for a template at one of the limits, `EngineError`
    where no child can be started. The children end when this object goes, or the process.
    """

    def __init__(
        self,
        *,
        children: int = CHILDREN,
        deadline_s: float = DEADLINE_S,
        memory_bytes: int = MEMORY_BYTES,
        max_chars: int = MAX_CHARS,
    ) -> None:
        self._count = children
        self._deadline_s = deadline_s
        self._limits = {"memory_bytes": memory_bytes, "max_chars": max_chars}
        self._lock = threading.Lock()
        # In the order of their last use, so that a new child starts while the others serve. None stands for
        # one that could not be started.
        self._idle: queue.Queue[_Child | None] | None = None
        self._running: list[_Child] = []
        weakref.finalize(self, _end_all, self._running)

    def content_format(self, source: str) -> str:
        """Returns the form of contents that a template was written for. Raises as described there."""
        return self._ask({"source": source}, COMPILE_DEADLINES * self._deadline_s)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Returns the text of a template with these variables. Raises as described there."""
        return self._ask({"source": source, "variables": variables}, self._deadline_s)

    def _ask(self, question: Mapping[str, Any], seconds: float) -> str:
        try:
            message = _frame({**question, "seconds": seconds})
        except RecursionError:
            raise InvalidRequestError(TOO_DEEP) from None
        except (TypeError, ValueError) as error:  # offline, a variable may be any object
            raise InvalidRequestError(f"The chat template cannot take a value: {error}.") from None
        idle = self._children()
        child, answer = idle.get(), None
        try:
            if child is None or not child.alive():
                child = self._replace(child)
            if child is None:
                raise EngineError("no process for chat templates can be started")
            answer = child.ask(message, seconds)
        except TimeoutError:
            problem = f"The chat template was still running after {seconds:g} s and was stopped."
        except OSError:
            problem = (
                "The chat template was killed: it exceeded the time or memory limit "
                f"({self._limits['memory_bytes'] / (1 << 20):g} MB)."
            )
        finally:
            # A child whose answer is still to come would give it to the next request.
            idle.put(self._replace(child) if answer is None else child)
        if answer is None:
            logger.warning("%s", problem)
            raise InvalidRequestError(problem)
        if "error" in answer:
            raise InvalidRequestError(answer["error"])
        return answer["value"]

    def _children(self) -> queue.Queue[_Child | None]:
        """Start all at the first call, so that a server without chats has none and no later call waits."""
        with self._lock:
            if self._idle is None:
                self._idle = queue.Queue()
                for _ in range(self._count):
                    self._idle.put(self._replace(None))
            return self._idle

    def _replace(self, child: _Child | None) -> _Child | None:
        """Ends a child and starts another; None if the system lets no process start."""
        if child is not None:
            self._running.remove(child)
            child.end()
        try:
            child = _Child(self._limits)
        except OSError as error:
            logger.error("No process for chat templates can be started: %s", error)
            return None
        self._running.append(child)
        return child


def _end_all(children: list[_Child]) -> None:
    for child in children:
        child.end()


class _Child:
    """One child process and our end of the socket pair to it."""

    def __init__(self, limits: Mapping[str, float]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", CODE, str(theirs.fileno()), json.dumps(limits)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
        except BaseException:
            ours.close()
            raise
        self._socket = ours
        self._ready = False

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: bytes, seconds: float) -> dict[str, str]:
        """Returns the answer. Raises `TimeoutError` after so many seconds, `OSError` if the child is gone.

        The time in which a new child starts does not count; `EngineError` if it does not start.
        """
        if not self._ready:
            try:
                _receive(self._socket, time.monotonic() + START_S)
            except OSError as error:
                raise EngineError(f"a process for chat templates did not start: {error}") from error
            self._ready = True
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(message)
        return _receive(self._socket, deadline)

    def end(self) -> None:
        """Kills the child, which holds nothing that must be finished."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _frame(message: Mapping[str, Any]) -> bytes:
    try:
        body = msgspec.msgpack.encode(message)
    except (OverflowError, UnicodeEncodeError):
        body = json.dumps(message).encode()
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def _receive(sock: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """Returns the message of a frame. Raises `TimeoutError` at the deadline, `OSError` at the end of file."""

    def exactly(size: int) -> bytearray:
        data = bytearray(size)
        free = memoryview(data)
        while free:
            if deadline is not None:
                sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            received = sock.recv_into(free)
            if not received:
                raise ConnectionResetError("the other side is gone")
            free = free[received:]
        return data

    body = exactly(int.from_bytes(exactly(HEADER_BYTES), "little"))
    message: dict[str, Any] = json.loads(body) if body.startswith(b"{") else msgspec.msgpack.decode(body)
    return message


# ---- in the child --------------------------------------------------------------------------------


def main() -> None:
    """Render templates until the parent closes the socket whose descriptor is the first argument."""
    # Ctrl-C and a stop of the whole service reach every process; the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    limits = json.loads(sys.argv[2])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, limits["memory_bytes"])
    sandbox = Sandbox(limits["max_chars"])
    with contextlib.suppress(OSError, MemoryError):  # the parent is gone, or no memory is left
        sock.sendall(_frame({}))
        while True:
            question = _receive(sock)
            # The system ends this process if the parent has gone in the middle of an endless template.
            _limit(resource.RLIMIT_CPU, int(time.process_time() + question["seconds"]) + 2)
            answer = _answer(sandbox, question)
            del question
            sock.sendall(_frame(answer))


def _limit(what: int, value: int) -> None:
    # A lower limit stays, and macOS has none of the address space.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def _answer(sandbox: Sandbox, question: dict[str, Any]) -> dict[str, str]:
    try:
        if "variables" not in question:
            return {"value": sandbox.content_format(question["source"])}
        return {"value": sandbox.render(question["source"], question["variables"])}
    except InvalidRequestError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    main()
