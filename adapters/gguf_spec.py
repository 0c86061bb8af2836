"""Metadata of a GGUF file -> the parts of a `ModelSpec` that all families share. Imports no torch.

The keys are ggml's (docs/gguf.md); what they leave out follows from which tensors there are.
"""

from __future__ import annotations

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.fields import MAX_LAYERS, Fields
from microvllm.adapters.gguf_file import GGUFFile
from microvllm.adapters.gguf_tokens import special_tokens
from microvllm.adapters.rope_spec import rope_from_gguf
from microvllm.adapters.spec import MLP, Attention, LayerSpec, ModelSpec

# Quantised weights came from bfloat16 training as a rule; float16 could overflow in their activations.
DTYPES = {"F32": "float32", "F16": "float16"}


def gguf_spec(file: GGUFFile) -> ModelSpec:
    """Build the spec of a dense model; `ModelFileError` names the metadata key or tensor at fault."""
    prefix = f"{file.architecture}."
    keys = Fields(
        file.path,
        {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)},
        prefix,
    )
    if keys.get("expert_count") not in (None, 0):
        raise keys.error("expert_count", "is set: mixture-of-experts models are not supported")
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
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            raise keys.error(
                key, f"{keys.size(key)} differs from the head size {head_dim}, which is not supported"
            )
    if head_dim % 2:
        raise keys.error("attention.key_length", f"must be even for rotary embeddings, got {head_dim}")
    rope, max_position = rope_from_gguf(file, keys, head_dim)
    window = keys.size("attention.sliding_window", max_position)
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
    layer = LayerSpec(mixer=attention, mlp=mlp)
    special = special_tokens(file.path, file.metadata)
    return ModelSpec(
        architecture=file.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * keys.size("block_count", at_most=MAX_LAYERS),
        max_position=max_position,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        dtype=DTYPES.get(_matrix_type(file), "bfloat16"),
        bos_token_id=special.named.get("bos_token_id"),
        eos_token_ids=tuple(token for token in special.ends if token < vocab_size),
    )


def _matrix_type(file: GGUFFile) -> str:
    matrix = file.tensors.get("blk.0.attn_q.weight")
    return matrix.type if matrix else ""


def _kv_heads(keys: Fields, num_heads: int) -> int:
    key = "attention.head_count_kv"
    value = keys.get(key)
    if isinstance(value, list):
        raise keys.error(key, "differs between layers, which is not supported")
    return keys.size(key, num_heads)
