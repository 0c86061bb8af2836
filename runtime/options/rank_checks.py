"""Checks `--tensor-parallel-size` and `--data-parallel-size` before a process starts. Imports no torch."""

from __future__ import annotations

from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.machine import gpu_names, usable_cores

OPTION = "--tensor-parallel-size"
ENGINES_OPTION = "--data-parallel-size"


def check_ranks(size: int, spec: ModelSpec, device: str, *, batch_invariant: bool) -> ModelSpec:
    """Return what one of `size` ranks computes of a model.

    Raises `ConfigError`, naming the flag, if the model does not divide, or not with the other options, and if
    there are too few GPUs, or different ones.
    """
    if size == 1:
        return spec
    try:
        shard = spec.sharded(size)
    except ValueError as error:
        raise ConfigError(f"{OPTION} {size}: {error}") from None
    if batch_invariant:
        raise ConfigError(f"{OPTION} {size}: --batch-invariant (VLLM_BATCH_INVARIANT=1) needs one device")
    if device == "cuda":
        _check_gpus(size, f"{OPTION} {size}")
    return shard


def check_engines(number: int, local: int | None, size: int, device: str) -> None:
    """Raise `ConfigError`, naming the flag, if the machine cannot run so many engines of `size` ranks each.

    `local`: how many of them are to be of this machine.
    """
    given = f"{ENGINES_OPTION} {number}"
    if local not in (None, number):
        raise ConfigError(f"{ENGINES_OPTION}-local {local}: all engines of {given} are of this machine")
    if number == 1:
        return
    if device == "cpu":
        if number > (cores := usable_cores()):
            raise ConfigError(f"{given}: there are {cores} processor cores")
        return
    _check_gpus(size * number, given, f" of {OPTION} {size} each" if size > 1 else "")


def _check_gpus(count: int, given: str, each: str = "") -> None:
    names = gpu_names()
    if count > len(names):
        there = f"there are {len(names)} GPUs" if len(names) > 1 else "there is one GPU"
        raise ConfigError(f"{given}{each}: {there}")
    if len(different := sorted(set(names[:count]))) > 1:
        raise ConfigError(f"{given}: the GPUs are of different kinds: {', '.join(different)}")
