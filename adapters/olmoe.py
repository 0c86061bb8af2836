"""OLMoE (arXiv:2409.02060): many small experts in every layer, and norms over all of q and of k."""

from __future__ import annotations

import msgspec

from microvllm.adapters.family import Family
from microvllm.adapters.fields import Fields
from microvllm.adapters.hf_config import hf_spec, read_experts
from microvllm.adapters.qwen_moe import TENSORS
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe an OLMoE model from the `config.json` of its folder."""
    if "clip_qkv" in config:
        raise config.error("clip_qkv", "is set: clipped queries, keys and values are not supported")
    bias = config.flag("attention_bias")
    spec = hf_spec(config, "olmoe", default_max_position=4096, qkv_bias=bias, o_bias=bias, has_experts=True)
    experts = read_experts(
        config,
        count=64,
        num_chosen=8,
        size=config.size("intermediate_size"),
        normalized=config.flag("norm_topk_prob"),
    )
    layers = (
        msgspec.structs.replace(layer.with_mixer(whole_qk_norm=True), mlp=experts) for layer in spec.layers
    )
    eps = config.number("rms_norm_eps", 1e-5)
    return msgspec.structs.replace(spec, layers=tuple(layers), rms_norm_eps=eps)


FAMILY = Family("olmoe", "OlmoeForCausalLM", from_hf, hf_tensors=TENSORS)
