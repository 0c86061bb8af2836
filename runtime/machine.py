"""Reports what this machine offers: processor cores and threads, memory, and which device computes.

Imports no torch: the API process decides before the engine process starts.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import math
import os
import platform
import re
from pathlib import Path

from microvllm.runtime.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
_CORES = "/sys/devices/system/cpu"
_CGROUP = "/sys/fs/cgroup"
# By default libgomp's threads spin at every barrier for as long as they have a core. With any other
# process on the machine, a spinning thread uses up its time slice and the thread it waits for is the
# one that is off the processor: a step then takes a hundred times as long. A short spin covers the
# gap between two operators of a step; after it the thread sleeps until it is woken.
_WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}


def usable_cores() -> int:
    """Return the number of logical cores that this process may run on."""
    return len(_affinity())


def default_threads() -> int:
    """Return the number of threads to compute with: one for each physical core of `usable_cores`.

    No more than the cgroup's share of processor time, beyond which all threads would be halted together.
    """
    physical = {_siblings(core) for core in _affinity()}
    return max(1, int(min(len(physical), _quota())))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(core: int) -> str:
    """Return a text that the logical cores of one physical core share; unknown ones share none."""
    try:
        return Path(f"{_CORES}/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(core)


def _quota() -> float:
    """Return the processor time that the cgroup (version 2 or 1) allows, in cores."""
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
    """Return the bytes of memory that can be taken without swapping; a cgroup limit counts."""
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
    """Return freed memory to the system: the GNU C library keeps much of it. Takes about a millisecond."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def freeze_objects() -> None:
    """Exempt what exists from garbage collection, once all that lives long is made.

    A collection of the oldest generation walks every object of torch and Triton, which takes up to 0.2 s.
    """
    gc.collect()
    return_freed_memory()  # the weights as they were read: they lie packed elsewhere
    gc.freeze()


def thread_environment(num_threads: int | None = None) -> dict[str, str]:
    """Return environment variables for a process with `num_threads` compute threads (None: OpenMP's default).

    What the user has set already stays.
    """
    wanted = dict(_WAITING)
    if num_threads is not None:
        wanted["OMP_NUM_THREADS"] = str(num_threads)
    return {name: value for name, value in wanted.items() if name not in os.environ}


def choose_device(requested: str) -> str:
    """Return "cpu" or "cuda". Raises `ConfigError` with the reason why a requested GPU cannot be used."""
    if requested not in DEVICES:
        raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, got {requested}")
    if requested == "cpu":
        return "cpu"
    problem = _why_no_cuda()
    if requested == "cuda" and problem is not None:
        raise ConfigError(f"--device cuda: {problem}")
    return "cpu" if problem is not None else "cuda"


def gpu_names() -> list[str]:
    """Return the name of every GPU that this process may use."""
    driver, count, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.create_string_buffer(256)
    names = []
    if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
        for index in range(count.value):  # a device's handle is its number
            driver.cuDeviceGetName(name, len(name), index)
            names.append(name.value.decode())
    return names


def device_environment(first: int, count: int) -> dict[str, str]:
    """Return environment variables by which a process sees `count` GPUs of this one's, from `first` on."""
    variable = "CUDA_VISIBLE_DEVICES"  # numbers, or names such as GPU-0d3c
    seen = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    seen = seen or [str(number) for number in range(first + count)]
    return {variable: ",".join(seen[first : first + count])}


def _why_no_cuda() -> str | None:
    """Return what is missing of an NVIDIA GPU, a torch built for it, and Triton; None if nothing is."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1 is not found)"
    count = ctypes.c_int(0)
    # The count needs no context on the GPU, so the process stays free to start others.
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver shows no GPU"
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed"
    # Importing torch would take seconds; its version file says what it was built for.
    version = Path(found.origin).with_name("version.py").read_text("utf-8")
    if re.search(r"^cuda\b.*=\s*['\"]", version, re.MULTILINE) is None:
        return "this torch was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing: pip install triton"
    return None
