"""Names the mixers that keep a state of fixed size for each request. Imports no torch."""

from __future__ import annotations

from typing import TypeAlias

from microvllm.adapters.delta_net import GatedDeltaNet
from microvllm.adapters.short_conv import ShortConv

StatefulMixer: TypeAlias = GatedDeltaNet | ShortConv
