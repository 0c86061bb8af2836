"""Reads the experts of DeepSeek-V3 (arXiv:2412.19437) and of what took them over, from config.json.

Their scores are sigmoids, to which a correction is added for the choice alone, of some groups of experts; a
shared one is for every token, and the first layers are dense. Imports no torch.
"""

from __future__ import annotations

import msgspec

from microvllm.adapters.family import with_mlp
from microvllm.adapters.files.fields import MAX_EXPERTS, Fields, shorten
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.tensors import BARE
from microvllm.ops.routing import Routing

LAYER = "model.layers.{i}.mlp"
# Names of the roles in a layer with experts.
TENSORS = {
    "router": f"{LAYER}.gate",
    "correction": f"{LAYER}.gate.e_score_correction_bias{BARE}",
    "expert_gate": f"{LAYER}.experts.{{e}}.gate_proj",
    "expert_up": f"{LAYER}.experts.{{e}}.up_proj",
    "expert_down": f"{LAYER}.experts.{{e}}.down_proj",
    "shared_gate": f"{LAYER}.shared_experts.gate_proj",
    "shared_up": f"{LAYER}.shared_experts.up_proj",
    "shared_down": f"{LAYER}.shared_experts.down_proj",
}
# Keys of experts that `with_experts` reads: see `hf_config.refuse_unsupported`.
KEYS = (
    *("n_routed_experts", "num_local_experts", "n_shared_experts"),
    *("n_group", "routed_scaling_factor", "scoring_func"),
)
# The layer behind the last one predicts further tokens, for drafts.
MTP_TENSORS = ("model.layers.{n}.",)


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a family's configuration class has for absent keys."""

    count: int
    num_chosen: int
    size: int
    shared: int = 1
    num_dense: int = 1
    scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1


def with_experts(spec: ModelSpec, config: Fields, defaults: Defaults) -> ModelSpec:
    """The model with experts in all layers but the first few.

    Raises `ModelFileError` for numbers that do not fit each other, and for other ways of routing.
    """
    if config.get("moe_layer_freq") not in (None, 1):
        raise config.error("moe_layer_freq", "other than 1 is not supported")
    experts = routed_experts(config, defaults)
    return with_mlp(spec, experts, _are_sparse(config, spec.num_layers, defaults.num_dense).__getitem__)


def routed_experts(config: Fields, defaults: Defaults) -> Experts:
    """The experts of a layer. Raises `ModelFileError` as `with_experts` does."""
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.get(key) not in (None, only):
            raise config.error(key, f"must be {only}, got {shorten(config.get(key))}")
    count = _count(config, defaults.count)
    num_chosen = config.size("num_experts_per_tok", defaults.num_chosen)
    groups = config.size("n_group", defaults.num_groups)
    chosen_groups = config.size("topk_group", defaults.num_chosen_groups)
    if count % groups:
        raise config.error("n_group", f"{groups} does not divide the {count} experts")
    if chosen_groups > groups:
        raise config.error("topk_group", f"is {chosen_groups}, but there are {groups} groups (n_group)")
    if num_chosen > count // groups * chosen_groups:
        raise config.error(
            "num_experts_per_tok", f"is {num_chosen}, but there are {count // groups * chosen_groups} experts"
        )
    size = config.size("moe_intermediate_size", defaults.size)
    shared = 0 if config.get("n_shared_experts") == 0 else config.size("n_shared_experts", defaults.shared)
    return Experts(
        count=count,
        size=size,
        routing=Routing(
            num_chosen=num_chosen,
            sigmoid=True,
            normalized=config.flag("norm_topk_prob", True),
            scale=config.number("routed_scaling_factor", defaults.scale),
            num_groups=groups,
            num_chosen_groups=chosen_groups,
        ),
        correction=True,
        shared_size=shared * size,
    )


def _are_sparse(config: Fields, num_layers: int, default: int) -> list[bool]:
    """Whether each layer has experts: by `mlp_layer_types`, or all but the first few."""
    kinds = config.get("mlp_layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers or {*kinds} - {"dense", "sparse"}:
            problem = f"must list dense or sparse for each of the {num_layers} layers"
            raise config.error("mlp_layer_types", problem)
        return [kind == "sparse" for kind in kinds]
    dense = config.size("first_k_dense_replace", default, at_least=0, at_most=num_layers)
    return [index >= dense for index in range(num_layers)]


def _count(config: Fields, default: int) -> int:
    """transformers may write either of two names."""
    other = "num_local_experts"
    count = config.size("n_routed_experts", config.size(other, default), at_most=MAX_EXPERTS)
    if config.size(other, count) != count:
        raise config.error(other, f"is {config.get(other)}, but n_routed_experts is {count}")
    return count
