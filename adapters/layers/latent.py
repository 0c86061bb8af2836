"""A layer's attention over latent keys and values (MLA), as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.rope_spec import RopeSpec
from microvllm.adapters.tensors import (
    WHOLE,
    Cut,
    LayerWeights,
    Part,
    Shard,
    Slot,
    matrix_slots,
    vector_slot,
)

if TYPE_CHECKING:
    import torch

    from microvllm.ops.attention import AttentionBackend, BackendConfig
    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


class LatentAttention(msgspec.Struct, frozen=True, kw_only=True, tag="latent"):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    The cache has one vector of `rank` elements for each token, from which a matrix makes the keys and values
    of all heads, and a rotated key of `rope_dim` elements that all heads share. The matrix is not applied to
    what is cached: its part for keys is applied to the queries, and its part for values to what is attended
    to. So all heads attend to the same vectors, as keys and as values.

    nope_dim, value_dim: the elements of a head's key that are not rotated, and of its value. q_rank: that of
    the latent queries; None if there is one matrix for them, without a bias. norm_eps: of both latents.
    split: keys and values are made of latents by matrices of their own.
    """

    num_heads: int
    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    q_rank: int | None
    rope: RopeSpec
    scale: float
    bias: bool = False
    norm_eps: float = 1e-6
    split: bool = False

    @property
    def window(self) -> None:
        """All positions are seen."""

    @property
    def source(self) -> None:
        """Each layer has a cache of its own."""

    @property
    def cache_size(self) -> int:
        """Elements that a layer's cache has for one token."""
        return self.rank + self.rope_dim

    @property
    def out_size(self) -> int:
        """The width of what the attention backend gives: a latent vector for each head."""
        return self.num_heads * self.rank

    @property
    def q_size(self) -> int:
        return self.num_heads * (self.nope_dim + self.rope_dim)

    def at_length(self, length: int) -> LatentAttention:
        """The same for texts of at most `length` tokens: see `RopeSpec.at_length`."""
        return msgspec.structs.replace(self, rope=self.rope.at_length(length, self.rope_dim))

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        first = hidden_size * (self.cache_size + (self.q_rank or self.q_size))
        heads = self.num_heads * (self.nope_dim + self.value_dim) * self.rank
        return (
            first + (self.q_rank or 0) * self.q_size + heads + hidden_size * self.num_heads * self.value_dim
        )

    def sharded(self, size: int) -> LatentAttention:
        """What one of `size` shards computes of it: some heads over the whole latents."""
        if self.num_heads % size:
            raise ValueError(f"{self.num_heads} heads do not divide into {size} shards")
        return msgspec.structs.replace(self, num_heads=self.num_heads // size)

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """`q_kv_a` [Q + R + r, h], `q_b` [H (n + r), Q], `kv_b` [H (n + v), R], `o` [h, H v], and two norms.

        For rank R, rope_dim r, nope_dim n, value_dim v and q_rank Q; without one, `q_kv_a` is
        [H (n + r) + R + r, h], and there is neither `q_b` nor its norm. `split` ones have `k_b` [H R, n] and
        `v_b` [H v, R] in the place of `kv_b`.
        """
        hidden, key = WHOLE.share(hidden_size), self.nope_dim + self.rope_dim
        queries = self._reordered(shard.share(self.q_size), key)
        latent = self._reordered(WHOLE.share(self.cache_size), self.cache_size)
        if self.q_rank is None:
            yield from matrix_slots("q_kv_a", {"q": queries, "kv_a": latent}, hidden)
        else:
            first = {"q_a": WHOLE.share(self.q_rank), "kv_a": latent}
            yield from matrix_slots("q_kv_a", first, hidden, bias=self.bias)
            yield vector_slot("q_a_norm", self.q_rank)
            yield from matrix_slots("q_b", {"q_b": queries}, WHOLE.share(self.q_rank))
        yield vector_slot("kv_a_norm", self.rank)
        yield from self._of_latents(shard)
        values, bias = shard.share(self.num_heads * self.value_dim), self.bias and shard.rank == 0
        yield from matrix_slots("o", {"o": hidden}, values, bias=bias)

    def _of_latents(self, shard: Shard) -> Iterator[Slot]:
        """What makes the keys and the values of all heads of a latent."""
        if not self.split:
            heads = shard.share_units(self.num_heads, self.nope_dim + self.value_dim)
            yield from matrix_slots("kv_b", {"kv_b": heads}, WHOLE.share(self.rank))
            return
        for role, rows, columns in (("k_b", self.rank, self.nope_dim), ("v_b", self.value_dim, self.rank)):
            part = Part(role, False, shard.share_units(self.num_heads, rows), stacked=self.num_heads)
            yield Slot(role, (part,), WHOLE.share(columns))

    def _keys_and_values(
        self, weights: LayerWeights, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those matrices head by head: [H, n, R] and [H, v, R]."""
        from microvllm.ops.latent import plain

        if self.split:
            keys, values = (plain(weights.matrix(name)[0], dtype) for name in ("k_b", "v_b"))
            return keys.view(self.num_heads, self.rank, -1).mT, values.view(self.num_heads, -1, self.rank)
        matrix = plain(weights.matrix("kv_b")[0], dtype)
        heads = matrix.view(self.num_heads, self.nope_dim + self.value_dim, self.rank)
        return heads[:, : self.nope_dim], heads[:, self.nope_dim :]

    def _reordered(self, cut: Cut, length: int) -> Cut:
        """Rows in units of this length, the last `rope_dim` of each in the order of the rotation."""
        first = length - self.rope_dim
        order = [(first + start, first + stop) for start, stop in self.rope.order(self.rope_dim)]
        return cut if len(order) == 1 else cut.reordered(length, [(0, first), *order])

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """Everything up to queries and keys over the latents, and everything behind what is attended to."""
        from microvllm.ops.latent import LatentInput, LatentOutput

        def inner_norm(name: str) -> tuple[torch.Tensor, float]:
            found = weights.norm(name)
            if found is None:
                raise KeyError(name)
            return found[0], self.norm_eps

        first = operators.product(*weights.matrix("q_kv_a"), norm=norm)
        q_b = None
        if self.q_rank is not None:
            q_b = operators.product(*weights.matrix("q_b"), norm=inner_norm("q_a_norm"))
        keys, values = self._keys_and_values(weights, operators.activation_dtype)
        sizes = self.rope_dim, self.q_rank or self.q_size
        made = LatentInput(first, q_b, keys, inner_norm("kv_a_norm"), operators, *sizes)
        return made, LatentOutput(values, operators.linear(*weights.matrix("o")))

    def kept(self, weights: LayerWeights) -> None:
        """A layer needs nothing between its products."""

    def backend(
        self, layers: Sequence[None], config: BackendConfig, operators: Operators
    ) -> AttentionBackend:
        """The attention of these layers, over a cache of its own beside the pages."""
        from microvllm.adapters.rotary import inverse_frequencies
        from microvllm.ops.attention.latent import LatentConfig, LatentShape

        shape = LatentShape(
            len(layers), self.num_heads, self.rank, self.rope_dim, self.scale, self.rope.attention_factor
        )
        pages = config.pages.pages
        inv_freq = inverse_frequencies(self.rope, self.rope_dim).to(pages.device)
        sizes = pages.num_blocks, pages.block_size, inv_freq, config.max_position, pages.dtype
        return operators.latent_attention(LatentConfig(shape, *sizes))
