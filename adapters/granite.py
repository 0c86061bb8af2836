"""Granite 3 and 4, dense: Llama with multipliers of embeddings, scores, residual branches and logits."""

from __future__ import annotations

import msgspec

from microvllm.adapters.family import HF_TENSORS, Family
from microvllm.adapters.fields import Fields, shorten
from microvllm.adapters.gguf_file import GGUFFile
from microvllm.adapters.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.hf_config import hf_spec
from microvllm.adapters.mlp import MLP
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Granite model from the `config.json` of its folder."""
    return _from_hf(config, "granite", mlp_bias=config.flag("mlp_bias"))


def dense_hybrid_from_hf(config: Fields) -> ModelSpec:
    """Describe a dense Granite 4, whose class has layers of Mamba and experts in other models."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or any(kind not in ("attention", "full_attention") for kind in kinds):
        raise config.error("layer_types", "must list attention for each layer: Mamba is not supported")
    if config.get("num_local_experts", 8) != 0:
        raise config.error("num_local_experts", "must be 0: experts of this family are not supported")
    spec = _from_hf(config, "granitemoehybrid")
    if len(kinds) != spec.num_layers:
        raise config.error("layer_types", f"must list one kind for each of the {spec.num_layers} layers")
    position = config.get("position_embedding_type")
    if position not in (None, "nope", "rope"):
        raise config.error("position_embedding_type", f"must be rope or nope, got {shorten(position)}")
    (mixer,) = spec.mixers
    rope = mixer.rope if position == "rope" else msgspec.structs.replace(mixer.rope, rotary_dim=0)
    mlp = MLP(size=config.size("shared_intermediate_size", 1024))
    layers = (msgspec.structs.replace(layer.with_mixer(rope=rope), mlp=mlp) for layer in spec.layers)
    return msgspec.structs.replace(spec, layers=tuple(layers))


def _from_hf(config: Fields, name: str, *, mlp_bias: bool = False) -> ModelSpec:
    bias = config.flag("attention_bias")
    spec = hf_spec(config, name, default_max_position=2048, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)
    return multiplied(
        spec,
        embeddings=config.number("embedding_multiplier", 1.0),
        scores=config.number("attention_multiplier", 1.0),
        branches=config.number("residual_multiplier", 1.0),
        logits=1.0 / config.number("logits_scaling", 1.0),
    )


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Granite model from a GGUF file, in which a multiplier of 0 is none."""
    spec, keys = gguf_spec(file), gguf_keys(file)

    def scale(key: str, default: float = 1.0) -> float:
        return keys.number(key, default) if keys.get(key) else default

    return multiplied(
        spec,
        embeddings=scale("embedding_scale"),
        scores=scale("attention.scale", spec.mixers[0].head_dim ** -0.5),
        branches=scale("residual_scale"),
        logits=1.0 / scale("logit_scale"),
    )


def multiplied(
    spec: ModelSpec, *, embeddings: float, scores: float, branches: float, logits: float
) -> ModelSpec:
    """The model with these multipliers.

    Hidden states are kept divided by that of the branches, which are then added as they are: the norms, all
    that reads the states, undo it where their epsilon is divided by its square.
    """
    return msgspec.structs.replace(
        spec,
        layers=tuple(layer.with_mixer(scale=scores) for layer in spec.layers),
        embedding_scale=embeddings / branches,
        rms_norm_eps=spec.rms_norm_eps / branches**2,
        logits_scale=logits,
    )


FAMILY = Family(
    "granite",
    "GraniteForCausalLM",
    from_hf,
    from_gguf=from_gguf,
    gguf_name="granite",
    gguf_interleaved=True,
)
DENSE_HYBRID = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    dense_hybrid_from_hf,
    hf_tensors={
        **HF_TENSORS,
        "gate_up": "model.layers.{i}.shared_mlp.input_linear",
        "down": "model.layers.{i}.shared_mlp.output_linear",
    },
)
