"""SmolLM3: Llama with layers that do not rotate (NoPE; Yang et al., 2025, arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_spec
from microvllm.adapters.files.hf_config import all_but_every, hf_spec, layer_windows
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import ModelSpec

INTERVAL = 4  # of the layers that do not rotate


def from_hf(config: Fields) -> ModelSpec:
    """Describe a SmolLM3 model from the `config.json` of its folder."""
    bias = config.flag("attention_bias")
    spec = hf_spec(
        config,
        "smollm3",
        default_max_position=32768,
        default_kv_heads=4,
        default_tie=True,
        windows=_windows,
        rotary=partial(rope_from_hf, theta=2e6),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
    )
    return _rotating(spec, _rotated(config, spec.num_layers))


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a SmolLM3 model from a GGUF file, which does not say which layers rotate."""
    spec = gguf_spec(file)
    return _rotating(spec, all_but_every(INTERVAL, spec.num_layers))


def _rotating(spec: ModelSpec, rotated: Sequence[bool]) -> ModelSpec:
    unrotated = msgspec.structs.replace(spec.mixers[0].rope, rotary_dim=0)
    layers = (
        layer if rotates else layer.with_mixer(rope=unrotated)
        for layer, rotates in zip(spec.layers, rotated, strict=True)
    )
    return spec.with_layers(layers)


def _rotated(config: Fields, num_layers: int) -> list[bool]:
    """Which layers rotate: by `no_rope_layers`, or all but every `no_rope_layer_interval`-th."""
    if "no_rope_layers" not in config:
        interval = config.size("no_rope_layer_interval", INTERVAL)
        return all_but_every(interval, num_layers)
    listed = config.get("no_rope_layers")
    good = isinstance(listed, list) and len(listed) == num_layers
    if not good or any(type(each) is not int or each not in (0, 1) for each in listed):
        raise config.error("no_rope_layers", f"must list 0 or 1 for each of the {num_layers} layers")
    return [each == 1 for each in listed]


def _windows(config: Fields, num_layers: int) -> list[int | None]:
    """Those of layers that do not rotate, if any are used."""
    slides = [not rotated for rotated in _rotated(config, num_layers)]
    windows = layer_windows(config, num_layers, config.size("sliding_window", 4096), slides)
    used = config.flag("use_sliding_window") and "sliding_window" in config
    if not used and "sliding_window" in config and "layer_types" in config and any(windows):
        raise config.error("use_sliding_window", "is false, but layer_types names sliding_attention")
    return windows if used else [None] * num_layers


FAMILY = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    from_hf,
    from_gguf=from_gguf,
    gguf_name="smollm3",
    gguf_interleaved=True,
)
