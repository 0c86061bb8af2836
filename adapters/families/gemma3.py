"""Gemma 3, text only (arXiv:2503.19786): Gemma 2 with norms on q and k, no caps, and two rotary bases."""

from __future__ import annotations

import msgspec

from microvllm.adapters.families.gemma2 import GGUF_NAMES, TENSORS, gemma_spec, sliding_pattern
from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import all_but_every, scaling_of_kind, sliding_layers
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.rope_spec import RopeSpec, Rotary, scaled_rope
from microvllm.adapters.spec import LayerSpec, ModelSpec

# By kind of layer: where older configurations have its base, and the default of that.
BASES = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
DEFAULT_MAX_POSITION = 131072


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Gemma 3 model from the `config.json` of its folder."""
    if "attn_logit_softcapping" in config:  # which transformers' Gemma 3 does not apply
        raise config.error("attn_logit_softcapping", "is set, which is Gemma 2's")
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
    slides = sliding_layers(config, spec.num_layers, all_but_every(period, spec.num_layers))
    layers = (
        layer.with_mixer(rope=local) if sliding else layer
        for layer, sliding in zip(spec.layers, slides, strict=True)
    )
    return spec.with_layers(layers)


def _rotary(kind: str, config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    scaling, theta = scaling_of_kind(config, kind), config.number(*BASES[kind])
    rope, _ = scaled_rope(config, scaling, theta, head_dim, default_max_position)
    # The scaling is one that the model was trained with: it does not lengthen `max_position_embeddings`.
    return Rotary(rope, config.size("max_position_embeddings", default_max_position))


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Gemma 3 model from a GGUF file, whose norms have the 1 that is added to their weights."""
    spec, keys = gguf_spec(file), gguf_keys(file)
    slides = sliding_pattern(keys, spec.num_layers, 6)
    local = RopeSpec(theta=keys.number("rope.freq_base_swa", BASES["sliding_attention"][1]))

    mlp = MLP(size=keys.size("feed_forward_length"), activation="gelu_tanh")

    def layer(sliding: bool, layer: LayerSpec) -> LayerSpec:
        mixer = layer.attention
        # Of the largest model alone, as in llama.cpp: the files do not say it.
        size = spec.hidden_size // mixer.num_heads if spec.num_layers == 62 else mixer.head_dim
        rope, window = (local, mixer.window) if sliding else (mixer.rope, None)
        mixer = msgspec.structs.replace(mixer, rope=rope, window=window, scale=size**-0.5)
        return layer.with_parts(mixer=mixer, mlp=mlp, post_norms=True)

    return spec.with_layers(
        map(layer, slides, spec.layers),
        architecture="gemma3_text",
        embedding_scale=spec.hidden_size**0.5,
        logits_softcap=softcap(keys),
    )


def softcap(keys: Fields) -> float | None:
    """The cap of the logits; 0 is none."""
    return keys.number("final_logit_softcapping") if keys.get("final_logit_softcapping") else None


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    from_hf,
    TENSORS,
    from_gguf=from_gguf,
    gguf_name="gemma3",
    gguf_tensors=GGUF_NAMES,
)
