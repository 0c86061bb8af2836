"""What the scripts for a GPU compute without one: the counts of a test run."""

from __future__ import annotations

import functools
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
