"""Reads the experts of a layer from the metadata of a GGUF file, as llama.cpp computes them.

Imports no torch.
"""

from __future__ import annotations

from microvllm.adapters.files.fields import MAX_EXPERTS, Fields, shorten
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.tensors import BARE
from microvllm.ops.routing import Routing

SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of what makes scores of the router's logits
CORRECTION = f"blk.{{i}}.exp_probs_b.bias{BARE}"  # the name of that tensor
GROUPS, CHOSEN_GROUPS = "expert_group_count", "expert_group_used_count"


def gguf_experts(keys: Fields, *, scores: int, normalized: bool | None = None) -> Experts:
    """The experts of one layer; a shared one is the caller's.

    scores: those of a file that does not name them. normalized: whether the architecture divides the weights
    by their sum, which the file may not contradict; None where the file decides. Raises `ModelFileError`
    naming the key for numbers that do not fit each other, and for other ways of routing.
    """
    count, num_chosen = keys.size("expert_count", at_most=MAX_EXPERTS), keys.size("expert_used_count")
    scores = keys.get("expert_gating_func") or scores
    if scores not in (SOFTMAX, SIGMOID):
        raise keys.error("expert_gating_func", f"{shorten(scores)} is not supported")
    stored = keys.flag("expert_weights_norm", bool(normalized))
    if normalized is not None and stored != normalized:
        raise keys.error("expert_weights_norm", f"must be {str(normalized).lower()} for this architecture")
    groups, chosen_groups = (keys.size(key, 0, at_least=0) or 1 for key in (GROUPS, CHOSEN_GROUPS))
    if count % groups:
        raise keys.error(GROUPS, f"{groups} does not divide the {count} experts")
    if groups > 1 and scores != SIGMOID:
        raise keys.error(GROUPS, "is above 1, which is supported for sigmoids alone")
    if chosen_groups > groups:
        raise keys.error(CHOSEN_GROUPS, f"is {chosen_groups}, but there are {groups} groups")
    available = count // groups * chosen_groups
    if num_chosen > available:
        raise keys.error("expert_used_count", f"is {num_chosen}, but there are {available} experts")
    return Experts(
        count=count,
        size=keys.size("expert_feed_forward_length"),
        routing=Routing(
            num_chosen=num_chosen,
            sigmoid=scores == SIGMOID,
            normalized=stored,
            scale=keys.number("expert_weights_scale") if keys.get("expert_weights_scale") else 1.0,
            num_groups=groups,
            num_chosen_groups=chosen_groups,
        ),
    )


def without_experts(keys: Fields) -> Fields:
    """The keys of the model with plain MLPs, whose width is that of the experts if there is no other."""
    plain = {key: keys.get(key) for key in keys if not key.startswith("expert_")}
    width = plain.get("feed_forward_length", keys.get("expert_feed_forward_length"))
    return Fields(keys.path, {**plain, "feed_forward_length": width}, keys.where)
