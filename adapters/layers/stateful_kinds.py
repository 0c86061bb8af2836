"""Names the kinds of mixers that keep a state, for the types of specs. Imports no torch."""

from __future__ import annotations

from typing import TypeAlias

from microvllm.adapters.layers.delta_net import GatedDeltaNet
from microvllm.adapters.layers.mamba2 import Mamba2
from microvllm.adapters.layers.nothing import Nothing
from microvllm.adapters.layers.short_conv import ShortConv

StatefulKind: TypeAlias = GatedDeltaNet | Mamba2 | ShortConv | Nothing
