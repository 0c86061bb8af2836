"""Llama 1 to 3.x and everything with its layout, such as SmolLM2 (arXiv:2302.13971, 2407.21783)."""

from __future__ import annotations

from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_spec import gguf_spec
from microvllm.adapters.files.hf_config import hf_spec
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Llama model from the `config.json` of its folder."""
    bias = config.flag("attention_bias")
    return hf_spec(
        config,
        "llama",
        default_max_position=2048,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
    )


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    from_hf,
    from_gguf=gguf_spec,
    gguf_name="llama",
    gguf_interleaved=True,
)
