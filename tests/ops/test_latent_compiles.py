"""The kernels of latent attention as they are compiled for compute capability 9.0, which takes no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

SHARED_MEMORY = 227 << 10  # that a program may have there


def test_tiles_fit_and_are_multiplied_by_tensor_cores(tmp_path: Path) -> None:
    """The rotation, decodes, what adds their parts up, and segments; of 128 heads and of 20."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_latent_for_hopper.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["_rotate_and_write_kernel", "_attend_kernel", "_merge_kernel", "_attend_kernel"]
    assert [kernel["kernel"] for kernel in kernels] == names * 4
    for kernel in kernels:
        assert kernel["waits"] == 1
        assert kernel["shared memory"] <= SHARED_MEMORY
        if kernel["kernel"] == "_attend_kernel" and kernel["dtype"] == "bfloat16":
            assert kernel["products"] > 0
