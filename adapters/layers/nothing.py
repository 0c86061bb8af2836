"""What stands in a layer's spec in the place of a mixer or an MLP that the layer does not have.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from microvllm.adapters.layers.stateful import StatefulMixer
from microvllm.adapters.tensors import LayerWeights, Shard, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from microvllm.ops.attention import AttentionBackend, AttentionBatch, BackendConfig, StepAttention
    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


class Nothing(StatefulMixer, frozen=True, kw_only=True, tag="nothing"):
    """Adds nothing to the hidden states, and has neither tensors nor a norm: a mixer of an empty state."""

    out_size: ClassVar[int] = 0
    scratch_size: ClassVar[int] = 0

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        return 0

    def state_bytes(self, dtype_bytes: int) -> int:
        """Bytes of a row's state."""
        return 0

    def sharded(self, size: int) -> Nothing:
        """The same."""
        return self

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """No tensors."""
        return iter(())

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """Two operators of which the second gives the residual back."""

        def unchanged(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return x if residual is None else residual

        return unchanged, unchanged

    def kept(self, weights: LayerWeights) -> None:
        """A layer needs nothing between its products."""

    def backend(
        self, layers: Sequence[None], config: BackendConfig, operators: Operators
    ) -> AttentionBackend:
        """A backend that computes nothing."""
        return NoAttention()


class NoAttention:
    """An `AttentionBackend` that gives back what it is given."""

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        return lambda layer, qkv: qkv
