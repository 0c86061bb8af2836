"""Metadata of a GGUF file -> the parts of a `ModelSpec` that all families share. Imports no torch.

The keys are ggml's (docs/gguf.md); what they leave out follows from which tensors there are.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.fields import MAX_EXPERTS, MAX_LAYERS, Fields, shorten
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.gguf_tokens import special_tokens
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.rope_spec import Rotary, rope_from_gguf
from microvllm.adapters.spec import Attention, LayerSpec, ModelSpec
from microvllm.ops.routing import Routing

DRAFTS = "nextn_predict_layers"  # of the layers behind the last one
# Quantised weights came from bfloat16 training as a rule; float16 could overflow in their activations.
DTYPES = {"F32": "float32", "F16": "float16"}


def gguf_keys(file: GGUFFile) -> Fields:
    """The metadata of the model, whose keys begin with its architecture."""
    prefix = f"{file.architecture}."
    found = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
    return Fields(file.path, found, prefix)


def num_layers(keys: Fields) -> int:
    """The layers of the model: without those behind the last one, which predict further tokens for drafts."""
    count, drafts = keys.size("block_count", at_most=MAX_LAYERS), keys.get(DRAFTS, 0)
    if type(drafts) is not int or not 0 <= drafts < count:
        raise keys.error(DRAFTS, f"must be a number below block_count {count}, got {shorten(drafts)}")
    return count - drafts


def gguf_spec(
    file: GGUFFile,
    *,
    keys: Fields | None = None,
    rotary: Rotary | None = None,
    rotates_parts: bool = False,
    interleaved: bool = False,
) -> ModelSpec:
    """Build the spec of a dense model; `ModelFileError` names the metadata key or tensor at fault.

    keys, rotary: in place of the file's; rotates_parts: a part of each head may be rotated; interleaved: see
    `RopeSpec`.
    """
    keys = keys or gguf_keys(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(file.path, "tensor token_embd.weight is missing or not a matrix")
    vocab_size = embedding.shape[0]
    hidden_size = keys.size("embedding_length")
    num_heads = keys.size("attention.head_count")
    num_kv_heads = _kv_heads(keys, num_heads)
    if num_heads % num_kv_heads:
        raise keys.error(
            "attention.head_count", f"{num_heads} is not a multiple of attention.head_count_kv {num_kv_heads}"
        )
    if "attention.key_length" not in keys and hidden_size % num_heads:
        raise keys.error(
            "embedding_length", f"{hidden_size} is not a multiple of attention.head_count {num_heads}"
        )
    head_dim = keys.size("attention.key_length", max(1, hidden_size // num_heads))
    rotary_dim = keys.size("rope.dimension_count", head_dim)
    for key in ("attention.value_length", "rope.dimension_count"):
        fits = rotates_parts and key.startswith("rope") and rotary_dim % 2 == 0 and rotary_dim < head_dim
        if keys.size(key, head_dim) != head_dim and not fits:
            raise keys.error(
                key, f"{keys.size(key)} differs from the head size {head_dim}, which is not supported"
            )
    if head_dim % 2:
        raise keys.error("attention.key_length", f"must be even for rotary embeddings, got {head_dim}")
    rope, max_position = rotary or rope_from_gguf(file, keys, rotary_dim)
    part = rotary_dim if rotary_dim != head_dim else None
    rope = msgspec.structs.replace(rope, rotary_dim=part, interleaved=interleaved)
    # 0 stands for none, as in files of Phi-4-mini.
    window = keys.size("attention.sliding_window") if keys.get("attention.sliding_window") else max_position
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        window=window if window < max_position else None,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
    )
    mlp = MLP(size=keys.size("feed_forward_length"), bias="blk.0.ffn_down.bias" in file.tensors)
    layer = LayerSpec(mixer=attention, mlp=_experts(keys) if keys.get("expert_count") else mlp)
    special = special_tokens(file.path, file.metadata)
    return ModelSpec(
        architecture=file.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * num_layers(keys),
        max_position=max_position,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        dtype=DTYPES.get(_matrix_type(file), "bfloat16"),
        bos_token_id=special.named.get("bos_token_id"),
        eos_token_ids=tuple(token for token in special.ends if token < vocab_size),
    )


WITH_EXPERTS = ("llama", "qwen2moe", "qwen3moe", "gpt-oss")
# Keys of experts that are not computed here, and what they say where they change nothing.
EXPERT_KEYS: Mapping[str, tuple[object, ...]] = {
    "expert_gating_func": (None, 0, 1),  # softmax
    "expert_weights_norm": (None, True),
    "expert_weights_scale": (None, 0.0, 1.0),
    **dict.fromkeys(("expert_shared_count", "expert_group_count", "leading_dense_block_count"), (None, 0)),
}


def _experts(keys: Fields) -> Experts:
    """Those of every layer, as llama.cpp computes them for the architectures `WITH_EXPERTS`."""
    if keys.where.removesuffix(".") not in WITH_EXPERTS:
        raise keys.error("expert_count", f"is set, which only {', '.join(WITH_EXPERTS)} models may have")
    count, num_chosen = keys.size("expert_count", at_most=MAX_EXPERTS), keys.size("expert_used_count")
    if num_chosen > count:
        raise keys.error("expert_used_count", f"is {num_chosen}, but there are {count} experts")
    for key, unchanged in EXPERT_KEYS.items():
        if keys.get(key) not in unchanged:
            raise keys.error(key, f"{shorten(keys.get(key))} is not supported")
    size = keys.size("expert_feed_forward_length", keys.size("feed_forward_length"))
    return Experts(count=count, size=size, routing=Routing(num_chosen=num_chosen))


def _matrix_type(file: GGUFFile) -> str:
    names = (".attn_q.weight", ".attn_qkv.weight")
    return next((tensor.type for name, tensor in file.tensors.items() if name.endswith(names)), "")


def _kv_heads(keys: Fields, num_heads: int) -> int:
    key = "attention.head_count_kv"
    value = keys.get(key)
    if isinstance(value, list):  # dense models of hybrid families list the same number for each layer
        if len(set(value)) != 1:
            raise keys.error(key, "differs between layers, which is not supported")
        keys = keys.with_value(key, value[0])
    return keys.size(key, num_heads)
