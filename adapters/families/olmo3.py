"""Olmo 3: norms behind attention and MLP, and over all of q and of k (OLMo 2, arXiv:2501.00656).

Three of four layers have a window, and are rotated without the scaling of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from microvllm.adapters.families.gemma2 import GGUF_NAMES, sliding_pattern
from microvllm.adapters.family import HF_TENSORS, Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import (
    all_but_every,
    hf_spec,
    layer_windows,
    scaling_of_kind,
    sliding_layers,
)
from microvllm.adapters.rope_spec import RopeSpec, Rotary, scaled_rope
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
        default_eps=1e-5,
        windows=_windows,
        rotary=lambda *sizes: _rotary("full_attention", *sizes),
        qkv_bias=bias,
        o_bias=bias,
    )
    sizes = spec.mixers[0].head_dim, DEFAULT_MAX_POSITION
    local = _rotary("sliding_attention", config, *sizes).spec
    # Not by their windows, which `hf_spec` leaves out where they are wider than all positions.
    slides = sliding_layers(config, spec.num_layers, all_but_every(PERIOD, spec.num_layers))
    return _normed(spec, local, slides)


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe an OLMo 2 or 3 model from a GGUF file; the former has no windows."""
    spec, keys = gguf_spec(file), gguf_keys(file)
    slides, theta = [False] * spec.num_layers, keys.number("rope.freq_base", 1e4)
    if "attention.sliding_window" in keys:
        slides = sliding_pattern(keys, spec.num_layers, PERIOD)
    layers = (
        layer.with_mixer(qk_norm=False, window=layer.attention.window if sliding else None)
        for layer, sliding in zip(spec.layers, slides, strict=True)
    )
    local = RopeSpec(theta=keys.number("rope.freq_base_swa", theta))
    spec = spec.with_layers(layers, architecture="olmo3")
    return _normed(spec, local, slides)


def _normed(spec: ModelSpec, local: RopeSpec, slides: Sequence[bool]) -> ModelSpec:
    """With the norms of this family, and the rotation of layers with a window."""
    layers = (
        layer.with_mixer(whole_qk_norm=True, rope=local if sliding else layer.attention.rope)
        for layer, sliding in zip(spec.layers, slides, strict=True)
    )
    return spec.with_layers(layer.with_parts(pre_norms=False, post_norms=True) for layer in layers)


def _windows(config: Fields, num_layers: int) -> list[int | None]:
    window = None if config.is_null("sliding_window") else config.size("sliding_window", 4096)
    return layer_windows(config, num_layers, window, all_but_every(PERIOD, num_layers))


def _rotary(kind: str, config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    scaling, theta = scaling_of_kind(config, kind), config.number("rope_theta", 5e5)
    return scaled_rope(config, scaling, theta, head_dim, default_max_position)


FAMILY = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=from_gguf,
    gguf_name="olmo2",
    gguf_tensors=GGUF_NAMES,
)
