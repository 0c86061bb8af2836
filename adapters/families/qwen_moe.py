"""Qwen2-MoE and Qwen3-MoE: a router over many small experts in most layers (arXiv:2407.10671, 2505.09388).

Qwen2's layers also have an expert that every token goes to, behind a sigmoid.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.family import HF_TENSORS, Family, with_mlp
from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import hf_spec, layer_windows, read_experts
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.spec import ModelSpec

TENSORS = {
    **HF_TENSORS,
    "router": "model.layers.{i}.mlp.gate",
    "expert_gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "expert_up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "expert_down": "model.layers.{i}.mlp.experts.{e}.down_proj",
    "shared_gate": "model.layers.{i}.mlp.shared_expert.gate_proj",
    "shared_up": "model.layers.{i}.mlp.shared_expert.up_proj",
    "shared_down": "model.layers.{i}.mlp.shared_expert.down_proj",
    "shared_scale": "model.layers.{i}.mlp.shared_expert_gate",
}


def qwen3_from_hf(config: Fields) -> ModelSpec:
    """Describe a Qwen3-MoE model from the `config.json` of its folder."""
    bias = config.flag("attention_bias")
    spec = hf_spec(
        config,
        "qwen3_moe",
        default_max_position=32768,
        default_kv_heads=4,
        windows=_qwen3_windows,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        has_experts=True,
    )
    experts = read_experts(
        config,
        count=128,
        num_chosen=8,
        size=config.size("moe_intermediate_size", 768),
        normalized=config.flag("norm_topk_prob"),
    )
    return sparse(spec, config, experts)


def qwen2_from_hf(config: Fields) -> ModelSpec:
    """Describe a Qwen2-MoE model from the `config.json` of its folder."""
    spec = hf_spec(
        config,
        "qwen2_moe",
        default_max_position=32768,
        default_kv_heads=16,
        windows=_qwen2_windows,
        qkv_bias=config.flag("qkv_bias", True),
        has_experts=True,
    )
    experts = read_experts(
        config,
        count=60,
        num_chosen=4,
        size=config.size("moe_intermediate_size", 1408),
        normalized=config.flag("norm_topk_prob"),
        shared_size=config.size("shared_expert_intermediate_size", 5632),
    )
    return sparse(spec, config, experts)


def qwen3_from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Qwen3-MoE model from a GGUF file; llama.cpp normalises the weights of all of them."""
    return msgspec.structs.replace(gguf_spec(file), architecture="qwen3_moe")


def qwen2_from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Qwen2-MoE model from a GGUF file; llama.cpp normalises the weights of none of them."""
    spec, keys = gguf_spec(file), gguf_keys(file)
    experts = spec.layers[0].mlp
    if not isinstance(experts, Experts):
        raise ModelFileError(file.path, f"{keys.where}expert_count is missing")
    if keys.get("expert_weights_norm"):
        raise keys.error("expert_weights_norm", "is true, which this architecture does not have")
    experts = msgspec.structs.replace(
        experts,
        routing=msgspec.structs.replace(experts.routing, normalized=False),
        shared_size=keys.size("expert_shared_feed_forward_length", keys.size("feed_forward_length")),
        shared_gate=True,
    )
    return with_mlp(spec, experts, architecture="qwen2_moe")


def sparse(spec: ModelSpec, config: Fields, experts: Experts) -> ModelSpec:
    """Experts in every `decoder_sparse_step`-th layer, but not in `mlp_only_layers`, counted from 0."""
    step = config.size("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < spec.num_layers for i in dense):
        raise config.error(
            "mlp_only_layers", f"must list layers from 0 to {spec.num_layers - 1}, got {shorten(dense)}"
        )
    return with_mlp(spec, experts, lambda index: index not in dense and (index + 1) % step == 0)


def _qwen3_windows(config: Fields, num_layers: int) -> Sequence[int | None]:
    return _windows(config, num_layers, [True] * num_layers)


def _qwen2_windows(config: Fields, num_layers: int) -> Sequence[int | None]:
    """Those of every second layer below `max_window_layers`, if the configuration lists no kinds."""
    first = config.size("max_window_layers", 28)
    return _windows(config, num_layers, [index % 2 == 0 and index < first for index in range(num_layers)])


def _windows(config: Fields, num_layers: int, slides: Sequence[bool]) -> Sequence[int | None]:
    if not config.flag("use_sliding_window") or config.is_null("sliding_window"):
        return [None] * num_layers
    return layer_windows(config, num_layers, config.size("sliding_window", 4096), slides)


QWEN2 = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    qwen2_from_hf,
    hf_tensors=TENSORS,
    from_gguf=qwen2_from_gguf,
    gguf_name="qwen2moe",
)
QWEN3 = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    qwen3_from_hf,
    hf_tensors=TENSORS,
    from_gguf=qwen3_from_gguf,
    gguf_name="qwen3moe",
)
