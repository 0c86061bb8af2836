"""Copies the states of rows, to begin a request from a checkpoint and to keep one."""

from __future__ import annotations

from collections.abc import Sequence

from microvllm.ops.attention import AttentionBackend
from microvllm.ops.attention.mixed import MixedAttention
from microvllm.ops.row_states import StatesByRow


def copy_states(attention: AttentionBackend, copies: Sequence[tuple[int, int]]) -> None:
    """In every layer that keeps states, those of the first row of each pair to the second, in turn."""
    if not copies or not isinstance(attention, MixedAttention):
        return
    for backend in attention.backends:
        if isinstance(backend, StatesByRow):
            for source, target in copies:
                backend.copy_row(source, target)
