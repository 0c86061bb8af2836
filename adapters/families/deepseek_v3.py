"""DeepSeek-V3 (arXiv:2412.19437) and GLM-4.7-Flash: latent attention and routed experts."""

from __future__ import annotations

import msgspec

from microvllm.adapters.families import deepseek_gguf
from microvllm.adapters.families.routed_experts import KEYS, MTP_TENSORS, TENSORS, Defaults, with_experts
from microvllm.adapters.family import HF_TENSORS, Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.hf_config import hf_spec
from microvllm.adapters.layers.latent import LatentAttention
from microvllm.adapters.rope_spec import Rotary, rope_from_hf, yarn_attention_factor
from microvllm.adapters.spec import ModelSpec

ATTENTION = "model.layers.{i}.self_attn"
DEEPSEEK_TENSORS = {
    **HF_TENSORS,
    **TENSORS,
    "q_a": f"{ATTENTION}.q_a_proj",
    "q_a_norm": f"{ATTENTION}.q_a_layernorm",
    "q_b": f"{ATTENTION}.q_b_proj",
    "kv_a": f"{ATTENTION}.kv_a_proj_with_mqa",
    "kv_a_norm": f"{ATTENTION}.kv_a_layernorm",
    "kv_b": f"{ATTENTION}.kv_b_proj",
}


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What a family's configuration class has for absent keys."""

    q_rank: int
    nope_dim: int
    value_dim: int
    max_position: int
    rms_norm_eps: float


DEEPSEEK = Sizes(q_rank=1536, nope_dim=128, value_dim=128, max_position=4096, rms_norm_eps=1e-6)
GLM = Sizes(q_rank=768, nope_dim=192, value_dim=256, max_position=202752, rms_norm_eps=1e-5)


def deepseek_from_hf(config: Fields) -> ModelSpec:
    """Describe a DeepSeek-V3 model from the `config.json` of its folder."""
    experts = Defaults(
        count=256,
        num_chosen=8,
        size=2048,
        num_dense=3,
        scale=2.5,
        num_groups=8,
        num_chosen_groups=4,
    )
    return with_experts(_latent_spec(config, "deepseek_v3", DEEPSEEK), config, experts)


def glm_from_hf(config: Fields) -> ModelSpec:
    """Describe a GLM-4.7-Flash model from the `config.json` of its folder."""
    spec = _latent_spec(config, "glm4_moe_lite", GLM)
    return with_experts(spec, config, Defaults(count=64, num_chosen=4, size=1536, scale=1.8))


def _latent_spec(config: Fields, name: str, sizes: Sizes) -> ModelSpec:
    """The model with MLPs in all layers."""
    rope_dim = config.size("qk_rope_head_dim", 64)
    if rope_dim % 2:
        raise config.error("qk_rope_head_dim", f"must be even for rotary embeddings, got {rope_dim}")
    interleaved = config.flag("rope_interleave", True)

    def rotary(config: Fields, _: int, default_max_position: int) -> Rotary:
        return rope_from_hf(config, rope_dim, default_max_position, interleaved=interleaved)

    spec = hf_spec(
        config,
        name,
        default_max_position=sizes.max_position,
        default_head_dim=rope_dim,
        default_eps=sizes.rms_norm_eps,
        rotary=rotary,
        expert_keys=KEYS,
    )
    heads = config.size("num_attention_heads")
    if config.size("num_key_value_heads", heads) != heads:
        raise config.error("num_key_value_heads", f"must be num_attention_heads, {heads}")
    nope_dim = config.size("qk_nope_head_dim", sizes.nope_dim)
    q_rank = None if config.is_null("q_lora_rank") else config.size("q_lora_rank", sizes.q_rank)
    bias = config.flag("attention_bias")
    if bias and q_rank is None:
        raise config.error("attention_bias", "is not supported without a q_lora_rank")
    mixer = LatentAttention(
        num_heads=heads,
        rank=config.size("kv_lora_rank", 512),
        rope_dim=rope_dim,
        nope_dim=nope_dim,
        value_dim=config.size("v_head_dim", sizes.value_dim),
        q_rank=q_rank,
        rope=spec.mixers[0].rope,
        scale=(nope_dim + rope_dim) ** -0.5 * _score_scale(config),
        bias=bias,
    )
    return spec.with_layers(layer.with_parts(mixer=mixer) for layer in spec.layers)


def _score_scale(config: Fields) -> float:
    """yarn's attention factor for `mscale_all_dim`, once for queries and once for keys."""
    scaling = config.part("rope_scaling") or config.part("rope_parameters")
    if scaling is None or not scaling.get("mscale_all_dim"):
        return 1.0
    if scaling.text("rope_type", scaling.text("type", "default")) != "yarn":
        return 1.0
    factor = scaling.number("factor", at_least=1.0)
    return yarn_attention_factor(factor, scaling.number("mscale_all_dim")) ** 2


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    deepseek_from_hf,
    hf_tensors=DEEPSEEK_TENSORS,
    hf_unused=MTP_TENSORS,
    from_gguf=deepseek_gguf.from_gguf,
    gguf_name="deepseek2",
    gguf_tensors=deepseek_gguf.TENSORS,
)
GLM4_MOE_LITE = Family(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    glm_from_hf,
    hf_tensors=DEEPSEEK_TENSORS,
    hf_unused=MTP_TENSORS,
)
