"""A layer's mixer as a Gated DeltaNet, as data: it keeps a state of fixed size for each request.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.layers.stateful import STATE_BYTES, StatefulMixer, conv_slots
from microvllm.adapters.tensors import WHOLE, Cut, LayerWeights, Shard, Slot, matrix_slots, vector_slot

if TYPE_CHECKING:
    from torch import Tensor

    from microvllm.ops.attention import AttentionBackend, BackendConfig
    from microvllm.ops.delta_rule import DeltaWeights
    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


class GatedDeltaNet(StatefulMixer, frozen=True, kw_only=True, tag="gated_delta_net"):
    """Linear attention by the gated delta rule (arXiv:2412.06464): see `ops.delta_rule`.

    Each of `num_key_heads` queries and keys of `key_dim` is shared by as many neighbouring heads of values of
    `value_dim`. `conv_size`: the tokens that the convolution over q, k and v sees. `in_turns`: the checkpoint
    has the first head of values of every key head, then the second of each; the columns behind them, which
    may be packed, stay so.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int
    in_turns: bool = False

    @property
    def out_size(self) -> int:
        """The width of what is between the two products."""
        return self.num_value_heads * self.value_dim

    @property
    def scratch_size(self) -> int:
        """Numbers of an activation that a GPU needs for a prompt's token between the products."""
        keys, chunk = self.num_value_heads * self.key_dim, 34 * self.num_value_heads
        return self.channels + keys + 2 * self.out_size + chunk  # updates in float32

    @property
    def channels(self) -> int:
        """The width of q, k and v together."""
        return 2 * self.num_key_heads * self.key_dim + self.out_size

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        return hidden_size * (self.channels + 2 * self.out_size + 2 * self.num_value_heads)

    def state_bytes(self, dtype_bytes: int) -> int:
        """Bytes of a row's state; `dtype_bytes` of an activation."""
        matrices = self.num_value_heads * self.value_dim * self.key_dim
        return matrices * STATE_BYTES + (self.conv_size - 1) * self.channels * dtype_bytes

    def sharded(self, size: int) -> GatedDeltaNet:
        """What one of `size` shards computes of it: some heads. Raises ValueError if they do not divide."""
        if self.num_key_heads % size:
            heads = f"{self.num_key_heads} heads of keys of a linear attention"
            raise ValueError(f"{heads} do not divide into {size} shards")
        return msgspec.structs.replace(
            self, num_key_heads=self.num_key_heads // size, num_value_heads=self.num_value_heads // size
        )

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """`delta_qkvz` [channels + Hv Dv, h], `delta_ba` [2 Hv, h], `delta_out` [h, Hv Dv], and the rest.

        `delta_conv` [channels, size], `delta_a_log`, `delta_dt_bias` [Hv], `delta_scale` [Dv], of the norm
        behind. A checkpoint has q, k, v and z in one tensor, and b and a in another, one head of keys with
        all that belongs to it after another (the roles `delta_qkvz` and `delta_ba`); or else in four.
        """
        group = self.num_value_heads // self.num_key_heads
        owners = range(*shard.share_units(self.num_key_heads, 1).runs[0])
        sizes = self.key_dim, self.key_dim, group * self.value_dim
        q = shard.share_units(self.num_key_heads, self.key_dim)
        v, heads = (self._of_values(length, owners) for length in (self.value_dim, 1))
        hidden, qkv = WHOLE.share(hidden_size), Cut.stacked((q, q, v))
        qkvz = {"delta_qkv": qkv, "delta_z": v}
        ba = {"delta_b": heads, "delta_a": heads}
        if "delta_qkvz" in names:
            qkvz = {"delta_qkvz": self._dealt((*sizes, sizes[-1]), owners)}
        if "delta_ba" in names:
            ba = {"delta_ba": self._dealt((group, group), owners)}
        yield from matrix_slots("delta_qkvz", qkvz, hidden)
        yield from matrix_slots("delta_ba", ba, hidden)
        columns = v
        if self.in_turns:
            turn, count = self.num_key_heads * self.value_dim, len(owners) * self.value_dim
            starts = range(owners.start * self.value_dim, self.num_value_heads * self.value_dim, turn)
            columns = Cut(v.stored, tuple((start, start + count) for start in starts)).joined()
        yield from matrix_slots("delta_out", {"delta_out": hidden}, columns)
        yield from conv_slots("delta_conv", qkv, self.conv_size)
        for name in ("delta_a_log", "delta_dt_bias"):
            yield vector_slot(name, heads)._replace(is_wide=True)
        yield vector_slot("delta_scale", self.value_dim)

    def _of_values(self, length: int, owners: range) -> Cut:
        """A run of this length for each head of values that belongs to one of the key heads `owners`."""
        group, count = self.num_value_heads // self.num_key_heads, self.num_value_heads * length
        if not self.in_turns:
            return Cut(count, ((owners.start * group * length, owners.stop * group * length),))
        places = (turn * self.num_key_heads + owner for owner in owners for turn in range(group))
        return Cut(count, tuple((place * length, (place + 1) * length) for place in places))

    def _dealt(self, sizes: Sequence[int], owners: range) -> Cut:
        """Runs of these sizes, of which each key head has one of each kind: kind by kind, of the `owners`."""
        width = sum(sizes)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        runs = (
            (owner * width + start, owner * width + start + size)
            for start, size in zip(starts, sizes, strict=True)
            for owner in owners
        )
        return Cut(self.num_key_heads * width, tuple(runs))

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """The products in front of and behind the delta rule."""
        import torch

        parts = [weights.matrix(name)[0] for name in ("delta_qkvz", "delta_ba")]
        out = self._out(operators.linear(*weights.matrix("delta_out")))
        if all(type(part) is torch.Tensor for part in parts):
            return operators.product(torch.cat(parts), norm=norm), out
        products = [operators.product(part, norm=norm) for part in parts]
        return lambda x: torch.cat([product(x) for product in products], 1), out

    def _out(self, product: LinearOperator) -> LinearOperator:
        """The product behind the delta rule, whose columns may be in turns."""
        if not self.in_turns:
            return product
        sizes = self.num_key_heads, -1, self.value_dim

        def in_turns(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return product(x.view(len(x), *sizes).transpose(1, 2).flatten(1), residual)

        return in_turns

    def kept(self, weights: LayerWeights) -> DeltaWeights:
        """What a layer needs between its products."""
        from microvllm.ops.delta_rule import DeltaWeights

        names = "delta_conv", "delta_a_log", "delta_dt_bias", "delta_scale"
        return DeltaWeights(*(weights.matrix(name)[0] for name in names))

    def backend(
        self, layers: Sequence[DeltaWeights], config: BackendConfig, operators: Operators
    ) -> AttentionBackend:
        """The part between the products, of these layers, with the states of so many rows."""
        from microvllm.ops.delta_rule import DeltaConfig

        sizes = self.num_key_heads, self.num_value_heads, self.key_dim, self.value_dim
        return operators.recurrence(DeltaConfig(*sizes, config.eps, config.rows, tuple(layers)))
