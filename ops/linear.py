"""Matrix products with weights that are packed once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

# oneDNN lays a weight out for the number of rows it is told to expect. Measured over 1 to 256 rows, a
# layout chosen for a few dozen is within 3 % of the best at one row and beats one chosen for a single
# row everywhere else.
_PACKED_FOR_ROWS = 32


class Linear:
    """y = x @ weight.T + bias + residual.

    x: [n, in], weight: [out, in], bias: [out] or None, residual: [n, out] or None, all one dtype.
    On a CPU that computes in the weight's dtype, the weight is reordered for oneDNN here (and the plain
    copy is dropped by the caller), so that no step pays for it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = _can_pack(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._weight = weight

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        else:
            y = linear(x, self._weight, self._bias)
        return y if residual is None else y.add_(residual)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # Where the CPU has no bf16 arithmetic, oneDNN refuses; torch's own kernels work there, slowly.
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
