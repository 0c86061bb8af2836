"""Names the kinds of mixers that keep a state, for the types of specs. Imports no torch."""

from __future__ import annotations

from typing import TypeAlias

from microvllm.adapters.delta_net import GatedDeltaNet
from microvllm.adapters.mamba2 import Mamba2
from microvllm.adapters.nothing import Nothing
from microvllm.adapters.short_conv import ShortConv

StatefulKind: TypeAlias = GatedDeltaNet | Mamba2 | ShortConv | Nothing
