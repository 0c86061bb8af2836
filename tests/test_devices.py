"""Which device computes, and why not the other one."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_tools import variant_folder

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.machine import choose_device
from microvllm.runtime.options.start_checks import warn_of_options


class Driver:
    """What is used of libcuda: every call answers 0, success."""

    def __init__(self, gpus: int) -> None:
        self._gpus = gpus

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._gpus
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A machine with a GPU and all that it takes; tests take something away."""
    made = SimpleNamespace(gpus=1, torch_cuda="'13.0'", packages={"torch", "triton"})

    def load(name: str) -> Driver:
        if made.gpus is None:
            raise OSError(name)
        return Driver(made.gpus)

    def find_spec(name: str) -> SimpleNamespace | None:
        (tmp_path / "version.py").write_text(
            f"__version__ = '2.11.0'\ncuda: str | None = {made.torch_cuda}\n"
        )
        return SimpleNamespace(origin=str(tmp_path / "__init__.py")) if name in made.packages else None

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return made


def test_a_gpu_is_taken_where_everything_is_there(machine: SimpleNamespace) -> None:
    assert [choose_device(wish) for wish in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ({"gpus": None}, "libcuda"),
        ({"gpus": 0}, "shows no GPU"),
        ({"torch_cuda": "None"}, "built without CUDA"),
        ({"packages": {"torch"}}, "pip install triton"),
        ({"packages": {"triton"}}, "torch is not installed"),
    ],
)
def test_without_one_of_them_the_cpu_is_taken(
    machine: SimpleNamespace, missing: dict[str, Any], says: str
) -> None:
    vars(machine).update(missing)
    assert choose_device("auto") == "cpu"
    with pytest.raises(ConfigError, match=says):
        choose_device("cuda")


@pytest.mark.parametrize(
    "wish", [{"gpu_memory_utilization": 0.5}, {"enforce_eager": True}], ids=["memory", "eager"]
)
def test_what_is_for_a_gpu_alone_warns_on_a_cpu(
    wish: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = str(variant_folder("llama-tied"))
    EngineArgs(model=model, device="cpu").resolve()
    assert "no effect" not in caplog.text
    EngineArgs(model=model, device="cpu", **wish).resolve()
    assert "no effect on a CPU" in caplog.text


def test_an_option_without_effect_beside_another_or_on_the_model_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = EngineArgs(model="m", gpu_memory_utilization=0.5, num_gpu_blocks_override=9)
    warn_of_options(size, "cuda", pools=False)
    assert caplog.messages == ["--gpu-memory-utilization: no effect beside --num-gpu-blocks-override"]
    caplog.clear()
    text = EngineArgs(model="m", max_logprobs=3, logprobs_mode="raw_logits", gpu_memory_utilization=0.5)
    warn_of_options(text, "cuda", pools=False)
    warn_of_options(EngineArgs(model="m"), "cuda", pools=True)
    assert not caplog.messages
    warn_of_options(text, "cuda", pools=True)
    assert caplog.messages == ["--max-logprobs, --logprobs-mode: no effect on a model that makes vectors"]


def test_options_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = EngineArgs(
        model=str(variant_folder("llama-tied")),
        device="cpu",
        enable_chunked_prefill=False,
        long_prefill_token_threshold=8,
    )
    with pytest.raises(ConfigError, match=r"--long-prefill-token-threshold .* --no-enable-chunked-prefill"):
        args.resolve()


@pytest.mark.parametrize(("given", "is_on"), [(None, True), (False, False), (True, True)])
def test_an_option_wins_over_a_variable(
    given: bool | None, is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    args = EngineArgs(model=str(variant_folder("llama-tied")), device="cpu", batch_invariant=given)
    assert args.resolve().batch_invariant is is_on


def test_an_unknown_device() -> None:
    with pytest.raises(ConfigError, match="--device must be one of auto, cpu, cuda, got tpu"):
        choose_device("tpu")
