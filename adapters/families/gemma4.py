"""Gemma 4, text only: Gemma 3 with norms on v, other heads in full layers, and a scale for each layer.

Its smaller models (E2B, E4B) have an input of each token to each layer, and later layers that read the keys
and values of earlier ones. Of the models that also read images and audio only the text part is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec

from microvllm.adapters.families import gemma4_gguf
from microvllm.adapters.families.gemma2 import GELU
from microvllm.adapters.families.gemma2 import TENSORS as GEMMA_TENSORS
from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import MAX_EXPERTS, MAX_ROPE_FACTOR, Fields
from microvllm.adapters.files.hf_config import all_but_every, hf_spec, layer_windows, text_part
from microvllm.adapters.layers.dense_and_experts import DenseAndExperts
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.layer_tails import LayerTails
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.rope_spec import RopeSpec, Rotary, scaled_rope
from microvllm.adapters.spec import Attention, LayerSpec, ModelSpec
from microvllm.adapters.tensors import BARE
from microvllm.ops.routing import Routing

TENSORS = {
    **GEMMA_TENSORS,
    "k_as_v": GEMMA_TENSORS["k"],
    "router": "model.layers.{i}.router.proj",
    "router_scale": f"model.layers.{{i}}.router.scale{BARE}",
    "expert_scale": f"model.layers.{{i}}.router.per_expert_scale{BARE}",
    "expert_gate_up": f"model.layers.{{i}}.experts.gate_up_proj{BARE}",
    "expert_down": f"model.layers.{{i}}.experts.down_proj{BARE}",
    "dense_post_norm": "model.layers.{i}.post_feedforward_layernorm_1",
    "experts_norm": "model.layers.{i}.pre_feedforward_layernorm_2",
    "experts_post_norm": "model.layers.{i}.post_feedforward_layernorm_2",
    "inputs_embed": "model.embed_tokens_per_layer",
    "inputs_projection": "model.per_layer_model_projection",
    "inputs_norm": "model.per_layer_projection_norm",
    "input_gate": "model.layers.{i}.per_layer_input_gate",
    "input_projection": "model.layers.{i}.per_layer_projection",
    "input_post_norm": "model.layers.{i}.post_per_layer_input_norm",
    "layer_scale": f"model.layers.{{i}}.layer_scalar{BARE}",
}
PERIOD = 6  # of layers, the last of which is full
FULL, SLIDING = "full_attention", "sliding_attention"
ROTARY: Mapping[str, dict[str, Any]] = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
# What differs between the two kinds of models where their configurations leave it out.
PLAIN = {"max_position_embeddings": 131072, "sliding_window": 512, "hidden_size_per_layer_input": 256}
UNIFIED = {"max_position_embeddings": 262144, "sliding_window": 1024, "hidden_size_per_layer_input": 0}


def from_hf(config: Fields, defaults: Mapping[str, int] = PLAIN) -> ModelSpec:
    """Describe a Gemma 4 model from the `config.json` of its folder."""
    if config.get("use_bidirectional_attention") not in (None, "vision"):  # "vision": of images alone
        raise config.error("use_bidirectional_attention", "other than vision is not supported")
    slides: list[bool] = []

    def windows(config: Fields, num_layers: int) -> list[int | None]:
        window = config.size("sliding_window", defaults["sliding_window"])
        found = layer_windows(config, num_layers, window, all_but_every(PERIOD, num_layers))
        found[-1] = None  # always, as in transformers
        slides.extend(each is not None for each in found)
        return found

    bias = config.flag("attention_bias")
    spec = hf_spec(
        config,
        "gemma4_text",
        default_max_position=defaults["max_position_embeddings"],
        default_kv_heads=4,
        default_head_dim=256,
        default_tie=True,
        activation_key="hidden_activation",
        activations=GELU,
        windows=windows,
        rotary=partial(_rotary, SLIDING),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        has_experts=True,
    )
    layers = _layers(config, spec, slides, defaults)
    cap = config.number("final_logit_softcapping") if "final_logit_softcapping" in config else None
    size = config.size("hidden_size_per_layer_input", defaults["hidden_size_per_layer_input"], at_least=0)
    if size and config.size("vocab_size_per_layer_input", spec.vocab_size) != spec.vocab_size:
        raise config.error(
            "vocab_size_per_layer_input", f"other than vocab_size {spec.vocab_size} is not supported"
        )
    activation = _activation(config)
    return spec.with_layers(
        layers,
        embedding_scale=spec.hidden_size**0.5,
        logits_softcap=cap,
        tails=LayerTails(input_size=size, activation=activation),
    )


def _layers(
    config: Fields, spec: ModelSpec, slides: list[bool], defaults: Mapping[str, int]
) -> list[LayerSpec]:
    """The layers with their own heads and rotations, and the sources of those that share keys and values."""
    sizes = _sizes(config, spec, slides)
    shared = config.size("num_kv_shared_layers", 0, at_least=0, at_most=spec.num_layers - 1)
    first, wide = spec.num_layers - shared, config.flag("use_double_wide_mlp")
    keys_as_values = config.flag("attention_k_eq_v")
    experts = _experts(config) if config.flag("enable_moe_block") else None
    layers: list[LayerSpec] = []
    for index, (layer, (head_dim, kv_heads)) in enumerate(zip(spec.layers, sizes, strict=True)):
        kind = SLIDING if slides[index] else FULL
        heads = layer.attention.num_heads
        if head_dim % 2 or heads % kv_heads:
            raise config.error(
                "per_layer_config" if "per_layer_config" in config else "global_head_dim",
                f"gives layer {index} {kv_heads} heads of {head_dim} for {heads} of queries",
            )
        mixer = msgspec.structs.replace(
            layer.attention,
            head_dim=head_dim,
            num_kv_heads=kv_heads,
            rope=_rotary(kind, config, head_dim, defaults["max_position_embeddings"]).spec,
            scale=1.0,
            v_norm=True,
            keys_as_values=keys_as_values and kind == FULL,
        )
        shares = index >= first
        if shares:
            mixer = _sharing(config, mixer, kind, layers[:first], slides)
        size = config.size("intermediate_size") * (2 if shares and wide else 1)
        dense = MLP(size=size, activation=_activation(config))
        mlp = dense if experts is None else DenseAndExperts(dense=dense, experts=experts)
        layers.append(layer.with_parts(mixer=mixer, mlp=mlp, post_norms=True))
    return layers


def _activation(config: Fields) -> str:
    return GELU[config.text("hidden_activation", next(iter(GELU)))]


def _experts(config: Fields) -> Experts:
    """Those beside the MLP of every layer."""
    count, num_chosen = config.size("num_experts", at_most=MAX_EXPERTS), config.size("top_k_experts")
    if num_chosen > count:
        raise config.error("top_k_experts", f"is {num_chosen}, but there are {count} experts")
    size = config.size("moe_intermediate_size")
    routing = Routing(num_chosen=num_chosen)
    return Experts(count=count, size=size, routing=routing, activation=_activation(config))


def _sharing(
    config: Fields, mixer: Attention, kind: str, own: list[LayerSpec], slides: list[bool]
) -> Attention:
    """The mixer with the last layer of its kind as its source, of those that have keys and values."""
    sources = [index for index in range(len(own)) if slides[index] == (kind == SLIDING)]
    if not sources:
        raise config.error("num_kv_shared_layers", f"leaves no {kind} whose keys and values are shared")
    if own[sources[-1]].mixer != mixer:
        raise config.error("num_kv_shared_layers", f"shares keys between {kind} of other heads")
    return msgspec.structs.replace(mixer, source=sources[-1])


def _sizes(config: Fields, spec: ModelSpec, slides: list[bool]) -> list[tuple[int, int]]:
    """Head size, and heads of keys and values, of each layer."""
    usual = spec.mixers[0].head_dim, spec.mixers[0].num_kv_heads
    if "per_layer_config" in config:
        parts = config.part("per_layer_config")
        return _listed_sizes(parts, usual, spec.num_layers) if parts else [usual] * spec.num_layers
    key = "num_global_key_value_heads"
    kv_heads = config.size(key, usual[1]) if config.flag("attention_k_eq_v") else usual[1]
    full = config.size("global_head_dim", 512), kv_heads
    return [usual if sliding else full for sliding in slides]


def _listed_sizes(parts: Fields, usual: tuple[int, int], num_layers: int) -> list[tuple[int, int]]:
    """By an object that has, by a layer's number, what differs from the `usual` sizes."""
    sizes = [usual] * num_layers
    for number in parts:
        if not number.isdecimal() or int(number) >= num_layers:
            raise parts.error(number, f"is no layer from 0 to {num_layers - 1}")
        part = parts.part(number)
        for key in part or ():
            if part and key not in ("head_dim", "num_key_value_heads"):
                raise part.error(key, "is not supported for a single layer")
        if part:
            sizes[int(number)] = part.size("head_dim", usual[0]), part.size("num_key_value_heads", usual[1])
    return sizes


def _rotary(kind: str, config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    """The rotation of a kind of layer. None of them lengthens the context."""
    parts = config.part("rope_parameters")
    for other in parts or ():
        if parts and other not in ROTARY:
            raise parts.error(other, f"must be one of {', '.join(ROTARY)}")
    part = parts.part(kind) if parts else Fields(config.path, ROTARY[kind])
    if part is None:
        raise config.error("rope_parameters", f"has nothing about {kind}")
    trained = config.size("max_position_embeddings", default_max_position)
    if part.get("rope_type") != "proportional":
        rope, _ = scaled_rope(config, part, ROTARY[kind]["rope_theta"], head_dim, default_max_position)
        return Rotary(rope, trained)
    for key in part:
        if key not in ("rope_type", "rope_theta", "partial_rotary_factor", "factor"):
            raise part.error(key, "is not a key of rotary scaling 'proportional'")
    rope = RopeSpec(
        scaling="proportional",
        theta=part.number("rope_theta", ROTARY[kind]["rope_theta"]),
        proportion=part.number("partial_rotary_factor", 1.0, at_most=1.0),
        factor=part.number("factor", 1.0, at_least=1.0, at_most=MAX_ROPE_FACTOR),
    )
    return Rotary(rope, trained)


unified = partial(from_hf, defaults=UNIFIED)
FAMILY = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=gemma4_gguf.from_gguf,
    gguf_name="gemma4",
    gguf_tensors=gemma4_gguf.TENSORS,
)
# Those below have the same text part in a configuration of several, and its tensors under another prefix.
FAMILIES = (
    FAMILY,
    Family("gemma4", "Gemma4ForConditionalGeneration", lambda config: from_hf(text_part(config)), TENSORS),
    Family("gemma4_unified_text", "Gemma4UnifiedForCausalLM", unified, TENSORS),
    Family(
        "gemma4_unified",
        "Gemma4UnifiedForConditionalGeneration",
        lambda config: unified(text_part(config)),
        TENSORS,
    ),
)
