"""The kernels for the matrix unit, compiled with the unit in plain C, for processors without one."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest

from microvllm.ops.cpu import build
from microvllm.ops.cpu.isa import X86_64
from microvllm.ops.cpu.tuning import Tuning

# Nothing is left to products in bfloat16, to which quantised weights and many rows are rounded.
BY_VECTORS = Tuning(matrix_rows=1 << 30, matrix_rows_quantized=1 << 30, multiplies_bf16=False)


def emulated_kernels(folder: Path) -> ctypes.CDLL:
    """The library, compiled into a folder."""
    if platform.machine() not in X86_64:
        pytest.skip("not of this architecture")
    path = folder / "emulated.so"
    headers = Path(__file__).with_name("emulated_amx")
    defined = (f"-D__{name}__" for name in ("AVX512F", "F16C", "AMX_BF16"))
    command = [*(build.find_compiler() or "cc").split(), *build.FLAGS, "-march=x86-64", *defined]
    command += ["-O1", "-w", "-Wno-psabi", "-I", str(headers), "-shared", *map(str, build.SOURCES)]
    subprocess.run([*command, "-o", str(path), "-lm"], check=True)
    return ctypes.CDLL(str(path))
