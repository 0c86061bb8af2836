"""Which compiled kernels the tests run, and how many examples; fewer of both under the sanitizers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

from microvllm.ops.cpu import build, isa
from microvllm.ops.cpu.isa import X86_64, IsaError, Level
from microvllm.ops.cpu.tuning import Tuning

# Nothing is left to products in bfloat16, to which quantised weights and many rows are rounded.
BY_VECTORS = Tuning(matrix_rows=1 << 30, matrix_rows_quantized=1 << 30, multiplies_bf16=False)

# -O1 without passes over registers that take half of its time on functions as long as those of attention.
# Compiling takes longer than running, and of several -O the last counts.
QUICK: tuple[str, ...] = ("-O1",)
if "gcc" in subprocess.run([build.find_compiler() or "true", "-v"], capture_output=True, text=True).stderr:
    QUICK += ("-fno-move-loop-invariants", "-fno-forward-propagate", "-fno-dce", "-fno-dse")
    QUICK += ("-fno-if-conversion", "-fno-if-conversion2")

# What test_sanitizers.py, whose processes run these tests again, adds to the compiler's flags.
SANITIZERS = tuple(os.environ.get("KERNEL_SANITIZERS", "").split())
build.FLAGS += (*QUICK, *SANITIZERS) if SANITIZERS else ()
build.COMPILE_TIMEOUT_S *= 10 if SANITIZERS else 1

EMULATION = Path(__file__).with_name("emulated_amx")
# The matrix unit in plain C, for processors without one. The library is kept under a hash of the flags,
# which therefore have that of the header.
EMULATED = Level(
    "emulated",
    frozenset(),
    (
        *("-march=x86-64", "-D__AVX512F__", "-D__F16C__", "-D__AMX_BF16__"),
        *(*QUICK, "-w", "-I", str(EMULATION)),
        f"-DEMULATION={hashlib.sha256((EMULATION / 'immintrin.h').read_bytes()).hexdigest()}",
    ),
)


BEST = next(isa.usable_levels())


def _levels() -> tuple[Level, ...]:
    """All; under the sanitizers the best, and AVX2: half as wide vectors, no products of 8 bits."""
    if not SANITIZERS:
        return isa.levels()
    return BEST, *(level for level in isa.usable_levels() if level.name == "avx2" and level != BEST)


LEVELS = _levels()
# The best, and those below it that differ in more than products of 8 bits, which is all that VNNI adds.
EXACT_LEVELS = tuple(level for level in LEVELS if level == BEST or "vnni" not in level.name)


def examples(count: int) -> settings:
    return settings(max_examples=count // 10 if SANITIZERS else count)


def library_of(level: Level) -> ctypes.CDLL:
    """The kernels of one of `LEVELS`, or `EMULATED`; skips the test where they do not run."""
    if level is EMULATED:
        if platform.machine() not in X86_64:
            pytest.skip("not of this architecture")
        return ctypes.CDLL(str(build.build_kernels(level)))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(isa.VARIABLE, level.name)
        try:
            return build.load_kernels()
        except IsaError as error:
            pytest.skip(str(error))
