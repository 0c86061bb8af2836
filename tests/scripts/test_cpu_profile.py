"""Tests the profile of decode steps in scripts/check_cpu_kernels.py."""

from pathlib import Path

import pytest
from check_cpu_kernels import step_profile

from microvllm.ops.cpu.build import find_compiler


@pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
def test_a_profile_tells_kernels_from_the_rest_of_a_step(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")  # than the tiny model's
    whole, outside, calls = step_profile(str(model), {}, streams=1, steps=3, threads=1)
    assert 0 < outside < whole
    assert calls >= 2  # all layers are one, the logits another
