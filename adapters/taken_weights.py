"""Hands out the loaded weights of a layer, each once."""

from __future__ import annotations

from torch import Tensor

from microvllm.adapters.spec import ModelSpec
from microvllm.ops.operators import Norm, Operators
from microvllm.ops.sharding import Ranks


class TakenWeights:
    """The weights under a prefix, such as those of one layer: `tensors.LayerWeights`.

    Each is taken out of the dictionary, so that plain and packed copies of all never exist together.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        operators: Operators,
        prefix: str,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self._spec, self._weights, self._dtype = spec, weights, operators.activation_dtype
        self._prefix = prefix

    def matrix(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self._weights.pop(self._prefix + name), self._weights.pop(f"{self._prefix}{name}_bias", None)

    def vector(self, name: str) -> Tensor | None:
        return self._weights.pop(self._prefix + name, None)

    def norm(self, name: str) -> Norm | None:
        weight = self.vector(name)
        if weight is None:
            return None
        if self._spec.norm_offset:
            # In float32: near 1, bfloat16 would keep only the first digits of what was trained.
            return weight.float() + self._spec.norm_offset, self._spec.rms_norm_eps
        return weight.to(self._dtype), self._spec.rms_norm_eps
