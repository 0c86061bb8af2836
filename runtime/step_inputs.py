"""From a plan to the tensors that a step computes on, for either device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, SegmentTable
from microvllm.runtime.logits import on_device
from microvllm.runtime.scheduler import ScheduledRequest
from microvllm.runtime.transfer import Stager

UNKNOWN = -1  # stands for an input token that only the row knows yet


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step on the host; single tokens come first, because the attention takes all of them at once.

    ids, rows, positions, slots: [n], of every token; starts, lengths, context: [number of requests].
    """

    ids: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    request_rows: np.ndarray
    lengths: np.ndarray
    context: np.ndarray
    num_decodes: int

    @classmethod
    def of(cls, items: Sequence[ScheduledRequest], block_tables: np.ndarray, block_size: int) -> StepArrays:
        """block_tables: [rows, width], the blocks of every row."""
        request_rows = np.array([item.request.row for item in items])
        starts = np.array([item.start for item in items])
        lengths = np.array([item.num_new for item in items])
        rows, positions = request_rows, starts
        if (total := int(lengths.sum())) > len(items):
            firsts = np.cumsum(lengths) - lengths
            rows = np.repeat(request_rows, lengths)
            positions = np.repeat(starts - firsts, lengths) + np.arange(total)
        blocks = block_tables[rows, positions // block_size]
        return cls(
            np.array(_known_ids(items)),
            rows,
            positions,
            blocks * block_size + positions % block_size,
            request_rows,
            lengths,
            starts + lengths,
            int((lengths == 1).sum()),
        )


def _known_ids(items: Sequence[ScheduledRequest]) -> list[int]:
    """The tokens of a step; the one in flight, always a lone one, is UNKNOWN."""
    ids: list[int] = []
    for item in items:
        known = item.request.token_ids
        if item.start + item.num_new <= len(known):
            ids += known[item.start : item.start + item.num_new]
        else:
            ids.append(UNKNOWN)
    return ids


class StepInputs(Protocol):
    """Makes a step's tensors on one device; owns the newest token of every row, [rows] int64, there."""

    @property
    def newest(self) -> Tensor: ...

    def set_newest(self, rows: np.ndarray, tokens: Tensor) -> None:
        """The rows' newest tokens, [m] int64.

        NO_TOKEN becomes 0: a request without finite logits ends at commit, but its next step may be launched
        before.
        """
        ...

    def make(self, arrays: StepArrays, block_tables: np.ndarray) -> tuple[Tensor, AttentionBatch]:
        """-> token ids [n], and where their keys and values go and lie."""
        ...

    def is_clean(self, row: int) -> bool:
        """Whether nothing is left of the row's former owner, as far as that can be seen without waiting."""
        ...

    def clear_row(self, row: int) -> None: ...


class HostInputs:
    """On the CPU the tensors are the arrays."""

    def __init__(self, num_rows: int, block_size: int) -> None:
        self._newest = np.zeros(num_rows, np.int64)
        self.newest = torch.from_numpy(self._newest)
        self._block_size = block_size

    def set_newest(self, rows: np.ndarray, tokens: Tensor) -> None:
        self._newest[rows] = np.maximum(tokens.numpy(), 0)

    def make(self, arrays: StepArrays, block_tables: np.ndarray) -> tuple[Tensor, AttentionBatch]:
        ids = torch.from_numpy(arrays.ids)
        if (arrays.ids == UNKNOWN).any():
            ids = torch.where(ids == UNKNOWN, self.newest[torch.from_numpy(arrays.rows)], ids)
        decodes = arrays.num_decodes
        widest = -(-int(arrays.context[:decodes].max(initial=0)) // self._block_size)
        table = None
        if decodes < len(arrays.lengths):
            lengths, context = arrays.lengths[decodes:], arrays.context[decodes:]
            width = -(-int(context.max()) // self._block_size)
            table = SegmentTable(
                torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))),
                torch.from_numpy(context),
                torch.from_numpy(block_tables[arrays.request_rows[decodes:], :width]),
                int(lengths.max()),
            )
        batch = AttentionBatch(
            positions=torch.from_numpy(arrays.positions),
            slots=torch.from_numpy(arrays.slots),
            num_decodes=decodes,
            decode_blocks=torch.from_numpy(block_tables[arrays.request_rows[:decodes], :widest]),
            decode_lens=torch.from_numpy(arrays.context[:decodes]),
            segments=(),
            segment_table=table,
        )
        return ids, batch

    def is_clean(self, row: int) -> bool:
        return int(self.newest[row]) == 0

    def clear_row(self, row: int) -> None:
        self.newest[row] = 0


class DeviceInputs:
    """On a GPU all arrays of a step travel in one transfer that nobody waits for."""

    def __init__(self, num_rows: int, block_size: int, device: torch.device) -> None:
        self.newest = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._block_size = block_size
        self.stager = Stager(device)

    def set_newest(self, rows: np.ndarray, tokens: Tensor) -> None:
        at = on_device(rows, torch.int64, self.newest.device)
        self.newest.index_copy_(0, at, tokens.clamp(min=0))

    def make(self, arrays: StepArrays, block_tables: np.ndarray) -> tuple[Tensor, AttentionBatch]:
        decodes = arrays.num_decodes
        widths = -(-arrays.context // self._block_size)
        decode_width = int(widths[:decodes].max()) if decodes else 1
        segment_width = int(widths[decodes:].max()) if decodes < len(widths) else 1
        starts = np.concatenate(([0], np.cumsum(arrays.lengths[decodes:])))
        ids, rows, positions, slots, context, decode_blocks, seg_starts, seg_blocks = self.stager.send(
            arrays.ids,
            arrays.rows,
            arrays.positions,
            arrays.slots,
            arrays.context,
            block_tables[arrays.request_rows[:decodes], :decode_width],
            starts,
            block_tables[arrays.request_rows[decodes:], :segment_width],
        )
        table = SegmentTable(
            seg_starts, context[decodes:], seg_blocks, int(arrays.lengths[decodes:].max(initial=0))
        )
        batch = AttentionBatch(positions, slots, decodes, decode_blocks, context[:decodes], (), table)
        if (arrays.ids == UNKNOWN).any():
            ids = torch.where(ids == UNKNOWN, self.newest[rows], ids)
        return ids, batch

    def is_clean(self, row: int) -> bool:
        return True  # to look would be to wait for the device

    def clear_row(self, row: int) -> None:
        self.newest[row].zero_()
