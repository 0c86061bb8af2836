"""Layers with sliding windows, in groups with blocks of their own: no way of computing changes a token.

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
    fewest_blocks,
    generate_ids,
    make_engine,
    make_request,
    poisoned,
    run_requests,
    variant_folder,
)
from tiny_models import TOKENIZER_SIZE, reference

from microvllm.runtime.engine import InferenceEngine

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


# Windows in all layers or in some of them, with and without capped scores: small blocks meet each of these,
# as they show best what is given back too early, and other ways of computing two. Capped scores are computed
# by plain torch in any way, and batch-invariant kernels have none.
TWO_OF = {
    "chunked": ("gemma2", "qwen3-mixed-windows"),
    "chunked-async": ("gemma3", "mistral-window"),
    "torch": ("gemma3", "mistral-window"),
    "invariant": ("gemma3", "qwen3-mixed-windows"),
}


@pytest.mark.parametrize(("name", "way"), [(name, way) for way in WAYS for name in TWO_OF.get(way, MODELS)])
def test_tokens_are_those_of_transformers(name: str, way: str) -> None:
    """Together, then each alone, without a prefix cache, so that blocks behind a window become free."""
    engine = make_engine(variant_folder(name), enable_prefix_caching=False, **WAYS[way])
    # Plain torch, which computes capped scores, multiplies what it masks by zero: any number, but no NaN.
    with poisoned(engine, 100.0 if way == "torch" or name == "gemma2" else torch.nan):
        assert generate_ids(engine, prompts(), NUM_TOKENS) == expected(name)
        for prompt, tokens in zip(prompts(), expected(name), strict=True):
            assert generate_ids(engine, [prompt], NUM_TOKENS) == [tokens]


def tight_engine(name: str, spare: int, step_tokens: int, length: int, **options: Any) -> InferenceEngine:
    """Blocks of four tokens for one request of full length, and hardly more."""
    ahead = 2 if options.get("async_scheduling") else 1
    return make_engine(
        variant_folder(name),
        max_model_len=length,
        block_size=4,
        max_num_batched_tokens=step_tokens,
        num_gpu_blocks_override=fewest_blocks(variant_folder(name), length, 4, step_tokens * ahead) + spare,
        **options,
    )


@pytest.mark.parametrize(("name", "asynchronous"), list(zip(MODELS, [False, True, True, False], strict=True)))
def test_preemption_changes_no_token(name: str, asynchronous: bool) -> None:
    engine = tight_engine(name, 2, 24, 344, max_num_seqs=12, async_scheduling=asynchronous)
    which = [1, 3, *[2] * 8, 0]
    requests = [make_request(i, prompts()[prompt], NUM_TOKENS) for i, prompt in enumerate(which)]
    assert run_requests(engine, requests) == [expected(name)[prompt] for prompt in which]
    assert engine.core.stats().preemptions


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
    """What lies behind a window is forgotten first; what the other layers still have is then of no use."""
    engine = tight_engine("gemma3", 10, 16, 400, max_num_seqs=1)
    kv, prompt = engine.core.kv, prompts()[0]
    assert generate_ids(engine, [prompt], NUM_TOKENS) == [expected("gemma3")[0]]
    keys = kv.prefix_keys(prompt)
    assert kv.groups[0].longest_hit(keys.upto(25)) == 25 > 0 == len(kv.match_prefix(keys, 101)[0])
    before = engine.core.stats().prefix_hits
    other = [*prompt[:100], *prompts()[3]]
    (tokens,) = generate_ids(engine, [other], 8)
    assert engine.core.stats().prefix_hits == before
    again = make_engine(variant_folder("gemma3"), enable_prefix_caching=False)
    assert generate_ids(again, [other], 8) == [tokens]


@pytest.mark.parametrize("name", MODELS)
def test_a_long_text_in_blocks_that_could_not_hold_it(name: str) -> None:
    """Without windows, of 400 tokens in every group of layers."""
    engine = tight_engine(name, 0, 16, 400, max_num_seqs=1)
    kv = engine.core.kv
    window = kv.groups[-1]
    assert window.window == 19 and window.most_held == 10 and kv.pool.num_blocks < 100 * len(kv.groups)
    prompt, most_used = prompts()[0], 0
    engine.core.add(make_request(0, prompt, 100))
    tokens: list[int] = []
    while engine.core.has_work():
        for output in engine.core.step():
            tokens += output.token_ids
        most_used = max(most_used, kv.num_used)
        engine.core.kv.check()
    assert len(tokens) == 100 and tokens[:NUM_TOKENS] == expected(name)[0]
    assert 0 < most_used <= sum(min(group.most_held, 100) for group in kv.groups)
    assert not list(drain(engine))


def test_a_cache_of_fp8_is_the_same_in_any_chunks() -> None:
    options = {"attention_backend": "torch", "kv_cache_dtype": "fp8", "enable_prefix_caching": False}
    whole = make_engine(variant_folder("gemma3"), **options)
    wanted = generate_ids(whole, prompts(), NUM_TOKENS)
    chunked = make_engine(variant_folder("gemma3"), **options, max_num_batched_tokens=23, max_num_seqs=4)
    with poisoned(chunked, 100.0):
        assert generate_ids(chunked, prompts(), NUM_TOKENS) == wanted
