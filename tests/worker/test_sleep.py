"""An engine core that gives its memory back: what is dropped, what stays, and that nothing else changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from model_tools import BACKENDS, make_request, variant_folder

from microvllm.adapters.decoder import DecoderModel
from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.worker.model_runner import ModelGraphRunner
from microvllm.runtime.worker.parallel.runner import ParallelRunner
from microvllm.runtime.worker.sleep import TAGS, OffloadedWeights, SleepingCore, tensors_of

PROMPT = list(range(5, 45))


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """What a test has left is collected, and the rest frozen as before, or all later collections walk it."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def start(config: EngineConfig, model: DecoderModel | None) -> ModelGraphRunner:
    return ModelGraphRunner(config, model=model)


def make_core(start: Any = start, **options: Any) -> SleepingCore:
    options = {
        "dtype": "float32",
        "cpu_threads": 1,
        "num_gpu_blocks_override": 64,
        "device": "cpu",
        **options,
    }
    return SleepingCore(EngineArgs(model=str(variant_folder("llama-tied")), **options).resolve(), start)


def generated(engine: SleepingCore, request_id: int) -> tuple[list[int], int]:
    """The tokens of one request, and how many of its prompt were cached."""
    core = engine.core
    assert core is not None and core.add(make_request(request_id, PROMPT, 8)) is None
    outputs = []
    while core.has_work():
        outputs += core.step()
    return [token for output in outputs for token in output.token_ids], outputs[0].num_cached_tokens


@pytest.mark.parametrize(("backend", "log_step_times"), list(zip(BACKENDS, (True, False), strict=True)))
def test_what_a_level_drops_and_that_the_tokens_are_the_same(backend: str, log_step_times: bool) -> None:
    engine = make_core(attention_backend=backend, log_step_times=log_step_times)
    expected, _ = generated(engine, 0)
    assert generated(engine, 1) == (expected, 32)
    for level in (1, 2, 1):
        runner = engine._runner
        assert isinstance(runner, ModelGraphRunner)
        held = [weakref.ref(each) for each in (runner, engine.core, runner.masks)]
        model = weakref.ref(runner.model)
        del runner
        gc.freeze()  # as a process does once it has started
        engine.sleep(level)
        assert engine.core is None and engine.asleep == set(TAGS)
        assert not any(ref() for ref in held), "something of the core is still held"
        assert (model() is not None) == (level == 1)
        engine.wake_up(["weights"])
        assert engine.core is None and engine.asleep == {"kv_cache"}
        engine.wake_up(["kv_cache"])
        assert not engine.asleep
        assert generated(engine, 2) == (expected, 0), "the prefix cache is empty"


def test_tags_may_come_in_any_order_and_twice() -> None:
    engine = make_core()
    expected, _ = generated(engine, 0)
    engine.sleep(2)
    engine.sleep(1)
    for tags in (["kv_cache"], ["kv_cache"], ["weights"]):
        assert engine.core is None
        engine.wake_up(tags)
    core = engine.core
    engine.wake_up(TAGS)
    assert engine.core is core and generated(engine, 1) == (expected, 0)


def test_weights_that_were_taken_are_given_back_by_another_sleep() -> None:
    engine = make_core()
    expected, _ = generated(engine, 0)
    engine.sleep(2)
    engine.wake_up(["weights"])
    model = weakref.ref(engine._model)
    assert model() is not None
    engine.sleep(2)
    assert model() is None and engine.asleep == set(TAGS)
    engine.wake_up(TAGS)
    assert generated(engine, 1) == (expected, 0)


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_cannot_wake_up_may_try_again(level: int) -> None:
    problems: list[Exception] = []

    def failing(config: EngineConfig, model: DecoderModel | None) -> ModelGraphRunner | ParallelRunner:
        if problems:
            raise problems.pop()
        return start(config, model)

    engine = make_core(failing)
    expected, _ = generated(engine, 0)
    engine.sleep(level)
    problems.append(ConfigError("no room"))
    with pytest.raises(ConfigError, match="no room"):
        engine.wake_up(TAGS)
    assert engine.core is None and engine.asleep == {"kv_cache"}
    engine.wake_up(TAGS)
    assert generated(engine, 1) == (expected, 0)


class Holder:
    """A tensor in every kind of place."""

    def __init__(self) -> None:
        self.plain = torch.arange(64.0)
        self.view = self.plain[8:16]
        self.listed = [torch.ones(3), {"deep": (torch.full((2, 2), 5.0),)}]
        enclosed = torch.arange(10)
        self.call = partial(torch.add, torch.arange(4))
        self.function = lambda: enclosed + 1
        self.method = self.read

    def read(self) -> torch.Tensor:
        return self.plain


def test_every_tensor_of_an_object_is_found_once() -> None:
    found = [tensor.numel() for tensor in tensors_of(Holder())]
    assert sorted(found) == [3, 4, 4, 8, 10, 64]


def test_the_weights_of_a_device_move_and_come_back() -> None:
    holder = Holder()
    before = [tensor.clone() for tensor in (holder.plain, holder.view, holder.function())]
    moved = OffloadedWeights(holder, "cpu")
    assert moved.num_bytes == 64 * 4 + 3 * 4 + 4 * 4 + 4 * 8 + 10 * 8
    assert holder.plain.untyped_storage().nbytes() == 0 and not list(tensors_of(holder))
    moved.restore()
    moved.restore()
    after = [holder.plain, holder.view, holder.function()]
    assert all(map(torch.equal, after, before))
    holder.plain[9] = -1.0
    assert holder.view[1] == -1.0, "both still view one memory"


@torch.inference_mode()
def test_a_whole_model_moves_and_comes_back() -> None:
    """On the backend without addresses of its own, as a GPU's is."""
    engine = make_core(attention_backend="torch")
    expected, _ = generated(engine, 0)
    runner = engine._runner
    assert isinstance(runner, ModelGraphRunner)
    total = sum(tensor.nbytes for tensor in tensors_of(runner.model))
    moved = OffloadedWeights(runner.model, "cpu")
    assert 0 < moved.num_bytes <= total
    moved.restore()
    assert generated(engine, 1)[0] == expected
