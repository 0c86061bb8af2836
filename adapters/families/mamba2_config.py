"""Reads layers of Mamba-2 from config.json. Imports no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.layers.mamba2 import Mamba2

LIMIT = "time_step_limit"
INFINITY = (math.inf, {"__float__": "Infinity"})  # the second is how transformers writes it


class MambaKeys(NamedTuple):
    """What a family calls the sizes, each with its default; without one a key must be there."""

    num_heads: tuple[str, int | None]
    head_dim: tuple[str, int | None]
    num_groups: tuple[str, int | None]
    state_size: tuple[str, int | None]
    conv_size: tuple[str, int | None]
    conv_bias: str
    bias: str


def read_mamba(config: Fields, keys: MambaKeys, eps: float) -> Mamba2:
    """The mixer; `eps`: of the norm behind. Raises `ModelFileError` naming the key at fault."""
    mixer = Mamba2(
        num_heads=config.size(*keys.num_heads),
        head_dim=config.size(*keys.head_dim),
        num_groups=config.size(*keys.num_groups),
        state_size=config.size(*keys.state_size),
        conv_size=config.size(*keys.conv_size, at_least=2),
        eps=eps,
        conv_bias=config.flag(keys.conv_bias, True),
        bias=config.flag(keys.bias),
    )
    heads, groups = keys.num_heads[0], keys.num_groups[0]
    if mixer.num_heads % mixer.num_groups:
        raise config.error(heads, f"{mixer.num_heads} is not a multiple of {groups} {mixer.num_groups}")
    limit = config.get(LIMIT)
    if limit is not None and not (
        isinstance(limit, list) and len(limit) == 2 and limit[0] == 0 and limit[1] in INFINITY
    ):
        raise config.error(LIMIT, f"other than [0.0, Infinity] is not supported, got {shorten(limit)}")
    return mixer
