"""Qwen3, dense: no biases as a rule, RMSNorm on each head of q and k instead (arXiv:2505.09388)."""

from __future__ import annotations

from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_spec import gguf_spec
from microvllm.adapters.files.hf_config import hf_spec, qwen_windows
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Qwen3 model from the `config.json` of its folder."""
    bias = config.flag("attention_bias")
    return hf_spec(
        config,
        "qwen3",
        default_max_position=32768,
        default_kv_heads=32,
        default_head_dim=128,
        windows=qwen_windows,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", from_hf, from_gguf=gguf_spec, gguf_name="qwen3")
