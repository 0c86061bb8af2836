"""What of the GPU's faster ways is in use, and the variable that switches it off."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import triton_interpreter  # noqa: F401  # isort: skip  (first, as it chooses how kernels run)

import triton

from microvllm.ops.gpu.levers import OPT_IN, OPT_IN_VARIABLE, VARIABLE, LeverError, Levers

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
