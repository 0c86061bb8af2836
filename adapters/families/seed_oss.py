"""Seed-OSS 36B (ByteDance): Llama with biases on q, k and v."""

from __future__ import annotations

from microvllm.adapters.family import GGUF_TENSORS, Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_spec import gguf_spec
from microvllm.adapters.files.hf_config import hf_spec
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Seed-OSS model from the `config.json` of its folder."""
    return hf_spec(
        config,
        "seed_oss",
        default_max_position=524288,
        default_kv_heads=8,
        default_head_dim=128,
        qkv_bias=config.flag("attention_bias", True),
        o_bias=config.flag("attention_out_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


FAMILY = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    from_hf,
    from_gguf=gguf_spec,
    gguf_name="seed_oss",
    gguf_tensors={**GGUF_TENSORS, "mlp_norm": "blk.{i}.post_attention_norm"},
)
