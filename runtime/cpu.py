"""What this machine's processor and memory offer. Imports no torch."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from pathlib import Path

_CORES = "/sys/devices/system/cpu"
_CGROUP = "/sys/fs/cgroup"


def usable_cores() -> int:
    """Number of logical cores this process may run on."""
    return len(_affinity())


def default_threads() -> int:
    """Threads that a computation gains from: one for each physical core of `usable_cores`, and no more than
    the time that a cgroup allows, beyond which all of them would be halted together."""
    physical = {_siblings(core) for core in _affinity()}
    return max(1, int(min(len(physical), _quota())))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(core: int) -> str:
    """The same text for all logical cores of one physical core; one of its own if the system does not say."""
    try:
        return Path(f"{_CORES}/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(core)


def _quota() -> float:
    """Cores' worth of time that the cgroup (version 2 or 1) allows."""
    try:
        try:
            limit, period = Path(f"{_CGROUP}/cpu.max").read_text().split()
        except OSError:
            limit = Path(f"{_CGROUP}/cpu/cpu.cfs_quota_us").read_text()
            period = Path(f"{_CGROUP}/cpu/cpu.cfs_period_us").read_text()
        return int(limit) / int(period) if int(limit) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return math.inf


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping; a cgroup limit counts."""
    available = 4 << 30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        if platform.system() == "Darwin":
            available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return available


def return_freed_memory() -> None:
    """Give the system back what was freed: the GNU C library keeps much of it. Takes about a millisecond."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
