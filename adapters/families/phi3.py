"""Phi-3, Phi-3.5 and Phi-4-mini (arXiv:2404.14219, 2503.01743): Llama with fused tensors in the checkpoint.

Phi-4-mini rotates a part of each head.
"""

from __future__ import annotations

from functools import partial

from microvllm.adapters.family import GGUF_TENSORS, HF_TENSORS, Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_spec
from microvllm.adapters.files.hf_config import hf_spec, same_windows
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import ModelSpec

TENSORS = {
    **HF_TENSORS,
    "qkv": "model.layers.{i}.self_attn.qkv_proj",
    "gate_up": "model.layers.{i}.mlp.gate_up_proj",
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Phi-3 model from the `config.json` of its folder."""
    return hf_spec(
        config,
        "phi3",
        default_max_position=4096,
        default_eps=1e-5,
        windows=same_windows,
        rotary=partial(rope_from_hf, partial=1.0),
    )


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Phi-3 model from a GGUF file."""
    return gguf_spec(file, rotates_parts=True)


FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=from_gguf,
    gguf_name="phi3",
    gguf_tensors={**GGUF_TENSORS, "qkv": "blk.{i}.attn_qkv", "gate_up": "blk.{i}.ffn_up"},
)
