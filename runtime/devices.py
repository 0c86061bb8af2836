"""Which device computes. Imports no torch: the API process decides before the engine process starts."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path

from microvllm.runtime.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(wish: str) -> str:
    """ "cpu" or "cuda". Raises `ConfigError` when a GPU is asked for that cannot be used, saying why."""
    if wish not in DEVICES:
        raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, got {wish}")
    if wish == "cpu":
        return "cpu"
    problem = _why_no_cuda()
    if wish == "cuda" and problem is not None:
        raise ConfigError(f"--device cuda: {problem}")
    return "cpu" if problem is not None else "cuda"


def _why_no_cuda() -> str | None:
    """None if there is an NVIDIA GPU, a torch that was built for it, and Triton."""
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
