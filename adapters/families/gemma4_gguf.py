"""Gemma 4 from GGUF files, as llama.cpp writes and computes them. Imports no torch."""

from __future__ import annotations

import msgspec

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.families.gemma2 import GGUF_NAMES, sliding_pattern
from microvllm.adapters.families.gemma3 import softcap
from microvllm.adapters.files.fields import MAX_EXPERTS, Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.layers.dense_and_experts import DenseAndExperts
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.layer_tails import LayerTails
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.rope_spec import LLAMA3_TENSOR, RopeSpec, Rotary
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.tensors import BARE
from microvllm.ops.routing import Routing

ACTIVATION = "gelu_tanh"
TENSORS = {
    **GGUF_NAMES,
    "k_as_v": GGUF_NAMES["k"],
    "router_scale": f"blk.{{i}}.ffn_gate_inp.scale{BARE}",
    "expert_scale": f"blk.{{i}}.ffn_down_exps.scale{BARE}",
    "expert_gate_up": "blk.{i}.ffn_gate_up_exps",
    "dense_post_norm": "blk.{i}.post_ffw_norm_1",
    "experts_norm": "blk.{i}.pre_ffw_norm_2",
    "experts_post_norm": "blk.{i}.post_ffw_norm_2",
    "inputs_embed": "per_layer_token_embd",
    "inputs_projection": "per_layer_model_proj",
    "inputs_norm": "per_layer_proj_norm",
    "input_gate": "blk.{i}.inp_gate",
    "input_projection": "blk.{i}.proj",
    "input_post_norm": "blk.{i}.post_norm",
    "layer_scale": "blk.{i}.layer_output_scale",
}
LISTED = ("attention.head_count_kv", "feed_forward_length")  # may differ between layers
HEAD_SIZES = (
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
)  # by the kind of layer


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Gemma 4 model from a GGUF file."""
    keys = gguf_keys(file)
    if keys.get("rope.scaling.type") not in (None, "none"):
        raise keys.error("rope.scaling.type", "is not supported for Gemma 4 models")
    num_layers = keys.size("block_count")
    kv_heads, widths = (_listed(keys, key, num_layers) for key in LISTED)
    full_dim, local_dim = (_head_dim(keys, suffix) for suffix in ("", "_swa"))
    local = RopeSpec(theta=keys.number("rope.freq_base_swa", 1e4))
    ropes = {True: local, False: _full_rope(file, keys, full_dim)}
    experts = _experts(keys)
    same = {
        **dict(zip(LISTED, (kv_heads[0], widths[0]), strict=True)),
        **dict.fromkeys(HEAD_SIZES, local_dim),
    }
    plain = {key: same.get(key, keys.get(key)) for key in keys if not key.startswith("expert_")}
    rotary = Rotary(local, keys.size("context_length"))
    spec = gguf_spec(file, keys=Fields(file.path, plain, keys.where), rotary=rotary)
    slides = sliding_pattern(keys, num_layers, 6)
    shared = keys.size("attention.shared_kv_layers") if keys.get("attention.shared_kv_layers") else 0
    if shared >= num_layers:
        raise keys.error(
            "attention.shared_kv_layers", f"must be below block_count {num_layers}, got {shared}"
        )
    layers = []
    for index, (layer, sliding) in enumerate(zip(spec.layers, slides, strict=True)):
        source = None
        if index >= num_layers - shared:
            own = [other for other in range(num_layers - shared) if slides[other] == sliding]
            if not own or kv_heads[own[-1]] != kv_heads[index]:
                raise keys.error("attention.shared_kv_layers", f"leaves no layer like {index} to share with")
            source = own[-1]
        if layer.attention.num_heads % kv_heads[index]:
            raise keys.error(
                "attention.head_count_kv", f"{kv_heads[index]} do not divide attention.head_count"
            )
        mixer = msgspec.structs.replace(
            layer.attention,
            num_kv_heads=kv_heads[index],
            head_dim=local_dim if sliding else full_dim,
            rope=ropes[sliding],
            window=layer.attention.window if sliding else None,
            scale=1.0,
            v_norm=True,
            keys_as_values=source is None and f"blk.{index}.attn_v.weight" not in file.tensors,
            source=source,
        )
        dense = MLP(size=widths[index], activation=ACTIVATION)
        mlp = dense if experts is None else DenseAndExperts(dense=dense, experts=experts)
        layers.append(layer.with_parts(mixer=mixer, mlp=mlp, post_norms=True))
    size = keys.get("embedding_length_per_layer_input") and keys.size("embedding_length_per_layer_input")
    return spec.with_layers(
        layers,
        architecture="gemma4_text",
        embedding_scale=spec.hidden_size**0.5,
        logits_softcap=softcap(keys),
        tails=LayerTails(input_size=size or 0, activation=ACTIVATION),
    )


def _listed(keys: Fields, key: str, num_layers: int) -> list[int]:
    """A size for each layer, which may be one for all."""
    value = keys.get(key)
    if not isinstance(value, list):
        return [keys.size(key)] * num_layers
    if len(value) != num_layers or not all(type(each) is int and each > 0 for each in value):
        raise keys.error(key, f"must be a size, or one for each of the {num_layers} layers")
    return value


def _head_dim(keys: Fields, suffix: str) -> int:
    """The head size of a kind of layer, which keys, values and rotation have in common."""
    head_dim = keys.size(f"{HEAD_SIZES[0]}{suffix}")
    for key in HEAD_SIZES[1:]:
        if keys.size(f"{key}{suffix}", head_dim) != head_dim:
            raise keys.error(
                f"{key}{suffix}", f"differs from the head size {head_dim}, which is not supported"
            )
    if head_dim % 2:
        raise keys.error(f"{HEAD_SIZES[0]}{suffix}", f"must be even for rotary embeddings, got {head_dim}")
    return head_dim


def _full_rope(file: GGUFFile, keys: Fields, head_dim: int) -> RopeSpec:
    """The rotation of layers without a window: pairs that do not turn have a frequency divided by 1e30."""
    if LLAMA3_TENSOR not in file.tensors:
        raise ModelFileError(file.path, f"tensor {LLAMA3_TENSOR} is missing")
    divisors = file.tensor(LLAMA3_TENSOR).ravel().tolist()
    turning = divisors.count(1.0)
    still = divisors[turning:]
    if (
        len(divisors) != head_dim // 2
        or divisors[:turning].count(1.0) != turning
        or min([*still, 1e30]) < 1e29
    ):
        raise ModelFileError(
            file.path,
            f"tensor {LLAMA3_TENSOR} does not hold {head_dim // 2} divisors, first of 1, then of 1e30",
        )
    proportion = (2 * turning + 0.5) / head_dim  # the half: no pair is lost to rounding
    return RopeSpec(theta=keys.number("rope.freq_base"), scaling="proportional", proportion=proportion)


def _experts(keys: Fields) -> Experts | None:
    """Those beside the MLP of every layer, if there are any."""
    if not keys.get("expert_count"):
        return None
    count, num_chosen = keys.size("expert_count", at_most=MAX_EXPERTS), keys.size("expert_used_count")
    if num_chosen > count:
        raise keys.error("expert_used_count", f"is {num_chosen}, but there are {count} experts")
    size, routing = keys.size("expert_feed_forward_length"), Routing(num_chosen=num_chosen)
    return Experts(count=count, size=size, routing=routing, activation=ACTIVATION)
