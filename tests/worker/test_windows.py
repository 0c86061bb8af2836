"""Layers with sliding windows, in pools of blocks of their own: no way of computing changes a token.

Texts are many times as long as the window of 19 tokens and as a chunk of a prompt. What a window has left
behind is overwritten at once, so that reading it would show.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import (
    drain,
    generate_ids,
    make_engine,
    make_request,
    poisoned,
    run_requests,
    variant_folder,
)
from tiny_models import TOKENIZER_SIZE, reference

MODELS = ("gemma2", "gemma3", "mistral-window", "qwen3-mixed-windows")
LENGTHS = (300, 131, 19, 75)
NUM_TOKENS = 40


@functools.cache
def prompts() -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, TOKENIZER_SIZE, length).tolist() for length in LENGTHS]


@functools.cache
def expected(name: str) -> list[list[int]]:
    """Greedy tokens, which are those of transformers."""
    found = generate_ids(
        make_engine(variant_folder(name), enable_prefix_caching=False), prompts(), NUM_TOKENS
    )
    model = reference(variant_folder(name))
    for prompt, tokens in zip(prompts(), found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens
    return found


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 13, "max_num_seqs": 4},
    "chunked-async": {"max_num_batched_tokens": 13, "max_num_seqs": 4, "async_scheduling": True},
    "blocks-of-4": {"block_size": 4, "max_num_batched_tokens": 50, "num_gpu_blocks_override": 512},
    "torch": {"attention_backend": "torch", "max_num_batched_tokens": 40, "block_size": 8},
    "invariant": {"batch_invariant": True, "max_num_batched_tokens": 40},
}


@pytest.mark.parametrize(
    ("name", "way"),
    # Batch-invariant kernels have no capped scores.
    [(name, way) for name in MODELS for way in WAYS if (name, way) != ("gemma2", "invariant")],
)
def test_tokens_are_those_of_transformers(name: str, way: str) -> None:
    """Together, then each alone, without a prefix cache, so that blocks behind a window become free."""
    engine = make_engine(variant_folder(name), enable_prefix_caching=False, **WAYS[way])
    # Plain torch, which computes capped scores, multiplies what it masks by zero: any number, but no NaN.
    with poisoned(engine, 100.0 if way == "torch" or name == "gemma2" else torch.nan):
        assert generate_ids(engine, prompts(), NUM_TOKENS) == expected(name)
        for prompt, tokens in zip(prompts(), expected(name), strict=True):
            assert generate_ids(engine, [prompt], NUM_TOKENS) == [tokens]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_preemption_changes_no_token(name: str, asynchronous: bool) -> None:
    """The pools hold one request of full length, and hardly more."""
    engine = make_engine(
        variant_folder(name),
        max_model_len=344,
        block_size=4,
        max_num_batched_tokens=24,
        max_num_seqs=4,
        num_gpu_blocks_override=20 if name == "mistral-window" else 100,
        async_scheduling=asynchronous,
    )
    requests = [make_request(i, prompts()[i], NUM_TOKENS) for i in (1, 3, 2, 0)]
    tokens = run_requests(engine, requests)
    assert tokens == [expected(name)[request.request_id] for request in requests]


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_hit_changes_no_token(name: str) -> None:
    """The next turn of a chat, and prompts that share a beginning which the window has left behind."""
    engine = make_engine(variant_folder(name), max_num_batched_tokens=64)
    prompt, answer = prompts()[0], expected(name)[0]
    assert generate_ids(engine, [prompt], NUM_TOKENS) == [answer]
    assert generate_ids(engine, [prompt + answer[:30]], 10) == [answer[30:]]
    assert engine.core.stats().prefix_hits == (300 + 29) // 16 * 16
    for shared in (16, 100, 256, 299):
        before = engine.core.stats().prefix_hits
        other = [*prompt[:shared], *prompts()[3]]
        (tokens,) = generate_ids(engine, [other], 8)
        assert engine.core.stats().prefix_hits - before == shared // 16 * 16
        again = make_engine(variant_folder(name), enable_prefix_caching=False)
        assert generate_ids(again, [other], 8) == [tokens]


def test_a_hit_ends_where_the_blocks_of_every_window_are_still_there() -> None:
    """The window's pool forgets first; what the other pool still has is then of no use."""
    engine = make_engine(
        variant_folder("gemma3"), block_size=4, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=400
    )
    full, window = engine.core.kv.pools
    assert window.num_blocks * 4 < 300 < full.num_blocks * 4
    first, other = prompts()[0], prompts()[1]
    for prompt in (first, other):
        assert len(generate_ids(engine, [prompt], 1)[0]) == 1
    assert full.longest_hit(keys := engine.core.kv.prefix_keys(first).upto(74)) in (0, 74)
    keys = engine.core.kv.prefix_keys(first)
    assert [len(blocks) for blocks in engine.core.kv.match_prefix(keys, 300)] == [0, 0]
    before = engine.core.stats().prefix_hits
    assert generate_ids(engine, [first], NUM_TOKENS) == [expected("gemma3")[0]]
    assert engine.core.stats().prefix_hits == before


@pytest.mark.parametrize("name", MODELS)
def test_a_long_text_in_a_pool_that_could_not_hold_it(name: str) -> None:
    engine = make_engine(
        variant_folder(name),
        block_size=4,
        max_model_len=400,
        max_num_seqs=1,
        max_num_batched_tokens=16,
        num_gpu_blocks_override=12 if name == "mistral-window" else 100,
    )
    pool = engine.core.kv.pools[-1]
    assert pool.window == 19 and pool.num_blocks * 4 < 100
    prompt, most_used = prompts()[0], 0
    engine.core.add(make_request(0, prompt, 100))
    tokens: list[int] = []
    while engine.core.has_work():
        for output in engine.core.step():
            tokens += output.token_ids
        most_used = max(most_used, pool.num_used)
        engine.core.scheduler.check()
    assert len(tokens) == 100 and tokens[:NUM_TOKENS] == expected(name)[0]
    assert most_used <= pool.most_held == 10
    assert not list(drain(engine))


def test_a_cache_of_fp8_is_the_same_in_any_chunks() -> None:
    options = {"attention_backend": "torch", "kv_cache_dtype": "fp8", "enable_prefix_caching": False}
    whole = make_engine(variant_folder("gemma3"), **options)
    wanted = generate_ids(whole, prompts(), NUM_TOKENS)
    chunked = make_engine(variant_folder("gemma3"), **options, max_num_batched_tokens=23, max_num_seqs=4)
    with poisoned(chunked, 100.0):
        assert generate_ids(chunked, prompts(), NUM_TOKENS) == wanted
