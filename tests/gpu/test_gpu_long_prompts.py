"""Steps with more than 1,024 tokens of prompts in graphs give the tokens of eager steps and of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_tools import generate_ids, long_folder, make_engine

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

from microvllm.runtime.worker.graphs import PromptGraphs
from microvllm.runtime.worker.step_sizes import FEW_TOKENS, StepSize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="in use on compute capability 9.0 alone",
    ),
]
# Several in one step, one that a step cuts in two, and short ones that decode beside it.
PROMPTS = [[5 + (i * step) % 290 for i in range(length)] for step, length in ((3, 9), (7, 1100), (11, 1500))]
PROMPTS += [[5 + (i * i) % 290 for i in range(length)] for length in (2900, 30)]


def test_tokens_behind_long_prompts_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, sizes = PromptGraphs.forward, set[StepSize]()

    def noted(self: PromptGraphs, size: StepSize, *args: Any) -> Any:
        sizes.add(size)
        return forward(self, size, *args)

    monkeypatch.setattr(PromptGraphs, "forward", noted)
    limits: dict[str, Any] = {"max_num_batched_tokens": 3072, "max_model_len": 4096, "max_num_seqs": 16}

    def made(**more: Any) -> list[list[int]]:
        pool = {"num_gpu_blocks_override": 2048, "block_size": 16}
        return generate_ids(make_engine(long_folder(), **limits, **pool, **more), PROMPTS, 20)

    tokens = made(device="cuda")
    longer = [size for size in sizes if size.tokens > FEW_TOKENS]
    assert {size.decodes for size in longer} == {0, 16}, "with and without decodes"
    assert tokens == made(device="cuda", enforce_eager=True)
    assert tokens == made(device="cpu", attention_backend="torch")
