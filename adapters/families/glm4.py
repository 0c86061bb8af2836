"""GLM-4 and GLM-Z1 (0414): four norms per layer, and neighbours rotated in the first half of each head."""

from __future__ import annotations

from functools import partial

from microvllm.adapters.family import GGUF_TENSORS, HF_TENSORS, Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import hf_spec
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import ModelSpec

TENSORS = {
    **HF_TENSORS,
    "gate_up": "model.layers.{i}.mlp.gate_up_proj",
    "mixer_post_norm": "model.layers.{i}.post_self_attn_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_mlp_layernorm",
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe a GLM-4 model from the `config.json` of its folder."""
    spec = hf_spec(
        config,
        "glm4",
        default_max_position=131072,
        default_kv_heads=2,
        default_head_dim=128,
        default_eps=1.5625e-07,
        rotary=partial(rope_from_hf, partial=0.5, interleaved=True),
        qkv_bias=config.flag("attention_bias", True),
    )
    return _normed(spec)


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a GLM-4 model from a GGUF file; those of models that read images rotate otherwise."""
    keys = gguf_keys(file)
    if "rope.dimension_sections" in keys:
        raise keys.error("rope.dimension_sections", "is not supported")
    return _normed(gguf_spec(file, rotates_parts=True, interleaved=True))


def _normed(spec: ModelSpec) -> ModelSpec:
    return spec.with_layers(layer.with_parts(post_norms=True) for layer in spec.layers)


FAMILY = Family(
    "glm4",
    "Glm4ForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=from_gguf,
    gguf_name="glm4",
    gguf_tensors={
        **GGUF_TENSORS,
        "gate_up": "blk.{i}.ffn_up",
        "mixer_post_norm": "blk.{i}.post_attention_norm",
        "mlp_post_norm": "blk.{i}.post_ffw_norm",
    },
)
