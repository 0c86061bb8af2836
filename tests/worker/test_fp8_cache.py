"""`--kv-cache-dtype fp8` in a whole engine on a CPU, by the reference of the GPU's kernels."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from model_tools import (
    generate_ids,
    make_engine,
    make_prompts,
    make_request,
    recorded_logits,
    run_requests,
    variant_folder,
)

from microvllm.ops.attention.e4m3 import to_e4m3
from microvllm.ops.attention.torch_backend import TorchAttention
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.backends import choose_kv_dtype
from microvllm.runtime.rank_layout import rank_layout
from microvllm.runtime.worker.model_runner import ModelGraphRunner

PROMPTS = make_prompts(8, 300, seed=3)


@functools.cache
def engine(model: str = "qwen3", **options: Any) -> InferenceEngine:
    defaults = {"attention_backend": "torch", "kv_cache_dtype": "fp8", "max_num_seqs": 8}
    return make_engine(variant_folder(model), **{**defaults, **options})


def attention_of(made: InferenceEngine) -> TorchAttention:
    runner = made.core._runner
    assert isinstance(runner, ModelGraphRunner)
    backend = runner._device._attention
    assert isinstance(backend, TorchAttention)
    return backend


@functools.cache
def whole() -> list[list[int]]:
    return generate_ids(engine(), PROMPTS)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 10},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 12, "max_model_len": 96},
        {"kv_cache_dtype": "fp8_e4m3"},
    ],
    ids=["chunked", "no-prefix", "preempted", "other-spelling"],
)
def test_how_a_prompt_is_cut_changes_no_token(options: dict[str, Any]) -> None:
    """A chunk reads what an earlier one wrote, a prompt in one piece what it wrote itself: both rounded."""
    made = engine(**options)
    assert generate_ids(made, PROMPTS) == whole()
    assert generate_ids(made, PROMPTS) == whole(), "with what is in the prefix cache"
    if "num_gpu_blocks_override" in options:
        assert made.core.stats().preemptions > 0


@pytest.mark.parametrize("model", ["llama-tied", "mistral-window", "gemma2", "gemma3", "qwen3"])
def test_logits_are_near_those_of_an_exact_cache(model: str) -> None:
    """Of all positions of a prompt. Random models are sharper than real ones, whose perplexity is in docs."""
    found = []
    for dtype in ("auto", "fp8"):
        made = engine(model, kv_cache_dtype=dtype)
        with recorded_logits(made, every_position=True) as logits:
            run_requests(made, [make_request(0, PROMPTS[-1], 8)])
        found.append(torch.stack([logits[at] for at in range(len(PROMPTS[-1]))]))
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert 1e-3 < error < 0.25, "it is rounded, and no more than that"


def test_the_cache_holds_rounded_numbers_and_as_many_blocks_take_half_the_bytes() -> None:
    made, exact = engine(), engine(kv_cache_dtype="auto", dtype="bfloat16")
    assert attention_of(made).cache.dtype == torch.float8_e4m3fn
    small, large = (rank_layout(each.config).page_bytes for each in (made, exact))
    spec = made.config.spec
    assert 2 * small == large == 2 * 2 * 16 * sum(layer.mixer.kv_size for layer in spec.layers)


def test_what_e4m3_cannot_hold_ends_at_its_largest_number() -> None:
    x = torch.tensor([0.0, 1.0, 1.06, 447.0, 449.0, 1e30, -1e30, float("inf"), float("nan"), 2**-10, 2**-9])
    found = to_e4m3(x, 1.0).float()
    assert found[:8].tolist() == [0, 1, 1, 448, 448, 448, -448, 448]
    assert found[8].isnan() and found[9:].tolist() == [0, 2**-9]
    assert to_e4m3(torch.tensor([896.0, 3.0]), 2.0).float().tolist() == [448, 1.5]


def resolve(**options: Any) -> Any:
    return EngineArgs(model=str(variant_folder("llama-tied")), device="cpu", **options).resolve()


@pytest.mark.parametrize("spelling", ["fp8_e5m2", "fp8_inc", "nvfp4", "int8", "FP8", "float16", "turboquant"])
def test_other_types_are_refused_by_name(spelling: str) -> None:
    with pytest.raises(ConfigError, match=f"--kv-cache-dtype must be .*, got {spelling}"):
        resolve(kv_cache_dtype=spelling, dtype="bfloat16", attention_backend="torch")


def test_the_kernels_for_cpus_have_no_such_cache() -> None:
    with pytest.raises(ConfigError, match="fp8: --attention-backend cpu has no such KV cache"):
        resolve(kv_cache_dtype="fp8", attention_backend="cpu")


@pytest.mark.parametrize("spelling", ["auto", "bfloat16"])
def test_the_model_s_own_type_may_be_named(spelling: str) -> None:
    assert resolve(kv_cache_dtype=spelling, dtype="bfloat16").kv_dtype == "bfloat16"


@pytest.mark.parametrize(("backend", "dtype"), [("torch", "float8_e4m3fn"), ("cpu", "float32")])
def test_a_checkpoint_for_such_a_cache_has_one_where_it_is_computed(
    backend: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_kv_dtype("auto", "float32", backend, stores_fp8=True) == dtype
    assert ("made for a KV cache of fp8" in caplog.text) == (backend == "cpu")
