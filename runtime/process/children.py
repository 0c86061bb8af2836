"""Answers questions in child processes, which are killed at a limit of time or memory.

One call into C can take minutes, and may hold the interpreter's lock: nothing inside the process can
interrupt it. A child has a limit on its address space and on its processor time; its parent kills it at the
deadline and starts another at once. A frame is 4 bytes of length (little endian) and a map as msgpack, or as
JSON where it holds an integer beyond 64 bits or an unpaired surrogate.

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
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from microvllm.runtime.errors import EngineError, InvalidRequestError
from microvllm.runtime.process.spawn import start_module

logger = logging.getLogger("microvllm.children")

START_S = 60.0  # for Python and its imports, on a machine that is busy or short of memory
HEADER_BYTES = 4


class ChildProcesses:
    """Asks a module's `main`, which calls `serve`, in child processes; safe to use from threads.

    A call waits for a free child. While one is at a long question, the others serve. `what` is the subject
    of the errors, "chat template" for example; `limits` go to `serve`. The children end when this object
    goes, or the process.
    """

    def __init__(self, module: str, what: str, limits: Mapping[str, float], children: int) -> None:
        self._module, self._what = module, what
        self._limits = limits
        self._count = children
        self._lock = threading.Lock()
        # In the order of their last use, so that a new child starts while the others serve. None stands for
        # one that could not be started.
        self._idle: queue.Queue[_Child | None] | None = None
        self._running: list[_Child] = []
        weakref.finalize(self, _end_all, self._running)

    def ask(self, question: Mapping[str, Any], seconds: float) -> Any:
        """Return the answer, at most `seconds` after a child was free.

        Raises `InvalidRequestError` for what the child refuses and for a question at one of the limits,
        `EngineError` where no child can be started, `TypeError` or `ValueError` for a value that cannot
        travel.
        """
        message = _frame({**question, "seconds": seconds})
        idle = self._children()
        child, answer = idle.get(), None
        try:
            if child is None or not child.alive():
                child = self._replace(child)
            if child is None:
                raise EngineError(f"no process for {self._what}s can be started")
            answer = child.ask(message, seconds)
        except TimeoutError:
            problem = f"The {self._what} was still running after {seconds:g} s and was stopped."
        except OSError:
            problem = (
                f"The {self._what} was killed: it exceeded the time or memory limit "
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
        """Start all at the first call: a server that asks nothing has none, and no later call waits."""
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
            child = _Child(self._module, self._what, self._limits)
        except OSError as error:
            logger.error("No process for %ss can be started: %s", self._what, error)
            return None
        self._running.append(child)
        return child


def _end_all(children: list[_Child]) -> None:
    for child in children:
        child.end()


class _Child:
    """One child process and our end of the socket pair to it."""

    def __init__(self, module: str, what: str, limits: Mapping[str, float]) -> None:
        self._process, self._socket = start_module(module, json.dumps(limits))
        self._what = what
        self._ready = False

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: bytes, seconds: float) -> dict[str, Any]:
        """Returns the answer. Raises `TimeoutError` after so many seconds, `OSError` if the child is gone.

        The time in which a new child starts does not count; `EngineError` if it does not start.
        """
        if not self._ready:
            try:
                _receive(self._socket, time.monotonic() + START_S)
            except OSError as error:
                raise EngineError(f"a process for {self._what}s did not start: {error}") from error
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


def serve(prepare: Callable[[dict[str, Any]], Callable[[dict[str, Any]], Any]]) -> None:
    """Answer questions until the parent closes the socket whose descriptor is the first argument.

    prepare: takes the limits and returns what answers a question; both run in the limits.
    `InvalidRequestError` is a refusal.
    """
    # Ctrl-C and a stop of the whole service reach every process; the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    limits = json.loads(sys.argv[2])
    _limit(resource.RLIMIT_CORE, 0)
    # Beside what the imports have mapped: NumPy maps some 30 MB for each of the machine's cores.
    _limit(resource.RLIMIT_AS, _mapped_bytes() + limits["memory_bytes"])
    answer = prepare(limits)
    with contextlib.suppress(OSError, MemoryError):  # the parent is gone, or no memory is left
        sock.sendall(_frame({}))
        while True:
            question = _receive(sock)
            # The system ends this process if the parent has gone in the middle of an endless question.
            _limit(resource.RLIMIT_CPU, int(time.process_time() + question["seconds"]) + 2)
            try:
                reply = {"value": answer(question)}
            except InvalidRequestError as error:
                reply = {"error": str(error)}
            del question
            sock.sendall(_frame(reply))


def _mapped_bytes() -> int:
    """The address space of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _limit(what: int, value: int) -> None:
    # A lower limit stays, and macOS has none of the address space.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (value, resource.getrlimit(what)[1]))
