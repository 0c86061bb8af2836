"""Profiles the engine process with torch's profiler, from one command to another, into a Chrome trace."""

from __future__ import annotations

import contextlib
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microvllm.runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch.profiler import profile

OPTION = "--profiler-config"


class ProfilerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of vLLM's `--profiler-config` that exist here; `torch_profiler_dir` gets the traces.

    Only the engine process is profiled, so `ignore_frontend` is always true.
    """

    profiler: Literal["torch"] | None = None
    torch_profiler_dir: str = ""
    torch_profiler_with_stack: bool = True
    torch_profiler_with_flops: bool = False
    torch_profiler_with_memory: bool = False
    torch_profiler_record_shapes: bool = False
    torch_profiler_use_gzip: bool = True
    ignore_frontend: Literal[True] = True
    delay_iterations: Literal[0] = 0
    max_iterations: Literal[0] = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> ProfilerConfig | None:
        """Returns the configuration, None if it asks for no profiler, and creates the folder.

        Raises `ConfigError` naming the key that is unknown, wrong or missing.
        """
        try:
            config = msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{OPTION}: {error}") from None
        if config.profiler is None:
            if others := sorted(values.keys() - {"profiler"}):
                raise ConfigError(f'{OPTION}: {others[0]} needs "profiler": "torch"')
            return None
        if not config.torch_profiler_dir:
            raise ConfigError(f"{OPTION}: torch_profiler_dir must name the folder for the traces")
        folder = Path(config.torch_profiler_dir).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{OPTION}: torch_profiler_dir {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"{OPTION}: torch_profiler_dir {folder} is not writable")
        return msgspec.structs.replace(config, torch_profiler_dir=str(folder))


class ProfilerStateError(Exception):
    """A profile was started twice, or stopped without a start."""


class Profiler:
    """Records one profile at a time."""

    def __init__(self) -> None:
        self._profile: profile | None = None
        self._file = Path()

    def start(self, config: ProfilerConfig, prefix: str) -> str:
        """Starts recording -> the file that `stop` will write. Raises `ProfilerStateError`."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if self._profile is not None:
            raise ProfilerStateError("A profile is running already.")
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        recording = profile(
            activities=activities,
            with_stack=config.torch_profiler_with_stack,
            with_flops=config.torch_profiler_with_flops,
            profile_memory=config.torch_profiler_with_memory,
            record_shapes=config.torch_profiler_record_shapes,
        )
        recording.start()
        ending = ".pt.trace.json" + (".gz" if config.torch_profiler_use_gzip else "")
        name = f"{prefix or 'engine'}-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}{ending}"
        self._profile, self._file = recording, Path(config.torch_profiler_dir) / name
        return str(self._file)

    def stop(self) -> str:
        """Stops recording and writes the trace -> its file. Raises `ProfilerStateError`."""
        if self._profile is None:
            raise ProfilerStateError("No profile is running.")
        recording, self._profile = self._profile, None
        recording.stop()
        recording.export_chrome_trace(str(self._file))
        return str(self._file)

    def step(self) -> AbstractContextManager[Any]:
        """A context that marks one step of the engine in the trace."""
        if self._profile is None:
            return contextlib.nullcontext()
        from torch.profiler import record_function

        return record_function("engine step")
