"""gpt-oss 20B and 120B (arXiv:2508.10925): experts, attention sinks, and a window in every second layer.

The experts' gated unit is cut off (`ops.activation.clamped_swiglu`), and everything but the norms has biases.
llama.cpp rounds YaRN's borders to whole dimensions, the authors do not: GGUF files are computed as theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.family import GGUF_TENSORS, HF_TENSORS, Family, with_mlp
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_spec
from microvllm.adapters.files.hf_config import all_but_every, hf_spec, layer_windows, read_experts
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.rope_spec import Rotary, scaled_rope
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.tensors import BARE, PAIRS, TRANSPOSED

EXPERTS = "model.layers.{i}.mlp.experts"
TENSORS = {
    **HF_TENSORS,
    "sinks": f"model.layers.{{i}}.self_attn.sinks{BARE}",
    "router": "model.layers.{i}.mlp.router",
    PAIRS: f"{EXPERTS}.gate_up_proj{TRANSPOSED}{BARE}",
    "expert_down": f"{EXPERTS}.down_proj{TRANSPOSED}{BARE}",
}
ACTIVATION = "clamped_swiglu"
# What the activation is made with, by the keys that may say so.
CONSTANTS = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
MAX_POSITION = 131072
ROTARY = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe a gpt-oss model from the `config.json` of its folder."""
    for key, constant in CONSTANTS.items():
        if config.number(key, constant) != constant:
            raise config.error(key, f"other than {constant:g} is not supported")
    bias = config.flag("attention_bias", True)
    spec = hf_spec(
        config,
        "gpt_oss",
        default_max_position=MAX_POSITION,
        default_kv_heads=8,
        default_head_dim=64,
        default_eps=1e-5,
        windows=_windows,
        rotary=_rotary,
        qkv_bias=bias,
        o_bias=bias,
        has_experts=True,
    )
    size = config.size("intermediate_size")
    experts = read_experts(config, count=128, num_chosen=4, size=size, normalized=True)
    return _with_experts(spec, experts)


def from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a gpt-oss model from a GGUF file."""
    spec = gguf_spec(file)
    layers = (
        layer.with_mixer(
            window=None if index % 2 else layer.attention.window,
            rope=msgspec.structs.replace(layer.attention.rope, truncate=False),
        )
        for index, layer in enumerate(spec.layers)
    )
    experts = spec.layers[0].mlp
    if not isinstance(experts, Experts):
        raise ModelFileError(file.path, f"{file.architecture}.expert_count is missing")
    spec = spec.with_layers(layers, architecture="gpt_oss")
    return _with_experts(spec, experts)


def _with_experts(spec: ModelSpec, experts: Experts) -> ModelSpec:
    experts = msgspec.structs.replace(experts, activation=ACTIVATION, bias=True)
    return with_mlp(spec.with_layers(layer.with_mixer(sinks=True) for layer in spec.layers), experts)


def _windows(config: Fields, num_layers: int) -> Sequence[int | None]:
    if config.is_null("sliding_window"):
        raise config.error("sliding_window", "is null, but every second layer has one")
    window = config.size("sliding_window", 128)
    return layer_windows(config, num_layers, window, all_but_every(2, num_layers))


def _rotary(config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    if config.get("rope_parameters") == {}:  # others take it for no scaling, not for the family's own
        raise config.error("rope_parameters", "is empty")
    scaling = config.part("rope_scaling") or config.part("rope_parameters")
    scaling = scaling or Fields(config.path, ROTARY, "rope_scaling.")
    rope, _ = scaled_rope(
        config, scaling, config.number("rope_theta", 150000.0), head_dim, default_max_position
    )
    # The scaling is one that the model was trained with: it does not lengthen `max_position_embeddings`.
    return Rotary(rope, config.size("max_position_embeddings", default_max_position))


FAMILY = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    from_hf,
    hf_tensors=TENSORS,
    from_gguf=from_gguf,
    gguf_name="gpt-oss",
    gguf_tensors={**GGUF_TENSORS, "mlp_norm": "blk.{i}.post_attention_norm"},
)
