"""What the tests on real computation share: engines on small models, prompts, and runs token by token."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tiny_models import TOKENIZER_SIZE, make_hf_folder

from microvllm.adapters.registry import load_spec
from microvllm.ops.attention.e4m3 import storable
from microvllm.ops.attention.mixed import MixedAttention
from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.kv_memory import CacheLayout
from microvllm.runtime.request import EngineRequest, SamplingParams, StepOutput
from microvllm.runtime.worker.model_runner import ModelGraphRunner

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpu", "torch")  # our own kernels, and the reference
LONG = 32768  # tokens; many seconds of work even for a small model: however late a test looks, it goes on

# Every family with what is odd about it: 9 query heads over 3 KV heads everywhere, head sizes that are not
# hidden / heads, biases, tied and untied embeddings, a window shorter than the texts, both rope scalings.
DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-tied": {"family": "llama", "tie": True},
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "llama-llama3-rope": {
        "family": "llama",
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear-rope": {
        "family": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
    },
    "llama-one-kv-head": {"family": "llama", "num_key_value_heads": 1, "hidden_size": 90},
    "mistral": {"family": "mistral", "head_dim": 20},
    "mistral-window": {"family": "mistral", "sliding_window": 19, "head_dim": 40},
    "qwen2": {"family": "qwen2", "tie": True},
    "qwen2-untied": {"family": "qwen2", "num_key_value_heads": 9},
    "qwen3": {"family": "qwen3", "tie": True, "head_dim": 48},
    "qwen3-mixed-windows": {
        "family": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 19,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma2": {
        "family": "gemma2",
        "tie": True,
        "sliding_window": 19,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3": {
        "family": "gemma3_text",
        "tie": True,
        "num_hidden_layers": 4,
        "sliding_window": 19,
        "query_pre_attn_scalar": 40,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "gemma4": {  # full layers of other heads, whose keys are their values
        "family": "gemma4_text",
        "num_hidden_layers": 4,
        "sliding_window": 19,
        "global_head_dim": 48,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 8.0,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4-shared": {  # inputs of each layer, and two layers that read the keys and values of others
        "family": "gemma4_text",
        "num_hidden_layers": 5,
        "sliding_window": 19,
        "global_head_dim": 48,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 24,
        "vocab_size_per_layer_input": TOKENIZER_SIZE,
        "layer_types": ["sliding_attention", *["sliding_attention", "full_attention"] * 2],
        "seed": 4,
    },
    "gemma4-moe": {
        "family": "gemma4_text",
        "num_hidden_layers": 3,
        "sliding_window": 19,
        "global_head_dim": 40,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 56,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "seed": 6,
    },
    "phi3-window": {"family": "phi3", "sliding_window": 19},
    "phi4-mini": {
        "family": "phi3",
        "tie": True,
        "hidden_size": 288,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512,
            "factor": 4.0,
            "short_factor": [1.0 + index / 20 for index in range(12)],
            "long_factor": [1.0 + index / 2 for index in range(12)],
        },
    },
    "smollm3": {
        "family": "smollm3",
        "tie": True,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 19,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
    },
    "granite": {
        "family": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.11,
        "residual_multiplier": 0.37,
        "logits_scaling": 0.6,
        "rms_norm_eps": 1e-2,
        "attention_bias": True,
    },
    "granite4": {
        "family": "granitemoehybrid",
        "tie": True,
        "head_dim": 16,
        "layer_types": ["attention"] * 3,
        "position_embedding_type": "rope",
        "num_local_experts": 0,
        "shared_intermediate_size": 88,
        "mamba_n_heads": 8,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.37,
        "logits_scaling": 0.6,
    },
    "granite4-mamba": {
        "family": "granitemoehybrid",
        "tie": True,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "mamba_n_heads": 12,
        "mamba_d_head": 24,
        "mamba_d_state": 20,
        "mamba_chunk_size": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 40,
        "shared_intermediate_size": 72,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.37,
        "logits_scaling": 0.6,
        "rms_norm_eps": 1e-2,
        "seed": 3,
    },
    "seed-oss": {"family": "seed_oss", "attention_out_bias": True, "mlp_bias": True, "head_dim": 24},
    "olmo3": {
        "family": "olmo3",
        "num_hidden_layers": 4,
        "sliding_window": 19,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.2,
            },
        },
    },
    "ministral3": {
        "family": "ministral3",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.4,
        },
    },
    "glm4": {"family": "glm4", "head_dim": 24, "rms_norm_eps": 1e-3},
    "qwen3-moe": {
        "family": "qwen3_moe",
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "qwen3-moe-mixed": {
        "family": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_experts": 16,
        "num_experts_per_tok": 5,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [3],
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 19,
        "seed": 1,
    },
    "qwen2-moe": {
        "family": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 56,
        "shared_expert_intermediate_size": 72,
        "seed": 2,
    },
    "mixtral": {"family": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "seed": 3},
    "glm4-moe": {
        "family": "glm4_moe",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 40,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "use_qk_norm": True,
        "attention_bias": True,
        "seed": 4,
    },
    "minimax-m2": {
        "family": "minimax_m2",
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "rotary_dim": 12,
        "head_dim": 24,
        "intermediate_size": 48,
        "seed": 5,
    },
    "ernie-moe": {
        "family": "ernie4_5_moe",
        "tie": True,
        "num_hidden_layers": 4,
        "head_dim": 24,
        "moe_intermediate_size": 40,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_interval": 2,
        "seed": 6,
    },
    "olmoe": {
        "family": "olmoe",
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "seed": 7,
    },
    "gpt-oss": {
        "family": "gpt_oss",
        "num_hidden_layers": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 19,
        "seed": 4,
    },
    "qwen3.5": {"family": "qwen3_5_text", **DELTA, "seed": 6},
    "qwen3.5-moe": {
        "family": "qwen3_5_moe_text",
        **DELTA,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
        "attention_bias": True,
        "seed": 9,
    },
    "qwen3-next": {
        "family": "qwen3_next",
        **DELTA,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
        "seed": 6,
    },
    "lfm2": {
        "family": "lfm2",
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "conv_L_cache": 4,
        "conv_bias": True,
        "intermediate_size": 170,
        "block_ffn_dim_multiplier": 1.3,
        "block_multiple_of": 7,
        "norm_eps": 1e-3,
    },
    "lfm2-moe": {
        "family": "lfm2_moe",
        "tie": True,
        "num_hidden_layers": 5,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "routed_scaling_factor": 1.7,
        "seed": 2,
    },
    "nemotron-h": {
        "family": "nemotron_h",
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
        "num_hidden_layers": None,
        "mamba_num_heads": 6,
        "mamba_head_dim": 20,
        "n_groups": 3,
        "ssm_state_size": 12,
        "conv_kernel": 3,
        "chunk_size": 8,
        "layer_norm_epsilon": 1e-3,
        "mlp_bias": True,
        "use_bias": True,
        "seed": 3,
    },
    "nemotron-h-moe": {
        "family": "nemotron_h",
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
        "num_hidden_layers": None,
        "mamba_num_heads": 10,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 24,
        "use_conv_bias": False,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "seed": 4,
    },
    "deepseek-v3": {
        "family": "deepseek_v3",
        "num_key_value_heads": 9,
        "first_k_dense_replace": 1,
        "head_dim": 12,
        "q_lora_rank": 28,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 12,
        "qk_nope_head_dim": 18,
        "v_head_dim": 14,
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.8,
            "mscale_all_dim": 1.3,
        },
        "seed": 8,
    },
    "glm4-moe-lite": {
        "family": "glm4_moe_lite",
        "num_key_value_heads": 9,
        "head_dim": 12,
        "q_lora_rank": None,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 12,
        "qk_nope_head_dim": 16,
        "v_head_dim": 20,
        "moe_intermediate_size": 40,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "rms_norm_eps": 1e-3,
        "seed": 9,
    },
    "qwen3-untied": {"family": "qwen3", "hidden_size": 126, "head_dim": 16},
}


@functools.cache
def _models() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="microvllm-models-")  # deleted at exit


@functools.cache
def variant_folder(name: str) -> Path:
    """The folder of one of `VARIANTS`; written once a test run."""
    options = dict(VARIANTS[name])
    return make_hf_folder(Path(_models().name) / name, options.pop("family"), **options)


@functools.cache
def long_folder() -> Path:
    """The folder of "llama-tied" with a context of `LONG` tokens; written once a test run."""
    options = {**VARIANTS["llama-tied"], "max_position_embeddings": LONG}
    return make_hf_folder(Path(_models().name) / "long", options.pop("family"), **options)


def groups_of(model: Path | str) -> int:
    """Groups of layers, each of which needs blocks of the KV cache for a token."""
    return len(load_spec(Path(model)).cache_plan.windows)


def fewest_blocks(model: Path | str, length: int, block_size: int, step_tokens: int) -> int:
    """KV blocks that a request of so many tokens needs, beside steps of `step_tokens` in flight."""
    return CacheLayout.of(load_spec(Path(model)), "float32", block_size, step_tokens).blocks_for(length)


def make_engine(model: Path | str, **options: Any) -> InferenceEngine:
    """An engine in float32 on one thread with a small pool."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "cpu_threads": 1,
        "num_gpu_blocks_override": 256,
    }
    return InferenceEngine(str(model), **{**defaults, **options})


def make_prompts(count: int, vocab: int, *, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens, the lengths spread evenly."""
    random = np.random.default_rng(seed)
    lengths = [1 + i * (longest - 1) // max(1, count - 1) for i in range(count)]
    return [random.integers(0, vocab, length).tolist() for length in lengths]


def make_request(
    request_id: int, prompt: list[int], max_tokens: int = 24, *, priority: int = 0, **params: Any
) -> EngineRequest:
    """A request that nothing but `max_tokens` ends; greedy unless `params` say otherwise."""
    sampling = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params})
    return EngineRequest(request_id, prompt, sampling, priority=priority)


def run_requests(engine: InferenceEngine, requests: Sequence[EngineRequest]) -> list[list[int]]:
    """The tokens of each request, all submitted together; sees that the pool is at rest afterwards."""
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        refused = engine.core.add(request)
        assert refused is None, refused
    for output in drain(engine):
        assert output.error is None, output
        tokens[output.request_id] += output.token_ids
    return [tokens[request.request_id] for request in requests]


def drain(engine: InferenceEngine, max_steps: int = 20_000) -> Iterator[StepOutput]:
    """Step until nothing is left to do, and check that every block came back."""
    for _ in range(max_steps):
        if not engine.core.has_work():
            break
        yield from engine.core.step()
    assert not engine.core.has_work(), "the engine does not come to rest"
    engine.core.kv.check()
    assert engine.core.kv.num_used == 0


def generate_ids(
    engine: InferenceEngine, prompts: Sequence[list[int]], max_tokens: int = 24, **params: Any
) -> list[list[int]]:
    """Tokens after each prompt, all generated together."""
    return run_requests(
        engine, [make_request(i, prompt, max_tokens, **params) for i, prompt in enumerate(prompts)]
    )


@contextmanager
def recorded_logits(engine: InferenceEngine, *, every_position: bool) -> Iterator[dict[int, torch.Tensor]]:
    """Logits that the engine computes, by position in a sequence; for one request at a time.

    With `every_position` those of all prompt tokens are computed too, of which the engine itself needs only
    the last.
    """
    runner = engine.core._runner
    assert isinstance(runner, ModelGraphRunner)
    model, device, launch = runner.model, runner._device, runner._device.forward
    forward = model.forward
    logits: dict[int, torch.Tensor] = {}
    items: list[ScheduledRequest] = []

    def noting_items(scheduled: Sequence[ScheduledRequest], tables: Any) -> tuple[torch.Tensor, torch.Tensor]:
        items[:] = scheduled
        return launch(scheduled, tables)

    def recording(ids: torch.Tensor, attention: Any, needed: torch.Tensor | None = None) -> torch.Tensor:
        hidden = forward(ids, attention)
        (item,) = items
        rows = hidden if every_position else hidden[-1:]
        first = item.start + item.num_new - len(rows)
        for offset, row in enumerate(model.logits(rows)):
            logits[first + offset] = row.clone()
        return hidden if needed is None else hidden[needed]

    device.forward, model.forward = noting_items, recording  # type: ignore[method-assign]
    try:
        yield logits
    finally:
        device.forward, model.forward = launch, forward  # type: ignore[method-assign]


@contextmanager
def poisoned(engine: InferenceEngine, value: float = torch.nan) -> Iterator[None]:
    """Overwrite every free block behind each step: nobody may read it before it is written again."""
    attention: Any = engine.core._runner._attention  # type: ignore[attr-defined]
    backends = attention.backends if isinstance(attention, MixedAttention) else [attention]
    launch = engine.core._runner.launch

    def poison(plan: Any) -> Any:
        launched = launch(plan)
        free = engine.core.kv.pool.free
        for backend in backends:
            storable(backend.cache)[:, :, free] = storable(torch.tensor(value).to(backend.cache.dtype))
        return launched

    engine.core._runner.launch = poison  # type: ignore[method-assign]
    yield
    engine.core._runner.launch = launch  # type: ignore[method-assign]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def load_script(name: str) -> ModuleType:
    """A script of the `scripts` folder as a module; it finds its parts as when it is run."""
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up what their annotations name
    spec.loader.exec_module(module)
    return module
