"""Gemma 2 (arXiv:2408.00118): four norms per layer, GeGLU, capped scores and logits, alternating windows."""

from __future__ import annotations

from collections.abc import Callable

from microvllm.adapters.family import GGUF_TENSORS, HF_TENSORS, Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import all_but_every, hf_spec, layer_windows
from microvllm.adapters.layers.mlp import MLP
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
    return spec.with_layers(
        (layer.with_mixer(scale=scale, softcap=softcap).with_parts(post_norms=True) for layer in spec.layers),
        norm_offset=1.0,
        embedding_scale=spec.hidden_size**0.5,
        logits_softcap=cap("final_logit_softcapping", caps[1]),
    )


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Gemma 2 model from a GGUF file, whose norms have the 1 that is added to their weights."""
    spec, keys = gguf_spec(file), gguf_keys(file)
    mixer, cap = spec.layers[0].attention, keys.number("attn_logit_softcapping")
    # Of the largest model alone, as in llama.cpp: the files do not say it.
    size = spec.hidden_size // mixer.num_heads if spec.num_layers == 46 else mixer.head_dim
    mlp = MLP(size=keys.size("feed_forward_length"), activation="gelu_tanh")
    layers = (
        layer.with_mixer(scale=size**-0.5, softcap=cap, window=mixer.window if slides else None).with_parts(
            mlp=mlp, post_norms=True
        )
        for layer, slides in zip(spec.layers, sliding_pattern(keys, spec.num_layers, 2), strict=True)
    )
    return spec.with_layers(
        layers,
        embedding_scale=spec.hidden_size**0.5,
        logits_softcap=keys.number("final_logit_softcapping"),
    )


def sliding_pattern(keys: Fields, num_layers: int, period: int) -> list[bool]:
    """Which layers have a window: as a list says, or all but the last of each period of layers.

    period: of files that do not say it.
    """
    key = "attention.sliding_window_pattern"
    pattern = keys.get(key)
    if not isinstance(pattern, list):
        return all_but_every(keys.size(key, period), num_layers)
    if len(pattern) != num_layers:
        raise keys.error(key, f"must list each of the {num_layers} layers")
    return [bool(each) for each in pattern]


GGUF_NAMES = {
    **GGUF_TENSORS,
    "mixer_post_norm": "blk.{i}.post_attention_norm",
    "mlp_post_norm": "blk.{i}.post_ffw_norm",
}
FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=from_gguf,
    gguf_name="gemma2",
    gguf_tensors=GGUF_NAMES,
)
