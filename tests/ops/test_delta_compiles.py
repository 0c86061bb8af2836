"""The kernels of layers with a state as they are compiled for compute capability 9.0; takes no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")


def test_all_kernels_compile_in_the_sizes_of_a_real_model(tmp_path: Path) -> None:
    """Each waits once for the kernel ahead, and fits into the shared memory of smaller GPUs, too."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_delta.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kernel["name"] for kernel in kernels] == [
        *("_decode_kernel", "_delta_kernel"),
        *("_prompt_kernel", "_keep_kernel", "_prepare_kernel", "_chunks_kernel", "_norm_kernel"),
        *("_decode_kernel", "_step_kernel", "_prompt_kernel", "_keep_kernel"),
        *("_scores_kernel", "_scan_kernel", "_gate_kernel"),
    ]
    for kernel in kernels:
        assert kernel["waits"] == 1
        assert kernel["shared"] <= 64 << 10
