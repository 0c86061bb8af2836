"""What a decode step costs beside its kernels, counted: each of torch's operators comes from memory again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from model_tools import make_engine, make_request, variant_folder
from torch.utils._python_dispatch import TorchDispatchMode

from microvllm.ops.cpu.operators import Kernels
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.worker.step_inputs import HostInputs

BLOCK = 16


class Operators(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(operator.overloadpacket)] += 1
        return operator(*args, **(kwargs or {}))


class Counted:
    """The library of kernels; `calls` counts those of each."""

    def __init__(self, library: Any, calls: Counter[str]) -> None:
        self._library, self._calls = library, calls

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*args: Any) -> Any:
            self._calls[name] += 1
            return function(*args)

        return call


def run_decodes(engine: InferenceEngine, streams: int, **params: Any) -> None:
    """Until every request is in the middle of a block."""
    for i in range(streams):
        engine.core.add(make_request(i, list(range(5, 12)), 100, **params))
    for _ in range(4):
        engine.core.step()


@pytest.mark.parametrize("streams", [1, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_step_of_an_unchanged_batch(
    dtype: str, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three kernels in three new tensors; the tokens as an array and back. The inputs stay."""
    kernels: Counter[str] = Counter()
    load = Kernels.__init__

    def counting(self: Kernels, library: Any, threads: int) -> None:
        load(self, library, threads)
        self.library = Counted(library, kernels)

    monkeypatch.setattr(Kernels, "__init__", counting)
    engine = make_engine(variant_folder("llama-tied"), dtype=dtype, block_size=BLOCK)
    run_decodes(engine, streams)
    kernels.clear()
    with pytest.MonkeyPatch.context() as patch, Operators() as operators:
        patch.setattr(HostInputs, "make", None)
        for _ in range(3):
            engine.core.step()
    assert kernels == {"gather": 3, "decoder_layers": 3, "linear": 3}
    assert sum(operators.calls.values()) <= 3 * 5, operators.calls


def test_a_batch_is_made_anew_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(variant_folder("llama-tied"), block_size=BLOCK)
    run_decodes(engine, 1)
    made = []
    real = HostInputs.make
    monkeypatch.setattr(HostInputs, "make", lambda *args: made.append(args) or real(*args))
    for _ in range(3 * BLOCK):
        engine.core.step()
    assert len(made) == 3


def test_no_weight_asks_for_gradients() -> None:
    """Steps on a CPU do not enter torch's inference mode."""
    engine = make_engine(variant_folder("llama-tied"), attention_backend="torch")
    run_decodes(engine, 1)
    seen = []
    model = engine.core._runner.model  # type: ignore[attr-defined]
    head = model.head
    model.head = lambda hidden: seen.append(head(hidden)) or seen[-1]
    engine.core.step()
    assert torch.is_grad_enabled() and len(seen) == 1 and not seen[0].requires_grad
