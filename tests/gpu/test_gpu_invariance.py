"""--batch-invariant on a GPU: the same greedy request gives the same tokens and bits, however it is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from invariance import answers, check_ways
from model_tools import generate_ids, make_engine, make_prompts, variant_folder
from tiny_models import TOKENIZER_SIZE

from microvllm.runtime.engine import InferenceEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def make(model: str, dtype: str = "bfloat16", **options: Any) -> InferenceEngine:
    defaults = {"num_gpu_blocks_override": 512, "block_size": 16, "max_num_seqs": 16}
    return make_engine(
        variant_folder(model), device="cuda", batch_invariant=True, dtype=dtype, **{**defaults, **options}
    )


@pytest.mark.parametrize("model", ["llama-tied", "qwen3", "mistral-window", "qwen3-moe"])
def test_a_request_gets_the_same_bits_however_it_is_run(model: str) -> None:
    def engine(**options: Any) -> InferenceEngine:
        return make(model, **options)

    alone = check_ways(engine)
    assert answers(engine(enforce_eager=True), list(alone)) == alone, "without graphs"
    assert answers(engine(async_scheduling=False), list(alone)) == alone


def test_sixty_four_at_once() -> None:
    prompts = make_prompts(64, TOKENIZER_SIZE, seed=3)
    together = generate_ids(make("qwen3", max_num_seqs=64), prompts, 24)
    one = make("qwen3", max_num_seqs=64)
    assert [generate_ids(one, [prompt], 24)[0] for prompt in prompts] == together


def test_float32_gives_the_tokens_of_the_cpu() -> None:
    prompts = make_prompts(8, TOKENIZER_SIZE, seed=4)
    cpu = make_engine(variant_folder("qwen3"), device="cpu", attention_backend="torch")
    assert generate_ids(make("qwen3", "float32"), prompts, 30) == generate_ids(cpu, prompts, 30)
