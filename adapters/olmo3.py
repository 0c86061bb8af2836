"""Olmo 3: norms behind attention and MLP, and over all of q and of k (OLMo 2, arXiv:2501.00656).

Three of four layers have a window, and are rotated without the scaling of the others.
"""

from __future__ import annotations

import msgspec

from microvllm.adapters.family import HF_TENSORS, Family
from microvllm.adapters.fields import Fields
from microvllm.adapters.hf_config import (
    all_but_every,
    hf_spec,
    layer_windows,
    scaling_of_kind,
    sliding_layers,
)
from microvllm.adapters.rope_spec import Rotary, scaled_rope
from microvllm.adapters.spec import ModelSpec

PERIOD = 4  # of layers, the last of which is full
DEFAULT_MAX_POSITION = 2048
TENSORS = {
    **HF_TENSORS,
    "mixer_post_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe an OLMo 3 model from the `config.json` of its folder."""
    bias = config.flag("attention_bias")
    spec = hf_spec(
        config,
        "olmo3",
        default_max_position=DEFAULT_MAX_POSITION,
        windows=_windows,
        rotary=lambda *sizes: _rotary("full_attention", *sizes),
        qkv_bias=bias,
        o_bias=bias,
    )
    sizes = spec.mixers[0].head_dim, DEFAULT_MAX_POSITION
    local = _rotary("sliding_attention", config, *sizes).spec
    # Not by their windows, which `hf_spec` leaves out where they are wider than all positions.
    slides = sliding_layers(config, spec.num_layers, all_but_every(PERIOD, spec.num_layers))
    layers = (
        layer.with_mixer(whole_qk_norm=True, rope=local if sliding else layer.attention.rope)
        for layer, sliding in zip(spec.layers, slides, strict=True)
    )
    return msgspec.structs.replace(
        spec,
        layers=tuple(msgspec.structs.replace(layer, pre_norms=False, post_norms=True) for layer in layers),
        rms_norm_eps=config.number("rms_norm_eps", 1e-5),
    )


def _windows(config: Fields, num_layers: int) -> list[int | None]:
    window = None if config.is_null("sliding_window") else config.size("sliding_window", 4096)
    return layer_windows(config, num_layers, window, all_but_every(PERIOD, num_layers))


def _rotary(kind: str, config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    scaling, theta = scaling_of_kind(config, kind), config.number("rope_theta", 5e5)
    return scaled_rope(config, scaling, theta, head_dim, default_max_position)


FAMILY = Family("olmo3", "Olmo3ForCausalLM", from_hf, hf_tensors=TENSORS)
