"""ERNIE 4.5 with experts, text only: neighbours rotated, softmax routing with a correction."""

from __future__ import annotations

from functools import partial

import msgspec

from microvllm.adapters.families.routed_experts import LAYER
from microvllm.adapters.families.routed_experts import TENSORS as ROUTED_TENSORS
from microvllm.adapters.family import GGUF_TENSORS, HF_TENSORS, Family, with_mlp
from microvllm.adapters.files.fields import MAX_EXPERTS, Fields, shorten
from microvllm.adapters.files.gguf_experts import CORRECTION, SOFTMAX, gguf_experts, without_experts
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec, num_layers
from microvllm.adapters.files.hf_config import hf_spec
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.tensors import BARE
from microvllm.ops.routing import Routing

TENSORS = {
    **HF_TENSORS,
    **ROUTED_TENSORS,
    "correction": f"{LAYER}.moe_statics.e_score_correction_bias{BARE}",
}
MAX_NORM_MIN = 1e-9  # sums of scores below it, which are not told apart here, do not occur


def from_hf(config: Fields) -> ModelSpec:
    """Describe an ERNIE 4.5 MoE model from the `config.json` of its folder."""
    if config.flag("use_bias"):
        raise config.error("use_bias", "is not supported")
    config.number("moe_norm_min", 1e-12, at_most=MAX_NORM_MIN)
    spec = hf_spec(
        config,
        "ernie4_5_moe",
        default_max_position=131072,
        default_kv_heads=4,
        default_tie=True,
        default_eps=1e-5,
        rotary=partial(rope_from_hf, theta=5e5, interleaved=True),
        expert_keys=("moe_num_experts",),
    )
    count, num_chosen = config.size("moe_num_experts", 64, at_most=MAX_EXPERTS), config.size("moe_k", 6)
    for key, newer, value in (
        ("moe_num_experts", "num_experts", count),
        ("moe_k", "num_experts_per_tok", num_chosen),
    ):
        if config.get(newer, value) != value:
            raise config.error(newer, f"is {shorten(config.get(newer))}, but {key} is {value}")
    if num_chosen > count:
        raise config.error("moe_k", f"is {num_chosen}, but there are {count} experts")
    size = config.size("moe_intermediate_size", 1536)
    key = "moe_num_shared_experts"
    experts = Experts(
        count=count,
        size=size,
        routing=Routing(num_chosen=num_chosen),
        correction=True,
        correction_in_row=True,
        shared_size=size * (0 if config.get(key) == 0 else config.size(key, 2)),
    )
    first, last = _index(config, "moe_layer_start_index", 1), _index(config, "moe_layer_end_index", -1)
    interval = config.size("moe_layer_interval", 1)
    return with_mlp(
        spec,
        experts,
        lambda i: first <= i and (last == -1 or i <= last) and (i + 1) % interval == 0,
    )


def _index(config: Fields, key: str, default: int) -> int:
    index = config.get(key, default)
    if type(index) is not int or index < min(default, 0):
        raise config.error(key, f"must be the number of a layer, got {shorten(index)}")
    return index


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe an ERNIE 4.5 MoE model from a GGUF file."""
    keys = gguf_keys(file)
    experts = gguf_experts(keys, scores=SOFTMAX, normalized=True)
    if experts.routing.sigmoid:
        raise keys.error("expert_gating_func", "must be 1, for a softmax")
    dense, step = (
        keys.size("leading_dense_block_count", 0, at_least=0),
        keys.size("interleave_moe_layer_step"),
    )
    sparse = [index for index in range(dense, num_layers(keys)) if (index + 1) % step == 0]
    stored = file.tensors.get(f"blk.{sparse[0]}.exp_probs_b.bias") if sparse else None
    experts = msgspec.structs.replace(
        experts,
        correction=stored is not None,
        correction_in_row=stored is not None and len(stored.shape) == 2,
        shared_size=keys.size("expert_shared_feed_forward_length", 0, at_least=0),
    )
    spec = gguf_spec(file, keys=without_experts(keys), interleaved=True)
    return with_mlp(spec, experts, lambda index: index in sparse, architecture="ernie4_5_moe")


FAMILY = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=from_gguf,
    gguf_name="ernie4_5-moe",
    gguf_tensors={**GGUF_TENSORS, "correction": CORRECTION},
)
