"""Granite 3: Llama with multipliers of embeddings, scores, residual branches and logits."""

from __future__ import annotations

from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import hf_spec
from microvllm.adapters.spec import ModelSpec


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Granite model from the `config.json` of its folder."""
    return multiplied_from_hf(config, "granite", mlp_bias=config.flag("mlp_bias"))


def multiplied_from_hf(
    config: Fields, name: str, *, mlp_bias: bool = False, has_experts: bool = False
) -> ModelSpec:
    """What all Granites have in common; with `has_experts` the caller reads these."""
    bias = config.flag("attention_bias")
    spec = hf_spec(
        config,
        name,
        default_max_position=2048,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=mlp_bias,
        has_experts=has_experts,
    )
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
    return spec.with_layers(
        (layer.with_mixer(scale=scores) for layer in spec.layers),
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
