"""Describes which experts of a layer a token goes to, and with what weights. Imports no torch."""

from __future__ import annotations

import msgspec


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """Top-k routing (Shazeer et al., 2017, arXiv:1701.06538).

    A token's scores are the softmax or, with `sigmoid`, the sigmoid of its router's logits. It goes to the
    `num_chosen` experts of the highest scores; their weights are these scores, divided by their sum and
    `smallest_sum` if `normalized`, times `scale`. A stored correction is added to scores for the choice
    alone. Of several groups, experts side by side, only the `num_chosen_groups` with the highest sums of
    their two best scores take part (DeepSeek-V3, arXiv:2412.19437).
    """

    num_chosen: int
    sigmoid: bool = False
    normalized: bool = True
    smallest_sum: float = 1e-20  # sigmoids may all be 0
    scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1
