"""Turns the requests of a step into the tensors that it computes on, for either device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, SegmentTable
from microvllm.ops.attention.mixed import batch_of_groups
from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.worker.transfers import Stager, on_device

UNKNOWN = -1  # a token whose value is still only on the device


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step on the host; single tokens come first, because the attention takes all of them at once.

    ids, rows, positions: [n], of every token; slots: [groups, n]; request_rows, lengths, context: [number of
    requests].
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
        """block_tables: [groups, rows, width], the blocks of every row."""
        request_rows = np.array([item.request.row for item in items])
        starts = np.array([item.start for item in items])
        lengths = np.array([item.num_new for item in items])
        rows, positions = request_rows, starts
        if (total := int(lengths.sum())) > len(items):
            firsts = np.cumsum(lengths) - lengths
            rows = np.repeat(request_rows, lengths)
            positions = np.repeat(starts - firsts, lengths) + np.arange(total)
        blocks = block_tables[:, rows, positions // block_size]
        return cls(
            np.array(_known_ids(items)),
            rows,
            positions,
            np.ascontiguousarray(blocks * block_size + positions % block_size),
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
    """Makes a step's tensors on one device; owns the newest token of every row there."""

    def set_newest(self, rows: Sequence[int], tokens: Tensor) -> None:
        """The rows' newest tokens, [m] int64.

        NO_TOKEN becomes 0: a request without finite logits ends at commit, but its next step may be launched
        before.
        """
        ...

    def make(self, arrays: StepArrays, block_tables: np.ndarray) -> tuple[Tensor, AttentionBatch]:
        """-> token ids [n], where their keys and values go and lie. block_tables: [groups, rows, width]."""
        ...

    def is_clean(self, row: int) -> bool:
        """Whether nothing is left of the row's former request, as far as the host can see without waiting."""
        ...

    def clear_row(self, row: int) -> None: ...


class HostInputs:
    """Makes tensors of a step's arrays without a copy, on the CPU.

    Decode tensors are reused in place while the same requests go on within their blocks: every position, slot
    and length is one more. After streaming the weights the caches are cold, so building new tensors costs
    more than the arithmetic.
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        self._newest = [0] * num_rows
        self._block_size = block_size
        self._arrays: StepArrays | None = None  # of single tokens, behind `_made`
        self._made: tuple[Tensor, AttentionBatch] | None = None
        self._places: list[tuple[int, int, int]] = []  # where the next step's tokens would be
        self._slots: list[np.ndarray] = []  # of each group, in `_arrays`

    def set_newest(self, rows: Sequence[int], tokens: Tensor) -> None:
        for row, token in zip(rows, tokens.tolist(), strict=True):
            self._newest[row] = max(token, 0)

    def make(self, arrays: StepArrays, block_tables: np.ndarray) -> tuple[Tensor, AttentionBatch]:
        for i in (arrays.ids == UNKNOWN).nonzero()[0].tolist():
            arrays.ids[i] = self._newest[arrays.rows[i]]
        decodes = arrays.num_decodes
        widest = -(-int(arrays.context[:decodes].max(initial=0)) // self._block_size)
        rows, segments, self._slots = arrays.request_rows, [], list(arrays.slots)
        if decodes < len(arrays.lengths):
            lengths, context = arrays.lengths[decodes:], arrays.context[decodes:]
            width = -(-int(context.max()) // self._block_size)
            starts = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))))
            tables = (torch.from_numpy(table[rows[decodes:], :width]) for table in block_tables)
            common, longest = torch.from_numpy(context), int(lengths.max())
            segments = [SegmentTable(starts, common, blocks, longest) for blocks in tables]
        batch = batch_of_groups(
            torch.from_numpy(arrays.positions),
            [torch.from_numpy(slots) for slots in self._slots],
            [torch.from_numpy(table[rows[:decodes], :widest]) for table in block_tables],
            torch.from_numpy(arrays.context[:decodes]),
            segments,
            torch.from_numpy(rows),
        )
        self._arrays = None if segments else arrays
        self._made = torch.from_numpy(arrays.ids), batch
        return self._made

    def advance(self, items: Sequence[ScheduledRequest]) -> tuple[Tensor, AttentionBatch] | None:
        """What the last `make` gave, its values changed to those of this step, if nothing else has to be."""
        places = [(item.request.row, item.start, item.num_new) for item in items]
        expected, self._places = self._places, [(row, start + 1, 1) for row, start, _ in places]
        arrays = self._arrays
        if (
            arrays is None
            or places != expected
            or any(start % self._block_size == 0 for _, start, _ in places)
        ):
            return None
        # One by one: with cold caches this is faster than NumPy's operators on whole arrays.
        for i, ((row, start, _), token) in enumerate(zip(places, _known_ids(items), strict=True)):
            arrays.ids[i] = self._newest[row] if token == UNKNOWN else token
            arrays.positions[i], arrays.context[i] = start, start + 1
            for slots in self._slots:
                slots[i] += 1
        return self._made

    def is_clean(self, row: int) -> bool:
        return self._newest[row] == 0

    def clear_row(self, row: int) -> None:
        self._newest[row] = 0
        self._arrays = None  # the next request in the row has other blocks


class DeviceInputs:
    """Sends all arrays of a step to a GPU in one transfer, without waiting for it.

    `newest`: [rows] int64, what captured graphs read and write.
    """

    def __init__(self, num_rows: int, block_size: int, device: torch.device) -> None:
        self.newest = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._block_size = block_size
        self.stager = Stager(device)

    def set_newest(self, rows: Sequence[int], tokens: Tensor) -> None:
        at = on_device(rows, torch.int64, self.newest.device)
        self.newest.index_copy_(0, at, tokens.clamp(min=0))

    def make(self, arrays: StepArrays, block_tables: np.ndarray) -> tuple[Tensor, AttentionBatch]:
        decodes = arrays.num_decodes
        widths = -(-arrays.context // self._block_size)
        decode_width = int(widths[:decodes].max()) if decodes else 1
        segment_width = int(widths[decodes:].max()) if decodes < len(widths) else 1
        ids, rows, positions, context, starts, own, *others = self.stager.send(
            arrays.ids,
            arrays.rows,
            arrays.positions,
            arrays.context,
            np.concatenate(([0], np.cumsum(arrays.lengths[decodes:]))),
            arrays.request_rows,
            *arrays.slots,
            *block_tables[:, arrays.request_rows[:decodes], :decode_width],
            *block_tables[:, arrays.request_rows[decodes:], :segment_width],
        )
        groups, longest = len(block_tables), int(arrays.lengths[decodes:].max(initial=0))
        tables = [SegmentTable(starts, context[decodes:], blocks, longest) for blocks in others[2 * groups :]]
        blocks = others[groups : 2 * groups]
        batch = batch_of_groups(positions, others[:groups], blocks, context[:decodes], tables, own)
        if (arrays.ids == UNKNOWN).any():
            ids = torch.where(ids == UNKNOWN, self.newest[rows], ids)
        return ids, batch

    def is_clean(self, row: int) -> bool:
        return True  # a check would wait for the device

    def clear_row(self, row: int) -> None:
        self.newest[row].zero_()
