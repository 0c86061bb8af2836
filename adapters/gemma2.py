"""Gemma 2 (arXiv:2408.00118): four norms per layer, GeGLU, capped scores and logits, alternating windows."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from microvllm.adapters.family import HF_TENSORS, Family
from microvllm.adapters.fields import Fields
from microvllm.adapters.hf_config import all_but_every, hf_spec, layer_windows
from microvllm.adapters.rope_spec import Rotary, rope_from_hf
from microvllm.adapters.spec import ModelSpec

GELU = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
TENSORS = {
    **HF_TENSORS,
    "mixer_post_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Gemma 2 model from the `config.json` of its folder."""
    return gemma_spec(config, "gemma2", period=2, default_max_position=8192, caps=(50.0, 30.0))


def gemma_spec(
    config: Fields,
    name: str,
    *,
    period: int,
    default_max_position: int,
    caps: tuple[float | None, float | None],
    qk_norm: bool = False,
    rotary: Callable[[Fields, int, int], Rotary] = rope_from_hf,
) -> ModelSpec:
    """What Gemma 2 and 3 share. caps: of scores and of logits; Every `period`-th layer has no window."""
    if config.flag("use_bidirectional_attention"):
        raise config.error("use_bidirectional_attention", "is not supported")

    def windows(config: Fields, num_layers: int) -> list[int | None]:
        window = None if config.is_null("sliding_window") else config.size("sliding_window", 4096)
        return layer_windows(config, num_layers, window, all_but_every(period, num_layers))

    def cap(key: str, default: float | None) -> float | None:
        if config.is_null(key) or (key not in config and default is None):
            return None
        return config.number(key, default)

    bias = config.flag("attention_bias")
    spec = hf_spec(
        config,
        name,
        default_max_position=default_max_position,
        default_kv_heads=4,
        default_head_dim=256,
        default_tie=True,
        activation_key="hidden_activation",
        activations=GELU,
        windows=windows,
        rotary=rotary,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=qk_norm,
    )
    scale = config.number("query_pre_attn_scalar", 256.0) ** -0.5
    softcap = cap("attn_logit_softcapping", caps[0])
    layers = (layer.with_mixer(scale=scale, softcap=softcap) for layer in spec.layers)
    return msgspec.structs.replace(
        spec,
        layers=tuple(msgspec.structs.replace(layer, post_norms=True) for layer in layers),
        norm_offset=1.0,
        embedding_scale=spec.hidden_size**0.5,
        logits_softcap=cap("final_logit_softcapping", caps[1]),
    )


FAMILY = Family("gemma2", "Gemma2ForCausalLM", from_hf, hf_tensors=TENSORS)
