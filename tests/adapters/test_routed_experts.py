"""Families with other routing than Qwen's: real configurations, and what is refused or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import VARIANTS
from safetensors.torch import load_file, save_file
from tiny_models import make_hf_folder

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.registry import load_spec
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.weights import load_weights
from microvllm.ops.routing import Routing

GLM_45_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
MINIMAX_M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "qk_norm_type": "per_layer",
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
ERNIE_21B = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_theta": 500000,
    "use_bias": False,
    "vocab_size": 103424,
}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "clip_qkv": None,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "vocab_size": 50304,
}


def spec_of(path: Path, config: dict[str, Any], **changes: Any) -> ModelSpec:
    (path / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    return load_spec(path)


def experts_of(spec: ModelSpec) -> list[Experts | None]:
    return [layer.mlp if isinstance(layer.mlp, Experts) else None for layer in spec.layers]


def test_glm_45_air(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GLM_45_AIR)
    experts = Experts(
        count=128,
        size=1408,
        routing=Routing(num_chosen=8, sigmoid=True),
        correction=True,
        shared_size=1408,
    )
    assert experts_of(spec) == [None] + [experts] * 45
    rope = spec.layers[0].mixer.rope
    assert (rope.rotary_dim, rope.interleaved, spec.layers[0].mixer.qk_norm) == (64, False, False)


def test_minimax_m2(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, MINIMAX_M2)
    routing = Routing(num_chosen=8, sigmoid=True)
    assert experts_of(spec) == [Experts(count=256, size=1536, routing=routing, correction=True)] * 62
    mixer = spec.layers[0].mixer
    assert (mixer.rope.rotary_dim, mixer.whole_qk_norm, mixer.q_size) == (64, True, 6144)


def test_ernie(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, ERNIE_21B)
    first, *others = experts_of(spec)
    assert first is None and {experts.shared_size for experts in others if experts} == {3072}
    sparse = {"moe_layer_start_index": 4, "moe_layer_end_index": 9, "moe_layer_interval": 2}
    spec = spec_of(tmp_path, ERNIE_21B, **sparse)
    assert [index for index, experts in enumerate(experts_of(spec)) if experts] == [5, 7, 9]


def test_olmoe(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, OLMOE)
    assert (
        experts_of(spec)
        == [Experts(count=64, size=1024, routing=Routing(num_chosen=8, normalized=False))] * 16
    )
    assert spec.rms_norm_eps == 1e-5


BAD = [
    (GLM_45_AIR, "n_group", 3, "n_group 3 does not divide the 128 experts"),
    (
        GLM_45_AIR,
        "n_routed_experts",
        1 << 20,
        "n_routed_experts must be a positive integer and at most 16384",
    ),
    (ERNIE_21B, "moe_num_experts", 1 << 20, "moe_num_experts must be a positive integer and at most 16384"),
    (GLM_45_AIR, "topk_group", 2, "topk_group is 2, but there are 1 groups"),
    (GLM_45_AIR, "num_experts_per_tok", 129, "num_experts_per_tok is 129, but there are 128 experts"),
    (GLM_45_AIR, "scoring_func", "softmax", "scoring_func must be sigmoid"),
    (GLM_45_AIR, "topk_method", "greedy", "topk_method must be noaux_tc"),
    (
        GLM_45_AIR,
        "first_k_dense_replace",
        47,
        "first_k_dense_replace must be an integer of at least 0 and at most 46",
    ),
    (GLM_45_AIR, "num_local_experts", 64, "num_local_experts is 64, but n_routed_experts is 128"),
    (GLM_45_AIR, "norm_topk_prob", None, "norm_topk_prob must be true or false, got None"),
    (GLM_45_AIR, "routed_scaling_factor", 0, "routed_scaling_factor must be a finite number above 0"),
    (MINIMAX_M2, "attn_type_list", [0, 1], "attn_type_list may only list 1"),
    (MINIMAX_M2, "qk_norm_type", "per_head", "qk_norm_type must be per_layer"),
    (MINIMAX_M2, "scoring_func", "softmax", "scoring_func must be sigmoid"),
    (MINIMAX_M2, "rotary_dim", 256, "partial_rotary_factor must be a finite number"),
    (MINIMAX_M2, "n_group", 4, "n_group is set"),
    (ERNIE_21B, "use_bias", True, "use_bias is not supported"),
    (ERNIE_21B, "moe_k", 65, "moe_k is 65, but there are 64 experts"),
    (ERNIE_21B, "num_experts_per_tok", 2, "num_experts_per_tok is 2, but moe_k is 6"),
    (ERNIE_21B, "num_experts", 32, "num_experts is"),
    (ERNIE_21B, "moe_norm_min", 0.1, "moe_norm_min must be a finite number"),
    (ERNIE_21B, "moe_layer_start_index", [1], "moe_layer_start_index must be the number of a layer"),
    (OLMOE, "clip_qkv", 8.0, "clip_qkv is set"),
]


@pytest.mark.parametrize(("config", "key", "value", "said"), BAD)
def test_a_bad_key_is_named(tmp_path: Path, config: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        spec_of(tmp_path, config, **{key: value})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_layer_for_drafts_is_left_out(tmp_path: Path) -> None:
    """It lies behind the last one; what lies behind it is unknown. Corrections are not rounded."""
    options = dict(VARIANTS["glm4-moe"])
    folder = make_hf_folder(tmp_path, options.pop("family"), tokenizer=False, **options)
    spec, path = load_spec(folder), folder / "model.safetensors"
    tensors = load_file(path)
    correction = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    drafts = {
        "model.layers.4.eh_proj.weight": torch.ones(3),
        "model.layers.4.embed_tokens.weight": torch.ones(3),
    }
    save_file({**tensors, **drafts}, path)
    weights = load_weights(folder, spec, "auto", torch.bfloat16)
    assert torch.equal(weights["layers.1.correction"], correction) and correction.abs().min() > 0
    assert weights["layers.1.router"].dtype == torch.bfloat16
    save_file({**tensors, "model.layers.5.eh_proj.weight": torch.ones(3)}, path)
    with pytest.raises(ModelFileError, match=r"tensor model\.layers\.5\.eh_proj\.weight is there"):
        load_weights(folder, spec, "auto", torch.float32)
