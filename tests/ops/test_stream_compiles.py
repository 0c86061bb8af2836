"""The streamed products as they are compiled for compute capability 9.0, with or without a GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

import triton

from microvllm.ops.gpu.levers import GLUON_VERSION


@pytest.mark.skipif(
    not triton.__version__.startswith(GLUON_VERSION), reason=f"written for Triton {GLUON_VERSION}x"
)
def test_weights_are_under_way_before_the_wait(tmp_path: Path) -> None:
    """A whole ring of them, by the copy engine; x only behind the wait; 8 rows are not padded to more."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(kernel["codes"], kernel["gated"]) for kernel in kernels] == [
        *((False, gated) for gated in (False, True)),
        *((True, gated) for gated in (False, True, False, True)),
    ]
    for kernel in kernels:
        halves = 2 if kernel["gated"] else 1
        assert kernel["copies before the wait"] == kernel["stages"] * halves
        assert (
            kernel["copies after the wait"] == kernel["stages"] + halves + 1
        )  # x of all stages, a whole step
        assert kernel["products"] > 0
        assert kernel["slow conversions"] == 0 and kernel["spills"] == 0
        assert kernel["shared memory"] < 110 * 1024  # so that the next kernel's ring finds room beside it
