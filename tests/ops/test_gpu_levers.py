"""What of the GPU's faster ways is in use, and the variable that switches it off."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

import triton

from microvllm.ops.gpu.levers import OPT_IN, OPT_IN_VARIABLE, VARIABLE, LeverError, Levers
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.tunings import guessed_tilings

GPU = torch.device("cuda")
USUAL = Levers(*(field.name not in OPT_IN for field in fields(Levers)))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H200 with the version of Triton that Gluon is used with."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(OPT_IN_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    return monkeypatch


def test_all_are_in_use_where_they_can_be(hopper: Any) -> None:
    assert Levers.of(GPU) == USUAL
    assert USUAL.rules and USUAL.block_w8a8 and not USUAL.peers
    assert Levers.of(torch.device("cpu")) == Levers()


def test_another_triton_has_no_streamed_products(hopper: Any) -> None:
    hopper.setattr(triton, "__version__", "3.8.0")
    assert Levers.of(GPU) == replace(USUAL, stream=False)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_another_gpu_has_none(hopper: Any, capability: tuple[int, int]) -> None:
    hopper.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert Levers.of(GPU) == Levers()


def test_each_can_be_switched_off(hopper: Any) -> None:
    hopper.setenv(VARIABLE, "stream, boxes,rules")
    assert Levers.of(GPU) == replace(USUAL, stream=False, boxes=False, rules=False)
    for field in fields(Levers):
        hopper.setenv(VARIABLE, field.name)
        assert Levers.of(GPU) == replace(USUAL, **{field.name: False})


def test_an_unknown_one_is_refused(hopper: Any) -> None:
    hopper.setenv(VARIABLE, "stream,turbo")
    with pytest.raises(LeverError, match="there is no turbo; there are stream, early_reads, boxes, pack"):
        Levers.of(GPU)


def test_some_are_in_use_only_where_they_are_named(hopper: Any) -> None:
    assert OPT_IN and not Levers.of(GPU).peers
    hopper.setenv(OPT_IN_VARIABLE, "peers")
    assert Levers.of(GPU) == replace(USUAL, peers=True)
    hopper.setenv(VARIABLE, "peers")
    assert not Levers.of(GPU).peers
    hopper.setenv(OPT_IN_VARIABLE, "turbo")
    with pytest.raises(LeverError, match="MICROVLLM_GPU_ON: there is no turbo"):
        Levers.of(GPU)


# Gemma 3 12B's qkv, gate and up, down, head; Qwen3.5-9B's down, gate and up.
UNTIMED = [
    *((8192, 3840, False), (30720, 3840, False), (3840, 15360, False), (262208, 3840, False)),
    *((4096, 12288, False), (12288, 4096, True)),
]


@pytest.mark.parametrize(("n", "k", "gated"), UNTIMED)
def test_guessed_tilings_fit_a_multiprocessor(n: int, k: int, gated: bool) -> None:
    """What the kernel can take, for each number of rows; splits leave a program some steps."""
    for rows, tiling in guessed_tilings(n, k, gated=gated).items():
        if tiling is not None:
            assert 2 < rows <= 32 and tiling.block_n % (16 * tiling.warps) == 0 == tiling.block_k % 64
            step = 2 * tiling.block_k * (tiling.block_n * (1 + gated) + rows)
            assert step * tiling.stages < 220 << 10
            assert k // tiling.block_k // tiling.splits >= 2 * tiling.stages


def test_products_without_timed_tilings_are_streamed_where_that_is_named(hopper: Any) -> None:
    hopper.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    ops = GpuOperators(torch.bfloat16, DEVICE, "triton")
    weight = torch.zeros(192, 640, dtype=torch.bfloat16, device=DEVICE)
    for named in (False, True):
        ops.levers = replace(ops.levers, stream=True, more_streams=named)
        streamed = ops.linear(weight)._streamed
        assert (streamed is not None) == named
    assert streamed.tiling(2) is None and streamed.tiling(8) is not None and streamed.tiling(33) is None
