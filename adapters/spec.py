"""What a model is, in numbers: `ModelSpec`, read from `config.json` or from a GGUF header.

Imports no torch: the API process reads it too, to know the context length and the vocabulary.
"""

from __future__ import annotations

import msgspec


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding (Su et al., 2021, arXiv:2104.09864) and its context extension.

    `scaling` is "none", "linear" (positions divided by `factor`) or "llama3" (Llama 3.1: low
    frequencies divided by `factor`, high ones kept, a smooth ramp between).
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A dense decoder-only transformer. Sizes in elements; `dtype` is the checkpoint's own."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token holds over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes
