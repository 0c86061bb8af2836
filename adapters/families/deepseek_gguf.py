"""DeepSeek-V2 and V3, and GLM-4.7-Flash, from GGUF files as llama.cpp's converter writes them.

All norms have one epsilon there, as in llama.cpp. Imports no torch.
"""

from __future__ import annotations

import msgspec

from microvllm.adapters.family import GGUF_TENSORS, with_mlp
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_experts import (
    CORRECTION,
    SIGMOID,
    SOFTMAX,
    gguf_experts,
    without_experts,
)
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.layers.latent import LatentAttention
from microvllm.adapters.rope_spec import Rotary, rope_from_gguf, yarn_attention_factor
from microvllm.adapters.spec import ModelSpec

TENSORS = {
    **GGUF_TENSORS,
    "q_a": "blk.{i}.attn_q_a",
    "q_a_norm": "blk.{i}.attn_q_a_norm",
    "q_b": "blk.{i}.attn_q_b",
    "kv_a": "blk.{i}.attn_kv_a_mqa",
    "kv_a_norm": "blk.{i}.attn_kv_a_norm",
    "k_b": "blk.{i}.attn_k_b",
    "v_b": "blk.{i}.attn_v_b",
    "correction": CORRECTION,
}
MSCALE = "rope.scaling.yarn_log_multiplier"  # a tenth of DeepSeek's `mscale_all_dim`
# Older files of GLM-4.7-Flash do not say that their scores are sigmoids: their layers, and their vocabulary.
GLM_LAYERS, GLM_VOCABULARY = (47, 48), 154880


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a model of the architecture "deepseek2" from a GGUF file."""
    keys = gguf_keys(file)
    if keys.get("attention.temperature_scale"):
        raise keys.error("attention.temperature_scale", "is set, which is not supported for latent attention")
    rope_dim, rank = keys.size("rope.dimension_count"), keys.size("attention.kv_lora_rank")
    if rope_dim % 2:
        raise keys.error("rope.dimension_count", f"must be even for rotary embeddings, got {rope_dim}")
    head_dim = keys.size("attention.key_length_mla")
    if head_dim <= rope_dim:
        raise keys.error("attention.key_length_mla", f"must be above rope.dimension_count {rope_dim}")
    for key, cached in (("head_count_kv", 1), ("key_length", rank + rope_dim), ("value_length", rank)):
        if keys.size(f"attention.{key}") != cached:
            raise keys.error(f"attention.{key}", f"must be {cached} for latent keys and values")
    rotary, mscale = _rotary(file, keys, rope_dim)
    same = dict.fromkeys(("attention.key_length", "attention.value_length"), rope_dim)
    plain = Fields(file.path, {**without_experts(keys).values, **same}, keys.where)
    spec = gguf_spec(file, keys=plain, rotary=rotary, interleaved=True)
    heads = spec.mixers[0].num_heads
    mixer = LatentAttention(
        num_heads=heads,
        rank=rank,
        rope_dim=rope_dim,
        nope_dim=head_dim - rope_dim,
        value_dim=keys.size("attention.value_length_mla"),
        q_rank=keys.size("attention.q_lora_rank") if "attention.q_lora_rank" in keys else None,
        rope=spec.mixers[0].rope,
        scale=head_dim**-0.5 * mscale**2,
        norm_eps=spec.rms_norm_eps,
        split=True,
    )
    layers = (layer.with_parts(mixer=mixer) for layer in spec.layers)
    spec = spec.with_layers(layers, architecture="deepseek_v3")
    return _with_experts(file, keys, spec) if keys.get("expert_count") else spec


def _rotary(file: GGUFFile, keys: Fields, rope_dim: int) -> tuple[Rotary, float]:
    """The rotation, and by what yarn multiplies queries and keys; not cos and sin, as in V2 and V3."""
    rotary = rope_from_gguf(file, keys.with_value(MSCALE, None), rope_dim)
    if rotary.spec.scaling != "yarn":
        return rotary, 1.0
    if rotary.spec.attention_factor != yarn_attention_factor(rotary.spec.factor):
        raise keys.error("rope.scaling.attn_factor", "other than 1 is not supported")
    mscale = yarn_attention_factor(rotary.spec.factor, 10 * keys.number(MSCALE))
    return Rotary(msgspec.structs.replace(rotary.spec, attention_factor=1.0), rotary.max_position), mscale


def _with_experts(file: GGUFFile, keys: Fields, spec: ModelSpec) -> ModelSpec:
    dense = keys.size("leading_dense_block_count", 0, at_least=0)
    is_glm = spec.num_layers in GLM_LAYERS and spec.vocab_size == GLM_VOCABULARY
    experts = gguf_experts(keys, scores=SIGMOID if is_glm else SOFTMAX)
    experts = msgspec.structs.replace(
        experts,
        correction=f"blk.{dense}.exp_probs_b.bias" in file.tensors,
        shared_size=keys.size("expert_shared_count", 0, at_least=0) * experts.size,
    )
    return with_mlp(spec, experts, lambda index: index >= dense)
