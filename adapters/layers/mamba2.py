"""A layer's mixer as a Mamba-2, as data: it keeps a state of fixed size for each request.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.layers.stateful import STATE_BYTES, StatefulMixer, conv_slots
from microvllm.adapters.tensors import BARE, WHOLE, Cut, LayerWeights, Shard, Slot, matrix_slots, vector_slot

if TYPE_CHECKING:
    from microvllm.ops.attention import AttentionBackend, BackendConfig
    from microvllm.ops.mamba2 import Mamba2Weights
    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


def tensors(module: str) -> dict[str, str]:
    """The names of the roles in a folder, of which all lie under one module."""
    return {
        "mamba_in": f"{module}.in_proj",
        "mamba_conv": f"{module}.conv1d",
        "mamba_a_log": f"{module}.A_log{BARE}",
        "mamba_dt_bias": f"{module}.dt_bias{BARE}",
        "mamba_skip": f"{module}.D{BARE}",
        "mamba_scale": f"{module}.norm",
        "mamba_out": f"{module}.out_proj",
    }


class Mamba2(StatefulMixer, frozen=True, kw_only=True, tag="mamba2"):
    """A state space model with a scalar decay by head (arXiv:2405.21060): see `ops.mamba2`.

    As many neighbouring heads of `head_dim` share B and C, of `state_size`, of each of `num_groups`, and the
    norm behind, whose epsilon is `eps`. `conv_size`: the tokens that the convolution over x, B and C sees.
    `conv_bias`: it has a bias; `bias`: both products have one.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_size: int
    eps: float
    conv_bias: bool = True
    bias: bool = False

    @property
    def out_size(self) -> int:
        """The width of what is between the two products."""
        return self.num_heads * self.head_dim

    @property
    def scratch_size(self) -> int:
        """Numbers of an activation that a GPU needs for a prompt's token between the products."""
        return self.channels + 128 * self.num_groups  # what is convolved, and C B' of 64 tokens, in float32

    @property
    def channels(self) -> int:
        """The width of x, B and C together."""
        return self.out_size + 2 * self.num_groups * self.state_size

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        return hidden_size * (self.channels + 2 * self.out_size + self.num_heads)

    def state_bytes(self, dtype_bytes: int) -> int:
        """Bytes of a row's state; `dtype_bytes` of an activation."""
        kept = (self.conv_size - 1) * self.channels * dtype_bytes
        return self.out_size * self.state_size * STATE_BYTES + kept

    def sharded(self, size: int) -> Mamba2:
        """What one of `size` shards computes: some groups of heads. Raises ValueError if they do not divide.

        Heads of one group have a norm in common, which shards do not exchange.
        """
        if self.num_groups % size:
            raise ValueError(f"{self.num_groups} groups of heads of Mamba-2 do not divide into {size} shards")
        return msgspec.structs.replace(
            self, num_heads=self.num_heads // size, num_groups=self.num_groups // size
        )

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """`mamba_in` [channels + H P + H, h], x, B, C, z and dt, stored as z, x, B, C, dt, and the rest.

        `mamba_conv` [channels, size], stored as [channels, 1, size], and its bias; `mamba_a_log`,
        `mamba_dt_bias`, `mamba_skip` [H]; `mamba_scale` [H P], of the norm behind; `mamba_out` [h, H P].
        """
        inner, heads = shard.share(self.out_size), shard.share(self.num_heads)
        group = shard.share(self.num_groups * self.state_size)
        hidden, mixed = WHOLE.share(hidden_size), Cut.stacked((inner, group, group))
        stored = Cut.stacked((inner, inner, group, group, heads))
        z, x, b, c, dt = stored.runs
        rows = {"mamba_in": Cut(stored.stored, (x, b, c, z, dt))}
        yield from matrix_slots("mamba_in", rows, hidden, bias=self.bias)
        yield from conv_slots("mamba_conv", mixed, self.conv_size, bias=self.conv_bias)
        for name in ("mamba_a_log", "mamba_dt_bias", "mamba_skip"):
            yield vector_slot(name, heads)._replace(is_wide=True)
        yield vector_slot("mamba_scale", inner)
        # Shards add up what this gives, its bias once.
        bias = self.bias and shard.rank == 0
        yield from matrix_slots("mamba_out", {"mamba_out": hidden}, inner, bias=bias)

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """The products in front of and behind the recurrence."""
        first = operators.product(*weights.matrix("mamba_in"), norm=norm)
        return first, operators.linear(*weights.matrix("mamba_out"))

    def kept(self, weights: LayerWeights) -> Mamba2Weights:
        """What a layer needs between its products."""
        from microvllm.ops.mamba2 import Mamba2Weights

        vectors = "mamba_a_log", "mamba_dt_bias", "mamba_skip", "mamba_scale"
        return Mamba2Weights(*weights.matrix("mamba_conv"), *(weights.matrix(name)[0] for name in vectors))

    def backend(
        self, layers: Sequence[Mamba2Weights], config: BackendConfig, operators: Operators
    ) -> AttentionBackend:
        """The part between the products, of these layers, with the states of so many rows."""
        from microvllm.ops.mamba2 import Mamba2Config

        sizes = self.num_heads, self.head_dim, self.num_groups, self.state_size
        return operators.recurrence(Mamba2Config(*sizes, self.eps, config.rows, tuple(layers)))
