"""LFM2 and LFM2.5, dense and of experts (arXiv:2511.23404): gated short convolutions beside attention."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import msgspec

from microvllm.adapters.family import GGUF_TENSORS, HF_TENSORS, Family, with_mlp
from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.files.gguf_experts import CORRECTION, SIGMOID, gguf_experts
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_spec import gguf_keys, gguf_spec
from microvllm.adapters.files.hf_config import hf_spec, hybrid_layer_types, read_experts
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.layers.short_conv import ShortConv
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import LayerSpec, ModelSpec
from microvllm.adapters.tensors import BARE

LAYER = "model.layers.{i}"
TENSORS = {
    **HF_TENSORS,
    "norm": "model.embedding_norm",
    "o": f"{LAYER}.self_attn.out_proj",
    "q_norm": f"{LAYER}.self_attn.q_layernorm",
    "k_norm": f"{LAYER}.self_attn.k_layernorm",
    "conv_in": f"{LAYER}.conv.in_proj",
    "conv": f"{LAYER}.conv.conv",
    "conv_out": f"{LAYER}.conv.out_proj",
    "mixer_norm": f"{LAYER}.operator_norm",
    "mlp_norm": f"{LAYER}.ffn_norm",
    "gate": f"{LAYER}.feed_forward.w1",
    "up": f"{LAYER}.feed_forward.w3",
    "down": f"{LAYER}.feed_forward.w2",
}
MOE_TENSORS = {
    **TENSORS,
    "router": f"{LAYER}.feed_forward.gate",
    "correction": f"{LAYER}.feed_forward.expert_bias{BARE}",
    "expert_gate": f"{LAYER}.feed_forward.experts.{{e}}.w1",
    "expert_up": f"{LAYER}.feed_forward.experts.{{e}}.w3",
    "expert_down": f"{LAYER}.feed_forward.experts.{{e}}.w2",
}
GGUF_NAMES = {
    **GGUF_TENSORS,
    "norm": "token_embd_norm",  # which llama.cpp's converter calls the last norm of this architecture
    "conv_in": "blk.{i}.shortconv.in_proj",
    "conv": "blk.{i}.shortconv.conv",
    "conv_out": "blk.{i}.shortconv.out_proj",
    "correction": CORRECTION,
}
KINDS = ("conv", "full_attention")
SMALLEST_SUM = 1e-6  # is added to the sum by which the weights of the chosen experts are divided


def dense_from_hf(config: Fields) -> ModelSpec:
    """Describe a dense LFM2 model from the `config.json` of its folder."""
    if "block_ff_dim" in config:
        config = config.with_value("intermediate_size", config.size("block_ff_dim"))
    kinds = None if "layer_types" in config else _kinds_of_indices(config)
    spec = _hybrid(config, "lfm2", kinds)
    return with_mlp(spec, MLP(size=_inner_size(config)))


def sparse_from_hf(config: Fields) -> ModelSpec:
    """Describe an LFM2 model of experts from the `config.json` of its folder."""
    spec = _hybrid(config, "lfm2_moe", expert_keys=("routed_scaling_factor",))
    num_dense = config.size("num_dense_layers", 2, at_least=0)
    return with_mlp(spec, _experts(config), lambda index: index >= num_dense)


def _hybrid(
    config: Fields, architecture: str, kinds: list[str] | None = None, expert_keys: Collection[str] = ()
) -> ModelSpec:
    """Build the spec with plain MLPs of `intermediate_size`; `kinds` stand in for absent `layer_types`."""
    for key in ("block_use_swiglu", "use_pos_enc"):
        if not config.flag(key, True):
            raise config.error(key, "is false, which is not supported")
    hidden_size = config.size("hidden_size")
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        if config.size(key, hidden_size) != hidden_size:
            raise config.error(key, f"is {config.get(key)}, but hidden_size is {hidden_size}")
    spec = hf_spec(
        config,
        architecture,
        default_max_position=128_000,
        default_kv_heads=8,
        rotary=partial(rope_from_hf, theta=1e6),
        qk_norm=True,
        has_experts=bool(expert_keys),
        expert_keys=expert_keys,
    )
    conv_size = config.size("conv_L_cache", 3, at_least=2)
    conv = ShortConv(channels=hidden_size, conv_size=conv_size, bias=config.flag("conv_bias"))
    kinds = hybrid_layer_types(config, spec.num_layers, KINDS, kinds)
    layers = (
        LayerSpec(mixer=conv, mlp=layer.mlp) if kind == "conv" else layer
        for layer, kind in zip(spec.layers, kinds, strict=True)
    )
    tied = config.flag("tie_embedding", config.flag("tie_word_embeddings", True))
    eps = config.number("norm_eps", 1e-5)
    return spec.with_layers(layers, tie_embeddings=tied, rms_norm_eps=eps)


def _kinds_of_indices(config: Fields) -> list[str]:
    """Older files list the layers with attention; without a list all have it."""
    num_layers = config.size("num_hidden_layers")
    indices = config.get("full_attn_idxs", list(range(num_layers)))
    if not isinstance(indices, list) or not indices:
        raise config.error(
            "full_attn_idxs", "must list the layers with attention, of which there must be one"
        )
    for index in indices:
        if type(index) is not int or not 0 <= index < num_layers:
            raise config.error("full_attn_idxs", f"names {shorten(index)}: there are {num_layers} layers")
    return [KINDS[index in indices] for index in range(num_layers)]


def _inner_size(config: Fields) -> int:
    """The width of an MLP: unless it is not to be adjusted, two thirds, a factor of that, and rounded up."""
    size = config.size("intermediate_size")
    if not config.flag("block_auto_adjust_ff_dim", True):
        return size
    size = 2 * size // 3
    if config.is_null("block_ffn_dim_multiplier"):
        return size
    size = int(config.number("block_ffn_dim_multiplier", 1.0) * size)
    multiple = config.size("block_multiple_of", 256)
    return -(-size // multiple) * multiple


def _experts(config: Fields) -> Experts:
    """With scores that are sigmoids, and, as `use_expert_bias` says, a correction for the choice."""
    experts = read_experts(
        config,
        count=32,
        num_chosen=4,
        size=config.size("moe_intermediate_size", 1792),
        normalized=config.flag("norm_topk_prob", True),
    )
    routing = msgspec.structs.replace(
        experts.routing,
        sigmoid=True,
        smallest_sum=SMALLEST_SUM,
        scale=config.number("routed_scaling_factor", 1.0),
    )
    corrected = config.flag("use_expert_bias", True)
    return msgspec.structs.replace(experts, routing=routing, correction=corrected)


def dense_from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe a dense LFM2 model from a GGUF file."""
    keys = gguf_keys(file)
    if keys.get("expert_count"):
        raise keys.error("expert_count", "is set, which only lfm2moe models may have")
    return _hybrid_from_gguf(file, keys)


def sparse_from_gguf(file: GGUFFile) -> ModelSpec:
    """Describe an LFM2 model of experts from a GGUF file."""
    keys = gguf_keys(file)
    spec = msgspec.structs.replace(_hybrid_from_gguf(file, keys), architecture="lfm2_moe")
    if keys.get("expert_gating_func") != SIGMOID:
        raise keys.error("expert_gating_func", f"must be {SIGMOID}, for sigmoids")
    experts = gguf_experts(keys, scores=SIGMOID, normalized=True)
    routing = msgspec.structs.replace(experts.routing, smallest_sum=SMALLEST_SUM)
    experts = msgspec.structs.replace(experts, routing=routing, correction=True)
    num_dense = keys.size("leading_dense_block_count", 0, at_least=0)
    return with_mlp(spec, experts, lambda index: index >= num_dense)


def _hybrid_from_gguf(file: GGUFFile, keys: Fields) -> ModelSpec:
    """Build the spec with plain MLPs; layers without heads of keys are convolutions."""
    heads_key = "attention.head_count_kv"
    count, heads = keys.size("block_count"), keys.get(heads_key)
    if not isinstance(heads, list) or len(heads) != count:
        raise keys.error(heads_key, f"must list a number for each of the {count} layers")
    numbers = set(heads) - {0}
    if len(numbers) != 1:
        raise keys.error(heads_key, "must name one number of heads, and 0 where there is no attention")
    if not keys.flag("attention.causal", True):
        raise keys.error("attention.causal", "is false: attention in both directions is not supported")
    # Of experts the caller reads what there is.
    spec = gguf_spec(file, keys=keys.with_value(heads_key, numbers.pop()).with_value("expert_count", None))
    conv = ShortConv(channels=spec.hidden_size, conv_size=keys.size("shortconv.l_cache", at_least=2))
    layers = (
        layer.with_mixer(qk_norm=True) if number else LayerSpec(mixer=conv, mlp=layer.mlp)
        for layer, number in zip(spec.layers, heads, strict=True)
    )
    return spec.with_layers(layers)


FAMILIES = (
    Family(
        "lfm2",
        "Lfm2ForCausalLM",
        dense_from_hf,
        hf_tensors=TENSORS,
        from_gguf=dense_from_gguf,
        gguf_name="lfm2",
        gguf_tensors=GGUF_NAMES,
    ),
    Family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        sparse_from_hf,
        hf_tensors=MOE_TENSORS,
        from_gguf=sparse_from_gguf,
        gguf_name="lfm2moe",
        gguf_tensors=GGUF_NAMES,
    ),
)
