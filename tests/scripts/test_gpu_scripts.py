"""What the scripts for a GPU do without one: the counts of a test run, the command line of the comparison."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from model_tools import load_script

GPU_SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts" / "gpu"


@functools.cache
def script(name: str) -> ModuleType:
    sys.path.insert(0, str(GPU_SCRIPTS))  # where it finds its parts, as when it is run
    try:
        return load_script(f"gpu/{name}")
    finally:
        sys.path.remove(str(GPU_SCRIPTS))


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("=== 3 failed, 40 passed, 2 skipped in 9.1s ===", (40, 3, 2)),
        ("1 passed, 1 error in 2s", (1, 1, 0)),
        ("no tests ran", (0, 0, 0)),
    ],
)
def test_what_came_of_tests_is_read_from_their_summary(output: str, counts: tuple[int, int, int]) -> None:
    assert script("checks").pytest_counts(output) == counts


def test_the_shell_script_hands_the_comparison_over(tmp_path: Path) -> None:
    """With an interpreter that only notes its arguments, and the environment that vLLM gets."""
    log, site = tmp_path / "log", tmp_path / "vllm"
    for folder in ("bin", "vllm/vllm", "model", "wheels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "wheels" / "one.whl").touch()
    python = tmp_path / "bin" / "python3"
    python.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    python.chmod(0o755)
    script = GPU_SCRIPTS / "compare.sh"
    environment = {
        **{"PATH": f"{python.parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "OUT": "there"},
        "ENGINES": "microvllm vllm hf-generate vllm-offline",
    }
    words = [str(script), str(site), str(tmp_path / "model"), str(tmp_path / "wheels")]
    subprocess.run([*words, "--", "--workload", "single"], env=environment, check=True, timeout=60)
    last = log.read_text().splitlines()[-1]
    work = tmp_path / "microvllm-compare"
    assert last == (
        f"scripts/compare.py --model {tmp_path / 'model'} --device cuda --turns halt --warmup-len 64 "
        f"--keep {work / 'models'} --kv-cache-memory-bytes 23000000000 --vllm-python {work / 'python'} "
        f"--hf-python {work / 'python'} --engine microvllm --engine vllm "
        "--engine hf-generate workloads=single,concurrent35,chat --engine vllm-offline --out there "
        "--workload single"
    )
    wrapper = (work / "python").read_text()
    assert f"PYTHONPATH='{site}' VLLM_USE_FLASHINFER_SAMPLER=0" in wrapper
