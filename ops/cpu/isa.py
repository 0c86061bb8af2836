"""Which vector instructions the kernels are compiled for: an instruction-set level.

Not `-march=native`: a hypervisor or an emulator may tell the compiler of a processor whose instructions it
does not let through. The level comes from the features that the operating system found usable, and the
compiled library asks the processor once more (`runs_here` in isa.c).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "MICROVLLM_CPU_ISA"
X86_64 = ("x86_64", "AMD64")


class IsaError(ValueError):
    """The level that `VARIABLE` asks for cannot be had; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Level:
    """features: what /proc/cpuinfo has to list; flags: the compiler's."""

    name: str
    features: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")


def _level(name: str, *features: str) -> Level:
    options = (feature.replace("amx_", "amx-").replace("_", "") for feature in features)
    return Level(name, frozenset(features), tuple(f"-m{option}" for option in options))


# Those of x86-64, the best first. Elsewhere there is one: NEON belongs to every 64-bit Arm.
# VNNI multiplies activations of 8 bits, AMX or AVX512-BF16 many rows with bfloat16 weights. A few rows are
# left to float32, as AVX512-BF16 would round them. It does twice as many products a second as float32 on a
# Zen 5, and a third as many on an Emerald Rapids, which has AMX (scripts/check_cpu_kernels.py).
_LEVELS = (
    _level("amx", *_AVX512, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    _level("avx512_bf16", *_AVX512, "avx512_vnni", "avx512_bf16"),
    _level("avx512_vnni", *_AVX512, "avx512_vnni"),
    _level("avx512", *_AVX512),
    _level("avx2_vnni", *_AVX2, "avx_vnni"),
    _level("avx2", *_AVX2),
    Level("portable", frozenset(), ("-march=x86-64",)),
)
_ELSEWHERE = (Level("portable", frozenset(), ()),)


def levels() -> tuple[Level, ...]:
    """Those of this architecture, the best first, whether or not this processor has them."""
    return _LEVELS if platform.machine() in X86_64 else _ELSEWHERE


def usable_levels() -> Iterator[Level]:
    """Levels to try on this processor, the best first; `VARIABLE` in the environment names the best allowed.

    Raises `IsaError`, when the first is asked for, if it names none or one that this processor lacks.
    """
    wish = os.environ.get(VARIABLE) or levels()[0].name
    names = [level.name for level in levels()]
    if wish not in names:
        raise IsaError(f"{VARIABLE}={wish}: must be one of {', '.join(names)}")
    features = cpu_features()
    for level in levels()[names.index(wish) :]:
        missing = set() if features is None else level.features - features
        if not missing:
            yield level
        elif level.name == os.environ.get(VARIABLE):
            raise IsaError(f"{VARIABLE}={wish}: this processor has no {', '.join(sorted(missing))}")


def cpu_features() -> frozenset[str] | None:
    """What the operating system lets programs use of the processor; None where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith(("flags", "Features"))), None)
    return None if line is None else frozenset(line.partition(":")[2].split())


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 by itself (AVX512-BF16, AMX or Arm's BF16)."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_features() or ())
