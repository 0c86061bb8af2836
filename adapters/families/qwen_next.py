"""Qwen3-Next, and Qwen3.5 to 3.8, dense and of experts: a Gated DeltaNet in three of four layers.

The attention in the others is gated, normalises queries and keys, and rotates a quarter of each head; norms
multiply by 1 + w. Models that also read images are served for their text: their language model is
`text_config`, and positions of text are the same in all three parts of their rotation (`mrope_section`). The
head that predicts further tokens (`mtp.`) is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from microvllm.adapters.families import qwen_next_gguf as gguf_files
from microvllm.adapters.families.qwen_moe import TENSORS as MOE_TENSORS
from microvllm.adapters.families.qwen_moe import sparse
from microvllm.adapters.family import HF_TENSORS, Family, with_mlp
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.hf_config import all_but_every, hf_spec, hybrid_layer_types, read_experts
from microvllm.adapters.layers.delta_net import GatedDeltaNet
from microvllm.adapters.rope_spec import Rotary, rope_from_hf
from microvllm.adapters.spec import LayerSpec, ModelSpec

Reader = Callable[[Fields, str], ModelSpec]  # of a config and the name of the family

LINEAR = "model.layers.{i}.linear_attn"
COMMON = {
    **HF_TENSORS,
    "gate_of_q": HF_TENSORS["q"],
    "delta_conv": f"{LINEAR}.conv1d",
    "delta_a_log": f"{LINEAR}.A_log{{bare}}",
    "delta_dt_bias": f"{LINEAR}.dt_bias{{bare}}",
    "delta_scale": f"{LINEAR}.norm",
    "delta_out": f"{LINEAR}.out_proj",
}
DENSE = {
    **COMMON,
    "delta_qkv": f"{LINEAR}.in_proj_qkv",
    "delta_z": f"{LINEAR}.in_proj_z",
    "delta_b": f"{LINEAR}.in_proj_b",
    "delta_a": f"{LINEAR}.in_proj_a",
}
SPARSE = {**MOE_TENSORS, **DENSE}
NEXT = {
    **MOE_TENSORS,
    **COMMON,
    "delta_qkvz": f"{LINEAR}.in_proj_qkvz",
    "delta_ba": f"{LINEAR}.in_proj_ba",
}
STACKED = {
    "expert_gate_up": "model.layers.{i}.mlp.experts.gate_up_proj{bare}",
    "expert_down": "model.layers.{i}.mlp.experts.down_proj{bare}",
}
UNUSED = ("mtp.",)
# Of a model that reads images, what it says for all of its parts, where the language model does not.
OUTER_KEYS = ("dtype", "torch_dtype", "tie_word_embeddings")
MROPE_KEYS = ("mrope_section", "mrope_interleaved")
KINDS = ("linear_attention", "full_attention")


def dense_from_hf(config: Fields, architecture: str) -> ModelSpec:
    """Describe a dense Qwen3.5 model from the `config.json` of its folder."""
    return _hybrid(config, architecture, default_kv_heads=4)


def sparse_from_hf(config: Fields, architecture: str) -> ModelSpec:
    """Describe a Qwen3.5 model of experts from the `config.json` of its folder."""
    size = config.size("moe_intermediate_size", 512)
    spec = _hybrid(config, architecture, default_kv_heads=2, expert_size=size)
    shared = config.size("shared_expert_intermediate_size", 512)
    experts = read_experts(config, count=256, num_chosen=8, size=size, normalized=True, shared_size=shared)
    return with_mlp(spec, experts)


def next_from_hf(config: Fields) -> ModelSpec:
    """Describe a Qwen3-Next model from the `config.json` of its folder."""
    spec = _hybrid(config, "qwen3_next", default_kv_heads=2, has_experts=True)
    experts = read_experts(
        config,
        count=512,
        num_chosen=10,
        size=config.size("moe_intermediate_size", 512),
        normalized=config.flag("norm_topk_prob", True),
        shared_size=config.size("shared_expert_intermediate_size", 512),
    )
    return sparse(spec, config, experts)


def _text_part(read: Reader, architecture: str, config: Fields) -> ModelSpec:
    """Describe the language model of one that also reads images."""
    part = config.part("text_config")
    if part is None:
        raise config.error("text_config", "is missing")
    outer = {key: config.get(key) for key in OUTER_KEYS if key in config and key not in part}
    return read(Fields(config.path, {**part.values, **outer}, part.where), architecture)


def _hybrid(
    config: Fields,
    architecture: str,
    *,
    default_kv_heads: int,
    expert_size: int | None = None,
    has_experts: bool = False,
) -> ModelSpec:
    """Build the spec but for its experts; one with an `expert_size` need not say how wide a plain MLP is."""
    if not config.flag("attn_output_gate", True):
        raise config.error("attn_output_gate", "is false: attention without the gate is not supported")
    bias = config.flag("attention_bias")
    if expert_size is not None and "intermediate_size" not in config:
        config = config.with_value("intermediate_size", expert_size)
    spec = hf_spec(
        config,
        architecture,
        default_max_position=32768,
        default_kv_heads=default_kv_heads,
        default_head_dim=256,
        rotary=_rotary,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        has_experts=has_experts or expert_size is not None,
    )
    period = config.size("full_attention_interval", 4)
    default = [KINDS[not linear] for linear in all_but_every(period, spec.num_layers)]
    kinds = hybrid_layer_types(config, spec.num_layers, KINDS, default)
    delta = _delta_net(config)
    layers = (
        layer.with_mixer(gated=True) if kind == "full_attention" else LayerSpec(mixer=delta, mlp=layer.mlp)
        for layer, kind in zip(spec.layers, kinds, strict=True)
    )
    return spec.with_layers(layers, norm_offset=1.0)


def _delta_net(config: Fields) -> GatedDeltaNet:
    heads, key_heads = "linear_num_value_heads", "linear_num_key_heads"
    mixer = GatedDeltaNet(
        num_key_heads=config.size(key_heads, 16),
        num_value_heads=config.size(heads, 32),
        key_dim=config.size("linear_key_head_dim", 128),
        value_dim=config.size("linear_value_head_dim", 128),
        conv_size=config.size("linear_conv_kernel_dim", 4, at_least=2),
    )
    if mixer.num_value_heads % mixer.num_key_heads:
        raise config.error(
            heads, f"{mixer.num_value_heads} is not a multiple of {key_heads} {mixer.num_key_heads}"
        )
    return mixer


def _rotary(config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    scaling = config.part("rope_parameters")
    if scaling is not None:
        text = {key: value for key, value in scaling.values.items() if key not in MROPE_KEYS}
        config = config.with_value("rope_parameters", text)
    return rope_from_hf(config, head_dim, default_max_position, partial=0.25)


def _family(
    name: str, hf_class: str, read: Reader, tensors: Mapping[str, str], **gguf: Any
) -> tuple[Family, Family]:
    """Those of the text alone, and of the model that it was cut out of, which also reads images."""
    common: dict[str, Any] = {"hf_tensors": tensors, "hf_stacked": STACKED, "hf_unused": UNUSED}
    text, whole = f"{name}_text", name
    return (
        Family(
            text,
            f"{hf_class}ForCausalLM",
            lambda config: read(config, text),
            **common,
            **gguf,
            gguf_tensors=gguf_files.TENSORS,
        ),
        Family(whole, f"{hf_class}ForConditionalGeneration", partial(_text_part, read, whole), **common),
    )


QWEN35, QWEN35_VISION = _family(
    "qwen3_5",
    "Qwen3_5",
    dense_from_hf,
    DENSE,
    from_gguf=gguf_files.dense_from_gguf,
    gguf_name="qwen35",
)
QWEN35_MOE, QWEN35_MOE_VISION = _family(
    "qwen3_5_moe",
    "Qwen3_5Moe",
    sparse_from_hf,
    SPARSE,
    from_gguf=gguf_files.sparse_from_gguf,
    gguf_name="qwen35moe",
)
NEXT_FAMILY = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    next_from_hf,
    NEXT,
    hf_stacked=STACKED,
    hf_unused=UNUSED,
    from_gguf=gguf_files.next_from_gguf,
    gguf_name="qwen3next",
    gguf_tensors=gguf_files.NEXT_TENSORS,
)
FAMILIES = QWEN35, QWEN35_VISION, QWEN35_MOE, QWEN35_MOE_VISION, NEXT_FAMILY
