"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (arXiv:2407.10671)."""

from __future__ import annotations

from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_spec import gguf_spec
from microvllm.adapters.files.hf_config import hf_spec, qwen_windows
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Qwen2 model from the `config.json` of its folder."""
    return hf_spec(
        config,
        "qwen2",
        default_max_position=32768,
        default_kv_heads=32,
        windows=qwen_windows,
        qkv_bias=True,
    )


FAMILY = Family("qwen2", "Qwen2ForCausalLM", from_hf, from_gguf=gguf_spec, gguf_name="qwen2")
