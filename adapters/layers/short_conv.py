"""A layer's mixer as a gated short convolution, as data: it keeps a state of fixed size for each request.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.layers.stateful import StatefulMixer, conv_slots
from microvllm.adapters.tensors import WHOLE, Cut, LayerWeights, Shard, Slot, matrix_slots

if TYPE_CHECKING:
    from microvllm.ops.attention import AttentionBackend, BackendConfig
    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators
    from microvllm.ops.short_conv import ConvWeights


class ShortConv(StatefulMixer, frozen=True, kw_only=True, tag="short_conv"):
    """A causal convolution between two gates (LFM2, arXiv:2511.23404): see `ops.short_conv`.

    `conv_size`: the tokens that the convolution over each of the `channels` sees. `bias`: both products and
    the convolution have one.
    """

    channels: int
    conv_size: int
    bias: bool = False

    @property
    def out_size(self) -> int:
        """The width of what is between the two products."""
        return self.channels

    @property
    def scratch_size(self) -> int:
        """Numbers of an activation that a GPU needs for a prompt's token between the products."""
        return 5 * self.channels  # what is convolved, with the states in front of it, a tap, and the sum

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        return (4 * hidden_size + self.conv_size) * self.channels

    def state_bytes(self, dtype_bytes: int) -> int:
        """Bytes of a row's state; `dtype_bytes` of an activation."""
        return (self.conv_size - 1) * self.channels * dtype_bytes

    def sharded(self, size: int) -> ShortConv:
        """What one of `size` shards computes: some channels. Raises ValueError if they do not divide."""
        if self.channels % size:
            raise ValueError(f"{self.channels} channels of a convolution do not divide into {size} shards")
        return msgspec.structs.replace(self, channels=self.channels // size)

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """`conv_in` [3 C, h], b, c and x; `conv` [C, size], stored as [C, 1, size]; `conv_out` [h, C]."""
        channels, hidden = shard.share(self.channels), WHOLE.share(hidden_size)
        rows = {"conv_in": Cut.stacked([channels] * 3)}
        yield from matrix_slots("conv_in", rows, hidden, bias=self.bias)
        yield from conv_slots("conv", channels, self.conv_size, bias=self.bias)
        # Shards add up what this gives, its bias once.
        bias = self.bias and shard.rank == 0
        yield from matrix_slots("conv_out", {"conv_out": hidden}, channels, bias=bias)

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """The products in front of and behind the convolution."""
        first = operators.product(*weights.matrix("conv_in"), norm=norm)
        return first, operators.linear(*weights.matrix("conv_out"))

    def kept(self, weights: LayerWeights) -> ConvWeights:
        """What a layer needs between its products."""
        from microvllm.ops.short_conv import ConvWeights

        return ConvWeights(*weights.matrix("conv"))

    def backend(
        self, layers: Sequence[ConvWeights], config: BackendConfig, operators: Operators
    ) -> AttentionBackend:
        """The part between the products, of these layers, with the states of so many rows."""
        from microvllm.ops.short_conv import TorchShortConv

        return TorchShortConv(layers, config.rows, operators.activation_dtype)
