"""Metadata of a GGUF file -> the parts of a `ModelSpec` that all families share. Imports no torch.

The keys are ggml's (docs/gguf.md); what they leave out is told by which tensors there are.
"""

from __future__ import annotations

import math

import numpy as np

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.fields import MAX_LAYERS, MAX_ROPE_FACTOR, Fields, shorten
from microvllm.adapters.gguf_file import GGUFFile
from microvllm.adapters.gguf_tokens import special_tokens
from microvllm.adapters.spec import ModelSpec, RopeSpec

# Quantised weights came from bfloat16 training as a rule; float16 could overflow in their activations.
DTYPES = {"F32": "float32", "F16": "float16"}
FACTORS_TENSOR = "rope_freqs.weight"
# Of every release with rotary factors (Llama 3.1, 3.2, 3.3); only `factor` differs between them.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192


def gguf_spec(file: GGUFFile, architecture: str) -> ModelSpec:
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
    rope = _rope(file, keys, head_dim)
    max_position = keys.size("context_length")
    if rope.scaling == "linear":
        max_position = int(max_position * rope.factor)
    window = keys.size("attention.sliding_window", max_position)
    special = special_tokens(file.path, file.metadata)
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.size("feed_forward_length"),
        num_layers=keys.size("block_count", at_most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=window if window < max_position else None,
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


def _rope(file: GGUFFile, keys: Fields, head_dim: int) -> RopeSpec:
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.text("rope.scaling.type", "none")
    old_factor = keys.number("rope.scale_linear", 1.0, at_least=1.0, at_most=MAX_ROPE_FACTOR)
    factor = keys.number("rope.scaling.factor", old_factor, at_least=1.0, at_most=MAX_ROPE_FACTOR)
    if "rope.scale_linear" in keys and "rope.scaling.type" not in keys:
        kind = "linear"  # the spelling before 2023-10
    if kind not in ("none", "linear"):
        raise keys.error("rope.scaling.type", f"must be none or linear, got {shorten(kind)}")
    linear = factor if kind == "linear" else 1.0
    if FACTORS_TENSOR not in file.tensors:
        return RopeSpec(theta=theta, scaling="linear" if linear != 1.0 else "none", factor=linear)
    if linear != 1.0:
        raise ModelFileError(
            file.path, f"has both {keys.where}rope.scaling.type linear and a tensor {FACTORS_TENSOR}"
        )
    return _llama3_from_factors(file, theta, head_dim)


def _llama3_from_factors(file: GGUFFile, theta: float, head_dim: int) -> RopeSpec:
    """Recover Llama 3's scaling from the divisors of the frequencies that its GGUF files hold instead.

    The largest divisor is `factor`; the whole curve is computed again from it and must agree, so that
    factors made in another way are refused rather than approximated.
    """
    factors = file.tensor(FACTORS_TENSOR).astype(np.float64).ravel()
    if len(factors) != head_dim // 2 or not np.isfinite(factors).all() or factors.min() < 1.0 - 1e-6:
        raise ModelFileError(
            file.path, f"tensor {FACTORS_TENSOR} does not hold {head_dim // 2} divisors of at least 1"
        )
    factor = float(factors.max())
    if factor < 1.0 + 1e-6:
        return RopeSpec(theta=theta)
    spec = RopeSpec(
        theta=theta,
        scaling="llama3",
        factor=round(factor, 4),
        low_freq_factor=LLAMA3_LOW,
        high_freq_factor=LLAMA3_HIGH,
        original_max_position=LLAMA3_ORIGINAL,
    )
    if not np.allclose(factors, llama3_divisors(spec, head_dim), rtol=1e-3):
        raise ModelFileError(
            file.path, f"tensor {FACTORS_TENSOR} is not Llama 3's scaling, the only one supported"
        )
    return spec


def llama3_divisors(rope: RopeSpec, head_dim: int) -> list[float]:
    """What Llama 3.1 divides each of the head_dim / 2 rotary frequencies by."""
    divisors = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * rope.theta ** (2 * index / head_dim)
        turns = rope.original_max_position / wavelength  # how often it turns over the trained context
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = min(1.0, max(0.0, ramp))
        divisors.append(1.0 / ((1.0 - kept) / rope.factor + kept))
    return divisors
