"""Qwen3-Next, and Qwen3.5 to 3.8, from GGUF files as llama.cpp's converter writes them. Imports no torch.

Norms have the 1 that is added to their weights, a delta rule's decays are stored as the -exp(a_log) that they
are used as, and layers behind the last one, which predict further tokens, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from microvllm.adapters.family import GGUF_TENSORS, with_mlp
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_experts import SOFTMAX, gguf_experts, without_experts
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.layers.delta_net import GatedDeltaNet
from microvllm.adapters.spec import LayerSpec, ModelSpec
from microvllm.adapters.tensors import BARE

TENSORS = {
    **GGUF_TENSORS,
    "gate_of_q": GGUF_TENSORS["q"],
    "mlp_norm": "blk.{i}.post_attention_norm",
    "delta_qkv": "blk.{i}.attn_qkv",
    "delta_z": "blk.{i}.attn_gate",
    "delta_b": "blk.{i}.ssm_beta",
    "delta_a": "blk.{i}.ssm_alpha",
    "delta_conv": "blk.{i}.ssm_conv1d",
    "delta_a_log": f"blk.{{i}}.ssm_a{BARE}",
    "delta_dt_bias": f"blk.{{i}}.ssm_dt.bias{BARE}",
    "delta_scale": "blk.{i}.ssm_norm",
    "delta_out": "blk.{i}.ssm_out",
}
NEXT_TENSORS = {**TENSORS, "delta_ba": "blk.{i}.ssm_ba"}


def dense_from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a dense Qwen3.5 model from a GGUF file."""
    return _hybrid(file, gguf_keys(file), "qwen3_5_text")


def sparse_from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Qwen3.5 model of experts from a GGUF file."""
    return _with_experts(file, "qwen3_5_moe_text")


def next_from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a Qwen3-Next model from a GGUF file, whose heads of values are in Hugging Face's order."""
    return _with_experts(file, "qwen3_next", in_turns=False)


def _with_experts(file: GGUFFile, architecture: str, *, in_turns: bool = True) -> ModelSpec:
    keys = gguf_keys(file)
    experts = gguf_experts(keys, scores=SOFTMAX, normalized=True)
    if experts.routing.sigmoid:
        raise keys.error("expert_gating_func", "must be 1, for a softmax")
    size = keys.size("expert_shared_feed_forward_length")
    experts = msgspec.structs.replace(experts, shared_size=size, shared_gate=True)
    spec = _hybrid(file, without_experts(keys), architecture, in_turns=in_turns)
    return with_mlp(spec, experts)


def _hybrid(file: GGUFFile, keys: Fields, architecture: str, *, in_turns: bool = True) -> ModelSpec:
    """Build the spec with plain MLPs; of texts, all `rope.dimension_sections` have the same position."""
    spec = gguf_spec(file, keys=keys, rotates_parts=True)
    recurrent, delta = _recurrent(keys, spec.num_layers), _delta_net(keys, in_turns)
    first = f"blk.{recurrent.index(False)}"
    bias, o_bias = (f"{first}.{name}.bias" in file.tensors for name in ("attn_q", "attn_output"))
    layers = (
        LayerSpec(mixer=delta, mlp=layer.mlp)
        if is_recurrent
        else layer.with_mixer(qk_norm=True, gated=True, qkv_bias=bias, o_bias=o_bias)
        for layer, is_recurrent in zip(spec.layers, recurrent, strict=True)
    )
    return spec.with_layers(layers, architecture=architecture)


def _delta_net(keys: Fields, in_turns: bool) -> GatedDeltaNet:
    heads, key_heads, width = (
        keys.size(f"ssm.{key}") for key in ("time_step_rank", "group_count", "inner_size")
    )
    if heads % key_heads:
        raise keys.error("ssm.time_step_rank", f"{heads} is not a multiple of ssm.group_count {key_heads}")
    if width % heads:
        raise keys.error("ssm.inner_size", f"{width} is not a multiple of ssm.time_step_rank {heads}")
    conv_size = keys.size("ssm.conv_kernel")
    if conv_size < 2:
        raise keys.error("ssm.conv_kernel", "must be at least 2, got 1")
    return GatedDeltaNet(
        num_key_heads=key_heads,
        num_value_heads=heads,
        key_dim=keys.size("ssm.state_size"),
        value_dim=width // heads,
        conv_size=conv_size,
        in_turns=in_turns and heads > key_heads,
    )


def _recurrent(keys: Fields, num_layers: int) -> Sequence[bool]:
    """Whether each layer has a delta rule: as a list says, or all but every `full_attention_interval`-th."""
    key = "attention.recurrent_layers"
    listed = keys.get(key)
    if listed is None:
        period, key = keys.size("full_attention_interval", 4), "full_attention_interval"
        listed = [(index + 1) % period != 0 for index in range(num_layers)]
    elif not isinstance(listed, list) or len(listed) < num_layers or {*map(type, listed)} != {bool}:
        raise keys.error(key, f"must list true or false for each of the {num_layers} layers")
    if all(listed[:num_layers]):
        raise keys.error(key, "leaves no layer with attention, without which models are not supported")
    return listed[:num_layers]
