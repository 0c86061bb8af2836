"""Layers with sliding windows on a GPU: pages that they share, in graphs and without, change no token."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import fewest_blocks, generate_ids, make_engine, poisoned, variant_folder
from tiny_models import TOKENIZER_SIZE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MODELS = ("gemma3", "gemma4", "mistral-window", "qwen3-mixed-windows", "gpt-oss")
LENGTHS = (300, 131, 19, 75)
NUM_TOKENS = 40
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "sync": {"async_scheduling": False},
    "chunked": {"max_num_batched_tokens": 24},
    "large-blocks": {"block_size": 64},
    "invariant": {"batch_invariant": True},
}


@functools.cache
def prompts() -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, TOKENIZER_SIZE, length).tolist() for length in LENGTHS]


def engine(model: str, **options: Any) -> Any:
    defaults = {"device": "cuda", "max_num_seqs": 8, "num_gpu_blocks_override": 128, "block_size": 16}
    return make_engine(variant_folder(model), **{**defaults, **options})


@functools.cache
def on_the_cpu(model: str) -> list[list[int]]:
    made = make_engine(variant_folder(model), attention_backend="torch", enable_prefix_caching=False)
    return generate_ids(made, prompts(), NUM_TOKENS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_in_float32_are_those_of_the_cpu(model: str, way: str) -> None:
    """Free blocks are NaN: a kernel that reads behind a window would give no tokens at all."""
    made = engine(model, enable_prefix_caching=False, **WAYS[way])
    with poisoned(made):
        assert generate_ids(made, prompts(), NUM_TOKENS) == on_the_cpu(model)
        assert generate_ids(made, prompts()[:1], NUM_TOKENS) == on_the_cpu(model)[:1]


@pytest.mark.parametrize("model", MODELS)
def test_prefix_hits_and_preemption(model: str) -> None:
    which = [1, 3, *[2] * 8, 0]  # short ones among them, which grow together
    expected = [on_the_cpu(model)[prompt] for prompt in which]
    options = {"max_model_len": 344, "max_num_batched_tokens": 24, "max_num_seqs": 12}
    fewest = fewest_blocks(variant_folder(model), 344, 16, 48)  # two steps of 24 tokens are in flight
    for blocks in (fewest, fewest + 2, fewest + 4):
        made = engine(model, **options, num_gpu_blocks_override=blocks)
        for _ in range(2):
            assert generate_ids(made, [prompts()[prompt] for prompt in which], NUM_TOKENS) == expected
        assert made.core.stats().preemptions
    roomy = engine(model)
    answer = generate_ids(roomy, prompts()[:1], NUM_TOKENS)[0]
    assert generate_ids(roomy, [prompts()[0] + answer[:30]], 10) == [answer[30:]]
    assert roomy.core.stats().prefix_hits == (300 + 29) // 16 * 16


@pytest.mark.parametrize("model", ["gemma3", "mistral-window"])
def test_a_cache_of_fp8_is_the_same_in_graphs_and_in_chunks(model: str) -> None:
    """In the same batches, since a sum's order depends on them."""
    options = {"kv_cache_dtype": "fp8", "enable_prefix_caching": False, "batch_invariant": True}
    found = []
    for way in ("graphs", "eager", "chunked"):
        made = engine(model, **options, **WAYS[way])
        with poisoned(made):
            found.append(generate_ids(made, prompts(), NUM_TOKENS))
    assert found[0] == found[1] == found[2]
