"""MiniMax-M2: a part of each head rotated, norms over all of q and of k, sigmoid routing."""

from __future__ import annotations

from functools import partial

import msgspec

from microvllm.adapters.families.mixtral import EXPERTS
from microvllm.adapters.families.mixtral import TENSORS as MIXTRAL_TENSORS
from microvllm.adapters.family import GGUF_TENSORS, Family, with_mlp
from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.files.gguf_experts import CORRECTION, SIGMOID, gguf_experts, without_experts
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import hf_spec, read_experts
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.tensors import BARE

TENSORS = {**MIXTRAL_TENSORS, "correction": f"{EXPERTS}.e_score_correction_bias{BARE}"}
# What else a configuration may say, and where that changes nothing here.
SAME = {
    "qk_norm_type": (None, "per_layer"),
    "scoring_func": (None, "sigmoid"),
    "use_qk_norm": (None, True),
    "use_routing_bias": (None, True),
    "shared_intermediate_size": (None, 0),
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe a MiniMax-M2 model from the `config.json` of its folder."""
    for key, unchanged in SAME.items():
        if config.get(key) not in unchanged:
            raise config.error(key, f"must be {unchanged[1]}, got {shorten(config.get(key))}")
    kinds = config.get("attn_type_list", [])
    if not isinstance(kinds, list) or any(kind != 1 for kind in kinds):
        raise config.error("attn_type_list", "may only list 1: linear attention is not supported")
    spec = hf_spec(
        config,
        "minimax_m2",
        default_max_position=196608,
        default_kv_heads=8,
        default_head_dim=128,
        rotary=partial(rope_from_hf, theta=5e6, partial=_rotated_part(config)),
        expert_keys=("scoring_func",),
        has_experts=True,
    )
    experts = read_experts(
        config, count=256, num_chosen=8, size=config.size("intermediate_size"), normalized=True
    )
    layers = (layer.with_mixer(whole_qk_norm=True) for layer in spec.layers)
    return with_mlp(spec.with_layers(layers), _corrected(experts))


def _corrected(experts: Experts) -> Experts:
    """With scores that are sigmoids, and a correction for the choice."""
    routing = msgspec.structs.replace(experts.routing, sigmoid=True)
    return msgspec.structs.replace(experts, routing=routing, correction=True)


def _rotated_part(config: Fields) -> float:
    """The files say `rotary_dim` for what transformers calls `partial_rotary_factor`."""
    if "rotary_dim" not in config:
        return 1.0
    return config.size("rotary_dim") / config.size("head_dim", 128)


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a MiniMax-M2 model from a GGUF file."""
    keys = gguf_keys(file)
    experts = gguf_experts(keys, scores=SIGMOID, normalized=True)
    experts = msgspec.structs.replace(experts, correction=True)
    spec = gguf_spec(file, keys=without_experts(keys), rotates_parts=True)
    layers = (layer.with_mixer(qk_norm=False, whole_qk_norm=True) for layer in spec.layers)
    return with_mlp(spec.with_layers(layers, architecture="minimax_m2"), experts)


FAMILY = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=from_gguf,
    gguf_name="minimax-m2",
    gguf_tensors={**GGUF_TENSORS, "correction": CORRECTION},
)
