"""Mistral 7B and its successors: Llama with an optional sliding window (arXiv:2310.06825).

GGUF has no such architecture: Mistral's files name themselves llama.
"""

from __future__ import annotations

from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.hf_config import hf_spec
from microvllm.adapters.spec import ModelSpec

DEFAULT_WINDOW = 4096


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Mistral model from the `config.json` of its folder."""
    if "layer_types" in config:
        raise config.error("layer_types", "is not supported for Mistral models")
    return hf_spec(
        config,
        "mistral",
        default_max_position=131072,
        default_kv_heads=8,
        windows=_windows,
    )


def _windows(config: Fields, num_layers: int) -> list[int | None]:
    absent = config.is_null("sliding_window")
    return [None if absent else config.size("sliding_window", DEFAULT_WINDOW)] * num_layers


FAMILY = Family("mistral", "MistralForCausalLM", from_hf)
