"""The tests of the CPU kernels once more, in processes of their own, under GCC's sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from microvllm.ops.cpu.build import find_compiler
from microvllm.ops.cpu.isa import usable_levels

# No access to memory is checked twice: the address sanitizer stops one through null, beyond an object of
# known size, or through a wrapped pointer.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
FLAGS += " -fno-sanitize=null,object-size,pointer-overflow"
FILES = ("cpu_kernels", "cpu_attention", "cpu_experts", "cpu_layers", "int8", "quantized")
# Those that build other libraries, and one that imports transformers for choices that the rest makes, too.
UNWANTED = ("building", "tokens", "kept", "option", "vectors", "portable", "choice_is_that")


def test_no_undefined_behaviour_and_no_access_out_of_bounds() -> None:
    compiler = (find_compiler() or "cc").split()
    found = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).exists():
        pytest.skip("this compiler has no libasan")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in FILES]
    wanted = " and ".join(f"not {word}" for word in UNWANTED)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", *files, "-k", wanted],
        env={
            **os.environ,
            "CC": str(Path(__file__).with_name("sanitizing_cc")),
            "KERNEL_CC": " ".join(compiler),
            "KERNEL_BEST": " ".join(next(usable_levels()).flags) or "-c",
            "KERNEL_SANITIZERS": FLAGS,
            "LD_PRELOAD": found,
            # Python and torch never free what they keep for the life of the process. The stack on which use
            # after a return is found is too little aligned for AVX-512 (GCC's bug 110027).
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "OMP_NUM_THREADS": "1",  # torch's; the kernels have threads of their own
        },
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
