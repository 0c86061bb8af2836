"""Products with codes of 4 and 8 bits as they are compiled for compute capability 9.0, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")


def test_kernels_of_codes_compile_and_spill_nothing(tmp_path: Path) -> None:
    """Of groups of 16, too, whose runs are as short as a tensor core allows."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_coded_for_hopper.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 13
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel  # it would go to memory at every step
        assert kernel["shared memory"] <= 99 << 10, kernel
        # Codes go into registers, 16 bytes at once, before x is known.
        assert not kernel["name"].startswith("early") or kernel["early loads"] >= 4, kernel
        # Zero points of two steps, with two groups each, before x is known; then of another in each step.
        asked = (4, 6) if kernel["name"] == "product AWQ, fetched" else (0, 0)
        assert (kernel["early requests"], kernel["requests"]) == asked, kernel
    taken = {kernel["name"]: kernel["shared memory"] for kernel in kernels}
    # Codes less their zero points go by way of registers, not of 16 KB that take a second program's place.
    assert taken["product AWQ"] == taken["product AWQ, fetched"] == taken["product GPTQ"]
