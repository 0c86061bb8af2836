"""Mixtral 8x7B and 8x22B: Mistral with 8 experts in every layer (arXiv:2401.04088).

GGUF has no such architecture: Mixtral's files name themselves llama.
"""

from __future__ import annotations

from functools import partial

from microvllm.adapters.family import HF_TENSORS, Family, with_mlp
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.hf_config import hf_spec, read_experts, same_windows
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import ModelSpec

EXPERTS = "model.layers.{i}.block_sparse_moe"
TENSORS = {
    **HF_TENSORS,
    "router": f"{EXPERTS}.gate",
    "expert_gate": f"{EXPERTS}.experts.{{e}}.w1",
    "expert_up": f"{EXPERTS}.experts.{{e}}.w3",
    "expert_down": f"{EXPERTS}.experts.{{e}}.w2",
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Mixtral model from the `config.json` of its folder."""
    spec = hf_spec(
        config,
        "mixtral",
        default_max_position=131072,
        default_kv_heads=8,
        windows=same_windows,
        default_eps=1e-5,
        rotary=partial(rope_from_hf, theta=1e6),
        has_experts=True,
    )
    experts = read_experts(
        config, count=8, num_chosen=2, size=config.size("intermediate_size"), normalized=True
    )
    return with_mlp(spec, experts)


FAMILY = Family("mixtral", "MixtralForCausalLM", from_hf, hf_tensors=TENSORS)
