"""The gated short convolution over states that lie at the rows of requests, in plain torch.

Of LFM2 (arXiv:2511.23404): a product gives b, c and x of each token, channel by channel; what is behind the
convolution is c times a causal convolution of b x over the last few tokens of the sequence, of which the row
keeps those that later tokens will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.memory import lazy_zeros
from microvllm.ops.row_states import StatesByRow, rows_of


class ConvWeights(NamedTuple):
    """What a layer has beside its products: conv [C, size], the newest token last; bias: [C] or None."""

    conv: Tensor
    bias: Tensor | None


class TorchShortConv(StatesByRow):
    """An `AttentionBackend` of gated short convolutions: what is between their two products.

    kept: [layers, rows, size - 1, C] of the activations' dtype, b x of the last tokens, the newest last.
    It reads nothing on the host, so that CUDA graphs can capture it.
    """

    def __init__(self, layers: Sequence[ConvWeights], rows: int, dtype: torch.dtype) -> None:
        """rows: of states, the padding row included; dtype: of activations."""
        channels, size = layers[0].conv.shape
        self.layers = [
            ConvWeights(conv.T.float().contiguous(), None if bias is None else bias.float())
            for conv, bias in layers
        ]
        self.kept = lazy_zeros((len(layers), rows, size - 1, channels), dtype, layers[0].conv.device)
        super().__init__((self.kept,))

    def begin_step(self, batch: AttentionBatch) -> ConvStep:
        return ConvStep(self, batch)


class ConvStep:
    """Computes one step, layer by layer, on the tokens of the step behind what the rows keep.

    A layer's source is [sequences * (size - 1) + n, C]: what each sequence's row keeps, then the tokens.
    """

    def __init__(self, states: TorchShortConv, batch: AttentionBatch) -> None:
        self._states, self._rows = states, rows_of(batch).long()
        positions, decodes, count = batch.positions, batch.num_decodes, len(batch.positions)
        device, seen = positions.device, states.kept.shape[2]
        starts = torch.arange(decodes + 1, device=device)
        if batch.segment_table is not None:
            starts = torch.cat((starts[:-1], batch.segment_table.starts.long() + decodes))
        tokens, num_rows = torch.arange(count, device=device), len(starts) - 1
        # Padding behind the last segment counts as its own: it writes no state.
        owners = torch.searchsorted(starts, tokens, right=True).clamp_(max=num_rows) - 1
        # An empty segment may begin behind the last token.
        self._begins = (positions[starts[:-1].clamp(max=count - 1)] == 0).view(-1, 1, 1)
        taps = torch.arange(-seen, 1, device=device)
        self._taps = _places(tokens[:, None] + taps, owners[:, None], starts[owners, None], seen, num_rows)
        sequences, ends = torch.arange(num_rows, device=device)[:, None], starts[1:, None]
        self._last = _places(ends + taps[:-1], sequences, starts[:-1, None], seen, num_rows)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, 3 C], b, c and x of each token -> [n, C]."""
        b, c, x = qkv.chunk(3, 1)
        kept, (weight, bias) = self._states.kept[layer], self._states.layers[layer]
        before = kept[self._rows].masked_fill_(self._begins, 0)
        source = torch.cat((before.flatten(0, 1), b * x))
        kept[self._rows] = source[self._last]
        # Tap by tap in float32, so that a token has the same bits in any batch and any chunk.
        total = source[self._taps[:, 0]] * weight[0]
        for tap in range(1, len(weight)):
            total += source[self._taps[:, tap]] * weight[tap]
        if bias is not None:
            total += bias
        return (total * c).to(qkv.dtype)


def _places(at: Tensor, sequence: Tensor, start: Tensor, seen: int, num_rows: int) -> Tensor:
    """Where tokens of a step lie in the source: those in front of their sequence's `start` at its row."""
    return torch.where(at < start, sequence * seen + at - start + seen, num_rows * seen + at)
