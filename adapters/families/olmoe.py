"""OLMoE (arXiv:2409.02060): many small experts in every layer, and norms over all of q and of k."""

from __future__ import annotations

from microvllm.adapters.families.qwen_moe import TENSORS
from microvllm.adapters.family import Family, with_mlp
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_experts import SOFTMAX, gguf_experts, without_experts
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import hf_spec, read_experts
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe an OLMoE model from the `config.json` of its folder."""
    if "clip_qkv" in config:
        raise config.error("clip_qkv", "is set: clipped queries, keys and values are not supported")
    bias = config.flag("attention_bias")
    spec = hf_spec(
        config,
        "olmoe",
        default_max_position=4096,
        default_eps=1e-5,
        qkv_bias=bias,
        o_bias=bias,
        has_experts=True,
    )
    experts = read_experts(
        config,
        count=64,
        num_chosen=8,
        size=config.size("intermediate_size"),
        normalized=config.flag("norm_topk_prob"),
    )
    return with_mlp(_whole_norms(spec), experts)


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe an OLMoE model from a GGUF file; llama.cpp normalises the weights of none of them."""
    keys = gguf_keys(file)
    if "expert_feed_forward_length" not in keys:
        keys = keys.with_value("expert_feed_forward_length", keys.get("feed_forward_length"))
    experts = gguf_experts(keys, scores=SOFTMAX, normalized=False)
    return with_mlp(_whole_norms(gguf_spec(file, keys=without_experts(keys))), experts)


def _whole_norms(spec: ModelSpec) -> ModelSpec:
    return spec.with_layers(layer.with_mixer(qk_norm=False, whole_qk_norm=True) for layer in spec.layers)


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=from_gguf,
    gguf_name="olmoe",
)
