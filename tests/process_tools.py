"""Watching processes: who is alive, who are whose children, and waiting for something to become true."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

# For what takes a second on an idle machine: a start of the server takes 15 s of processor time, which was
# 109 s on one core beside a busy loop and others' work.
PATIENCE_S = 300.0


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    return _state(pid) not in ("", "Z")


def asleep(pid: int) -> bool:
    """Whether the main thread of a process waits for something in the kernel."""
    return _state(pid) == "S"


def stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached the main thread of a process: until then it goes on with what it does."""
    return _state(pid) == "T"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def engines_of(parent: int) -> list[int]:
    """The running engine processes that `parent` has started."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if (
            int(fields[1]) == parent
            and fields[0] != "Z"
            and b"microvllm.runtime.process.engine_main" in command
        ):
            found.append(int(folder.name))
    return found


def own_engines() -> list[int]:
    return engines_of(os.getpid())


def wait_until(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Seconds until the condition held; fails with `what` when it takes too long."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < patience_s, f"waited {patience_s:g} s in vain until {what}"
        time.sleep(0.01)
    return time.monotonic() - start


async def wait_until_async(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """The same without stopping the event loop."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < patience_s, f"waited {patience_s:g} s in vain until {what}"
        await asyncio.sleep(0.005)
    return time.monotonic() - start
