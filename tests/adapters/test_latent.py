"""Latent attention: real configurations, the size of its cache, quantised matrices, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import (
    VARIANTS,
    generate_ids,
    load_script,
    make_engine,
    make_prompts,
    recorded_logits,
    relative_error,
    variant_folder,
)
from safetensors.torch import load_file, save_file
from tiny_models import TOKENIZER_SIZE, make_hf_folder, reference

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.latent import LatentAttention
from microvllm.adapters.registry import load_spec
from microvllm.adapters.spec import ModelSpec
from microvllm.ops.routing import Routing
from microvllm.runtime.errors import ConfigError

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GLM_47_FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}


def spec_of(path: Path, config: dict[str, Any], **changes: Any) -> ModelSpec:
    (path / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    return load_spec(path)


def test_deepseek_v3(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, DEEPSEEK_V3)
    (mixer,) = {layer.mixer for layer in spec.layers}
    assert isinstance(mixer, LatentAttention)
    sizes = mixer.num_heads, mixer.rank, mixer.rope_dim, mixer.nope_dim, mixer.value_dim, mixer.q_rank
    assert sizes == (128, 512, 64, 128, 128, 1536)
    factor = 0.1 * math.log(40) + 1
    assert mixer.scale == pytest.approx(192**-0.5 * factor**2)
    assert (mixer.rope.interleaved, mixer.rope.attention_factor, mixer.rope.rotary_dim) == (True, 1.0, None)
    routing = Routing(
        num_chosen=8, sigmoid=True, scale=2.5, num_groups=8, num_chosen_groups=4, normalized=True
    )
    experts = Experts(count=256, size=2048, routing=routing, correction=True, shared_size=2048)
    assert [layer.mlp for layer in spec.layers[2:4]] == [spec.layers[0].mlp, experts]
    # The authors' 671 B, of which 37 B are multiplied; the embeddings are looked up.
    assert spec.num_products / 1e9 == pytest.approx(36.6, abs=0.5)
    # The size that the authors report: 576 elements a layer in place of 32768.
    assert 2 * spec.cache_plan.page_size == 61 * 576 * 2 == 70272
    assert 2 * spec.sharded(8).cache_plan.page_size == 70272


def test_glm_47_flash(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GLM_47_FLASH)
    (mixer,) = {layer.mixer for layer in spec.layers}
    assert isinstance(mixer, LatentAttention)
    assert (mixer.num_heads, mixer.nope_dim, mixer.value_dim, mixer.q_rank) == (20, 192, 256, 768)
    assert (mixer.scale, mixer.norm_eps, spec.rms_norm_eps) == (256**-0.5, 1e-6, 1e-5)
    assert [isinstance(layer.mlp, Experts) for layer in spec.layers] == [False] + [True] * 46
    assert 2 * spec.cache_plan.page_size == 47 * 576 * 2 == 54144
    listed = spec_of(tmp_path, GLM_47_FLASH, mlp_layer_types=["dense"] + ["sparse"] * 46)
    assert listed == spec


BAD = [
    (DEEPSEEK_V3, "qk_rope_head_dim", 63, "qk_rope_head_dim must be even"),
    (DEEPSEEK_V3, "num_key_value_heads", 8, "num_key_value_heads must be num_attention_heads, 128"),
    (DEEPSEEK_V3, "kv_lora_rank", 0, "kv_lora_rank must be a positive integer"),
    (DEEPSEEK_V3, "moe_layer_freq", 2, "moe_layer_freq other than 1"),
    (DEEPSEEK_V3, "topk_method", "greedy", "topk_method must be noaux_tc"),
    (GLM_47_FLASH, "partial_rotary_factor", 0.5, "partial_rotary_factor other than 1"),
    (GLM_47_FLASH, "mlp_layer_types", ["dense"], "mlp_layer_types must list dense or sparse"),
    (GLM_47_FLASH, "rope_interleave", 1, "rope_interleave must be true or false"),
]


@pytest.mark.parametrize(("config", "key", "value", "said"), BAD)
def test_a_bad_key_is_named(tmp_path: Path, config: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        spec_of(tmp_path, config, **{key: value})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_bias_without_latent_queries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="attention_bias is not supported without a q_lora_rank"):
        spec_of(tmp_path, DEEPSEEK_V3, q_lora_rank=None, attention_bias=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_invariant": True, "attention_backend": "cpu"}, "no kernel for latent keys and values"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "torch"}, "latent keys and values are not cached"),
    ],
)
def test_what_no_backend_computes_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_engine(variant_folder("deepseek-v3"), **options)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bfloat16_is_as_near_float32_as_in_transformers(tmp_path: Path, backend: str) -> None:
    """Without experts, whose choice a rounding may change."""
    options = {**VARIANTS["deepseek-v3"], "first_k_dense_replace": 3}
    folder = make_hf_folder(tmp_path, options.pop("family"), **options)
    prompt, logits = make_prompts(2, TOKENIZER_SIZE)[1], []
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(folder, dtype=dtype, attention_backend=backend)
        with recorded_logits(engine, every_position=True) as found:
            generate_ids(engine, [prompt], 4)
        logits.append(torch.stack([found[position] for position in range(len(prompt))]))
    model = reference(folder)
    with torch.inference_mode():
        exact = model(torch.tensor([prompt])).logits[0]
        rounded = model.bfloat16()(torch.tensor([prompt])).logits[0]
    theirs = relative_error(rounded.float(), exact)
    assert 0 < relative_error(logits[1], logits[0]) < 1.5 * theirs < 0.3


@pytest.mark.parametrize(
    ("variant", "form"),
    [("deepseek-v3", "fp8-block"), ("deepseek-v3", "w4a16"), ("glm4", "awq"), ("glm4", "gptq-4-order")],
)
def test_a_quantised_folder_gives_the_tokens_of_its_values(tmp_path: Path, variant: str, form: str) -> None:
    """Also where rows change places as they are loaded, and where a matrix is taken apart."""
    sizes = {"hidden_size": 144, "num_hidden_layers": 2}
    for key in ("q_lora_rank", "kv_lora_rank", "v_head_dim", "moe_intermediate_size"):
        if key in VARIANTS[variant]:
            sizes[key] = 16
    options = {**VARIANTS[variant], **sizes}
    source = make_hf_folder(tmp_path / "source", options.pop("family"), **options)
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    values = load_script("quantize_checkpoint").quantize_folder(source, quantised, form, 16)
    plain.mkdir()
    for file in source.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    stored = load_file(source / "model.safetensors")
    assert values.keys() <= stored.keys() and len(values) > 8
    save_file({**stored, **values}, plain / "model.safetensors")
    prompts = make_prompts(6, TOKENIZER_SIZE)
    expected = generate_ids(make_engine(plain), prompts)
    assert generate_ids(make_engine(quantised), prompts) == expected
    assert expected != generate_ids(make_engine(source), prompts)
