"""A causal convolution over the last tokens of each channel, then SiLU, in plain torch: the reference.

It stands in front of recurrences over states. A row keeps the tokens that later ones will see, the newest
last: [size - 1, channels]. A weight is [channels, size], the newest token last, a bias [channels] or None.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def convolve_decodes(
    kept: Tensor, rows: Tensor, begins: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x: [b, channels], one token of each of these rows of `kept` -> [b, channels]; their windows move on.

    kept: [all rows, size - 1, channels]; begins: [b, 1, 1], a row's window counts for nothing.
    """
    window = torch.cat((kept[rows].masked_fill(begins, 0), x[:, None]), 1)
    kept[rows] = window[:, 1:]
    total = (window * weight.T).sum(1)
    return silu(total if bias is None else total + bias)


def convolve_segment(kept: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [t, channels], neighbouring tokens -> [t, channels]; the window `kept` of their row moves on."""
    window, count = torch.cat((kept, x)), len(x)
    total = torch.stack([window[i : i + count] * weight[:, i] for i in range(weight.shape[1])]).sum(0)
    kept.copy_(window[count:])
    return silu(total if bias is None else total + bias)
