"""What a model is, in numbers: `ModelSpec`, read from `config.json` or from a GGUF header.

Imports no torch: the API process reads it too, to know the context length and the vocabulary.
"""

from __future__ import annotations

import msgspec


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding (Su et al., 2021, arXiv:2104.09864) and its context extension.

    `scaling` is "none", "linear", "llama3", "yarn", "dynamic" or "longrope": `adapters.rotary` has the
    formulas. cos and sin are multiplied by `attention_factor`.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the head_dim / 2 frequencies
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether texts beyond the original length are rotated otherwise than shorter ones."""
        return self.scaling in ("dynamic", "longrope")

    def at_length(self, length: int, head_dim: int) -> RopeSpec:
        """The rotation for texts of `length` tokens, which then holds for texts of every length.

        Keys stay in the cache while a text grows, and texts share them, so that the authors' change of all
        keys at some length is fixed at the longest text, as in vLLM. "dynamic" has a base that grows with
        the length ("NTK-aware"), "longrope" divisors of its own beyond the original length.
        """
        if not self.depends_on_length or length <= self.original_max_position:
            return self
        if self.scaling == "longrope":
            return msgspec.structs.replace(self, short_factors=self.long_factors)
        growth = self.factor * length / self.original_max_position - (self.factor - 1)
        theta = self.theta * growth ** (head_dim / (head_dim - 2))
        return msgspec.structs.replace(self, scaling="none", theta=theta)


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

    @property
    def default_length(self) -> int:
        """Context length in tokens if none is requested.

        Of "longrope" the original one, as in vLLM: a longer one changes what short texts are answered.
        """
        if self.rope.scaling == "longrope":
            return min(self.max_position, self.rope.original_max_position)
        return self.max_position

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token holds over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes
