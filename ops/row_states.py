"""States that lie at the rows of requests, whatever a layer keeps in them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionBatch


class Recurrence(Protocol):
    """What the backend of one kind of layers with a state is made for: sizes, weights, number of rows."""

    def reference(self, dtype: torch.dtype) -> AttentionBackend:
        """The backend in plain torch, with activations of this dtype."""
        ...


class StatesByRow:
    """A backend's states, each a tensor [layers, rows, ...], all of a row belonging to one request.

    A row's contents count for nothing until its request has computed position 0.
    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.states = states

    def copy_row(self, source: int, target: int) -> None:
        """Give a row the states of another, in all layers."""
        for state in self.states:
            state[:, target] = state[:, source]


class Segment(NamedTuple):
    """Tokens [start, stop) of a step, of one row; `begins`: its state counts for nothing."""

    start: int
    stop: int
    row: int
    begins: bool


class StepRows:
    """Where the sequences of a step keep their states: `decodes` of one token each, then segments of more.

    rows: [decodes] int64; begins: [decodes], whether a row's state counts for nothing, as a request that
    begins finds what the one before it in its row has left. Raises ValueError for a batch without rows.
    """

    def __init__(self, batch: AttentionBatch) -> None:
        rows = rows_of(batch).long()
        self.decodes = batch.num_decodes
        self.rows = rows[: self.decodes]
        self.begins = batch.positions[: self.decodes] == 0
        self.segments: list[Segment] = []
        if batch.segment_table is not None:
            starts = (batch.segment_table.starts + self.decodes).tolist()
            for (start, stop), row in zip(pairwise(starts), rows[self.decodes :].tolist(), strict=True):
                if start < stop:
                    self.segments.append(Segment(start, stop, row, int(batch.positions[start]) == 0))


def rows_of(batch: AttentionBatch) -> Tensor:
    """The rows of a batch. Raises ValueError if it has none."""
    if batch.rows is None:
        raise ValueError("layers with a state need the rows of the batch")
    return batch.rows


def in_chunks(x: Tensor, size: int) -> Tensor:
    """[t, H, ...] -> [chunks, H, size, ...], padded with zeros."""
    padded = torch.cat((x, x.new_zeros(-len(x) % size, *x.shape[1:])))
    return padded.view(-1, size, *x.shape[1:]).transpose(1, 2)
