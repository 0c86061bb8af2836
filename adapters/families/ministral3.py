"""Ministral 3, text only: Mistral with yarn, and Llama 4's temperature by the position."""

from __future__ import annotations

from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import hf_spec, same_windows
from microvllm.adapters.rope_spec import ORIGINAL, Rotary, scaled_rope
from microvllm.adapters.spec import ModelSpec

BETA = "llama_4_scaling_beta"
DEFAULT_SCALING = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    ORIGINAL: 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    BETA: 0.1,
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Ministral 3 model from the `config.json` of its folder."""
    if "layer_types" in config:
        raise config.error("layer_types", "is not supported for Ministral 3 models")
    spec = hf_spec(
        config,
        "ministral3",
        default_max_position=262144,
        default_kv_heads=8,
        default_head_dim=128,
        windows=same_windows,
        default_eps=1e-5,
        rotary=_rotary,
    )
    scaling, temperature = _scaling(config), None
    if scaling.get(BETA):  # 0 is none
        temperature = scaling.number(BETA), scaling.size(ORIGINAL)
    return spec.with_layers(layer.with_mixer(temperature=temperature) for layer in spec.layers)


def _scaling(config: Fields) -> Fields:
    given = config.part("rope_parameters") or config.part("rope_scaling")
    return given or Fields(config.path, DEFAULT_SCALING, "rope_parameters.")


def _rotary(config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    """That of the scaling without the keys of its own that this family adds."""
    scaling = _scaling(config)
    own = {key: scaling.get(key) for key in scaling if key not in (BETA, "max_position_embeddings")}
    rest = Fields(config.path, own, scaling.where)
    return scaled_rope(config, rest, config.number("rope_theta", 1e4), head_dim, default_max_position)


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Ministral 3 or Mistral Small 3.1 model from a GGUF file; the latter has no temperature."""
    spec, keys = gguf_spec(file), gguf_keys(file)
    key, temperature = "attention.temperature_scale", None
    if keys.get(key):
        temperature = keys.number(key), keys.size("rope.scaling.original_context_length")
    layers = (layer.with_mixer(temperature=temperature) for layer in spec.layers)
    return spec.with_layers(layers, architecture="ministral3")


FAMILY = Family(
    "ministral3",
    "Ministral3ForCausalLM",
    from_hf,
    from_gguf=from_gguf,
    gguf_name="mistral3",
    gguf_interleaved=True,
)
