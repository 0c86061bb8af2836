"""GLM-4.5, 4.6 and 4.7 (arXiv:2508.06471): DeepSeek-V3's experts, half of each head rotated."""

from __future__ import annotations

from functools import partial

import msgspec

from microvllm.adapters.families.routed_experts import KEYS, MTP_TENSORS, TENSORS, Defaults, with_experts
from microvllm.adapters.family import GGUF_TENSORS, HF_TENSORS, Family, with_mlp
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_experts import CORRECTION, SIGMOID, gguf_experts, without_experts
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import hf_spec
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe a GLM-4 MoE model from the `config.json` of its folder."""
    spec = hf_spec(
        config,
        "glm4_moe",
        default_max_position=131072,
        default_kv_heads=8,
        default_eps=1e-5,
        rotary=partial(rope_from_hf, partial=0.5),
        qkv_bias=config.flag("attention_bias"),
        qk_norm=config.flag("use_qk_norm"),
        expert_keys=KEYS,
    )
    return with_experts(spec, config, Defaults(count=128, num_chosen=8, size=1408))


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a GLM-4 MoE model from a GGUF file."""
    keys = gguf_keys(file)
    experts = gguf_experts(keys, scores=SIGMOID)
    shared = keys.size("expert_shared_count", 0, at_least=0) * experts.size
    experts = msgspec.structs.replace(experts, correction=True, shared_size=shared)
    dense = keys.size("leading_dense_block_count", 0, at_least=0)
    spec = gguf_spec(file, keys=without_experts(keys), rotates_parts=True)
    return with_mlp(spec, experts, lambda index: index >= dense, architecture="glm4_moe")


FAMILY = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    from_hf,
    hf_tensors={**HF_TENSORS, **TENSORS},
    hf_unused=MTP_TENSORS,
    from_gguf=from_gguf,
    gguf_name="glm4moe",
    gguf_tensors={
        **GGUF_TENSORS,
        "mlp_norm": "blk.{i}.post_attention_norm",
        "correction": CORRECTION,
    },
)
