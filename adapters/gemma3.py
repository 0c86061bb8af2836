"""Gemma 3, text only (arXiv:2503.19786): Gemma 2 with norms on q and k, no caps, and two rotary bases."""

from __future__ import annotations

import msgspec

from microvllm.adapters.family import Family
from microvllm.adapters.fields import Fields
from microvllm.adapters.gemma2 import TENSORS, gemma_spec, sliding_layers
from microvllm.adapters.rope_spec import Rotary, scaled_rope
from microvllm.adapters.spec import ModelSpec

# By kind of layer: where older configurations have its base, and the default of that.
BASES = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
DEFAULT_MAX_POSITION = 131072


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Gemma 3 model from the `config.json` of its folder."""
    period = config.size("sliding_window_pattern", 6)
    spec = gemma_spec(
        config,
        "gemma3_text",
        period=period,
        default_max_position=DEFAULT_MAX_POSITION,
        caps=(None, None),
        qk_norm=True,
        rotary=lambda *sizes: _rotary("full_attention", *sizes),
    )
    local = _rotary("sliding_attention", config, spec.mixers[0].head_dim, DEFAULT_MAX_POSITION).spec
    layers = (
        layer.with_mixer(rope=local) if slides else layer
        for layer, slides in zip(spec.layers, sliding_layers(config, spec.num_layers, period), strict=True)
    )
    return msgspec.structs.replace(spec, layers=tuple(layers))


def _rotary(kind: str, config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    """Older configurations have one scaling, which only layers that do not slide use."""
    parts = config.part("rope_parameters")
    key, default = BASES[kind]
    if parts is not None:
        for other in parts:
            if other not in BASES:
                raise parts.error(other, f"must be one of {', '.join(BASES)}")
        scaling = parts.part(kind)
    else:
        scaling = config.part("rope_scaling") if kind == "full_attention" else None
    rope, _ = scaled_rope(config, scaling, config.number(key, default), head_dim, default_max_position)
    # The scaling is one that the model was trained with: it does not lengthen `max_position_embeddings`.
    return Rotary(rope, config.size("max_position_embeddings", default_max_position))


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", from_hf, hf_tensors=TENSORS)
