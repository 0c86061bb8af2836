"""What the GPU's device object does in which order, with parts that only write down their calls.

That the parts compute the right thing is tested in tests/gpu, that of a CPU everywhere else.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from microvllm.runtime.core.plan import StepPlan
from microvllm.runtime.errors import EngineError
from microvllm.runtime.worker.device import Device, GpuDevice
from microvllm.runtime.worker.step_inputs import StepArrays

PLAN = StepPlan((), (), ())
ITEMS: list[Any] = [object(), object()]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    parts = mock.Mock()
    parts.graphs.send.return_value = 8
    parts.graphs.replay.return_value = "ids", "logits", "tokens"
    parts.inputs.make.return_value = "ids", "batch"
    monkeypatch.setattr(StepArrays, "of", parts.arrays)
    return parts


@pytest.fixture
def device(parts: mock.Mock) -> GpuDevice:
    device = object.__new__(GpuDevice)
    Device.__init__(device)
    device.device_clock = parts.clock
    device.inputs = parts.inputs
    device._graphs, device._prompt_graphs = parts.graphs, parts.prompts
    device._parts = parts
    return device


def names(parts: mock.Mock) -> list[str]:
    return [name for name, _, _ in parts.mock_calls]


@pytest.mark.parametrize("plain", [True, False])
def test_a_decode_step_is_replayed(device: GpuDevice, parts: mock.Mock, plain: bool) -> None:
    choice = ("tokens", None) if plain else (None, "by masks")
    parts.graphs.covers.return_value, parts.graphs.choose.return_value = True, choice
    replay = device.replay(ITEMS)
    assert replay is not None and (replay.ids, replay.logits) == ("ids", "logits")
    assert names(parts) == ["graphs.covers", "graphs.send", "clock.begin", "graphs.replay", "graphs.choose"]
    parts.graphs.replay.assert_called_once_with(8, len(ITEMS))
    assert (replay.read_tokens, replay.choose) == choice
    assert device.clock._part == "forward"


def test_a_step_that_no_decode_graph_covers_notes_its_blocks(device: GpuDevice, parts: mock.Mock) -> None:
    parts.graphs.covers.return_value = False
    assert device.replay(ITEMS) is None
    assert names(parts) == ["graphs.covers", "graphs.note_blocks"]


def test_a_small_step_with_prompts_is_replayed_and_a_large_one_is_not(
    device: GpuDevice, parts: mock.Mock
) -> None:
    tables = np.zeros((2, 2))
    forward = device.forward(ITEMS, tables)
    assert forward is parts.prompts.forward.return_value
    assert names(parts) == ["arrays", "prompts.size_for", "prompts.send", "clock.begin", "prompts.forward"]
    parts.reset_mock()
    parts.prompts.size_for.return_value = None
    assert device.forward(ITEMS, tables) == ("ids", parts.model.forward.return_value)
    assert names(parts) == [
        *("arrays", "prompts.size_for", "inputs.make", "clock.begin"),
        *("attention.begin_step", "model.forward"),
    ]


def test_without_graphs_every_step_is_eager(device: GpuDevice, parts: mock.Mock) -> None:
    device._graphs = device._prompt_graphs = None
    assert device.replay(ITEMS) is None and device.graph_replays == device.padded_tokens == 0
    device.forward(ITEMS, np.zeros((2, 2)))
    assert names(parts) == [
        *("arrays", "inputs.make", "clock.begin", "attention.begin_step", "model.forward"),
    ]


def test_a_step_runs_in_inference_mode_and_ends_its_time(device: GpuDevice, parts: mock.Mock) -> None:
    assert device.run(lambda plan: (plan, torch.is_inference_mode_enabled()), PLAN) == (PLAN, True)
    assert names(parts) == ["clock.end"]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RuntimeError("CUDA error: an illegal memory access\nmore"), EngineError),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError),
        (ValueError("a request's own"), ValueError),
    ],
)
def test_a_fault_of_the_gpu_ends_the_engine_and_no_other_does(
    device: GpuDevice, parts: mock.Mock, raised: Exception, seen: type[Exception]
) -> None:
    def launch(plan: StepPlan) -> None:
        raise raised

    with pytest.raises(
        seen, match=r"^(the GPU failed: CUDA error: an illegal memory access|no memory|a req.*)$"
    ):
        device.run(launch, PLAN)
    assert not parts.clock.end.called
