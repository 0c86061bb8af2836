"""Describes the tensors that a decoder is loaded into, and which part of each stored tensor goes where.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from microvllm.ops.operators import Norm
    from microvllm.ops.sharding import Ranks


# Ends the name of a tensor that is no module's weight: behind it is no ".weight", and "_bias" for ".bias".
BARE = "{bare}"
TRANSPOSED = "{transposed}"  # in front of it, where matrices are stored as [in, out]


class Shard(NamedTuple):
    """One of `size` workers that hold a model together: Shoeybi et al., 2019, arXiv:1909.08053.

    Each holds some heads, some of the MLP's inner width and some of the vocabulary, and all of the rest.
    """

    rank: int = 0
    size: int = 1

    def share(self, length: int) -> Cut:
        """Return the run of a dimension that belongs to this shard; the last one may be shorter."""
        each = -(-length // self.size)
        return Cut(length, ((min(self.rank * each, length), min((self.rank + 1) * each, length)),))

    def share_units(self, count: int, length: int) -> Cut:
        """The same of `count` units of `length` each; fewer of them than shards are held by several each."""
        if count >= self.size:
            return self.share(count * length)
        first = self.rank * count // self.size * length
        return Cut(count * length, ((first, first + length),))


WHOLE = Shard()


class Cut(NamedTuple):
    """Runs [start, stop) of a dimension of a stored tensor, which has `stored` entries there."""

    stored: int
    runs: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in self.runs]

    @property
    def size(self) -> int:
        return sum(self.lengths)

    @staticmethod
    def stacked(cuts: Sequence[Cut]) -> Cut:
        """Of a tensor that has others below each other."""
        starts = accumulate((cut.stored for cut in cuts), initial=0)
        runs = (
            (first + start, first + stop)
            for cut, first in zip(cuts, starts, strict=False)
            for start, stop in cut.runs
        )
        return Cut(sum(cut.stored for cut in cuts), tuple(runs))

    def of_runs(self, length: int) -> Cut:
        """Of a dimension that has a run of so many entries in the place of each."""
        runs = tuple((start * length, stop * length) for start, stop in self.runs)
        return Cut(self.stored * length, runs)

    def joined(self) -> Cut:
        """The same entries in as few runs as they fill."""
        runs: list[tuple[int, int]] = []
        for start, stop in self.runs:
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        return Cut(self.stored, tuple(runs))

    def in_stack(self, index: int, count: int) -> Cut:
        """Of a tensor that has `count` such ones below each other: those of the one with this index."""
        first = index * self.stored
        return Cut(count * self.stored, tuple((first + start, first + stop) for start, stop in self.runs))

    def reordered(self, length: int, order: Sequence[tuple[int, int]]) -> Cut:
        """The same entries, but those of each unit of this length in another order of runs."""
        if order == [(0, length)]:
            return self
        starts = (first for start, stop in self.runs for first in range(start, stop, length))
        return Cut(self.stored, tuple((first + run[0], first + run[1]) for first in starts for run in order))


PAIRS = "expert_pairs"


class Part(NamedTuple):
    """One tensor of the checkpoint: its role in `Family.hf_tensors`, whether it is a bias, and its rows.

    expert: the number of the expert that it belongs to, if any. Of a tensor that holds the matrices of all
    experts `stacked` says how many these are, and `rows` counts the rows of all of them. Of the role `PAIRS`
    neighbouring rows are one of gate and one of up, which come out apart: gate before up. `transposed`: the
    matrix is stored as [in, out].
    """

    role: str
    bias: bool
    rows: Cut
    expert: int | None = None
    stacked: int = 0
    transposed: bool = False

    @property
    def own_rows(self) -> Cut:
        """Its rows of its expert's matrix alone, if these are stacked."""
        each, expert = self.rows.stored // max(1, self.stacked), self.expert or 0
        return Cut(
            each, tuple((start - expert * each, stop - expert * each) for start, stop in self.rows.runs)
        )


class Slot(NamedTuple):
    """One tensor of the result, made of one or more parts below each other."""

    name: str
    parts: tuple[Part, ...]
    columns: Cut | None  # None for a vector
    layer: int = 0
    is_wide: bool = False  # a vector that is kept in float32, as no rounding of it was trained

    @property
    def is_of_experts(self) -> bool:
        return self.parts[0].expert is not None

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(part.rows.size for part in self.parts)
        return (rows,) if self.columns is None else (rows, self.columns.size)

    def stored_shape(self, part: Part) -> tuple[int, ...]:
        shape = (part.rows.stored,) if self.columns is None else (part.rows.stored, self.columns.stored)
        if not part.stacked:
            return shape
        own = shape[0] // part.stacked, *shape[1:]
        return part.stacked, *(reversed(own) if part.transposed else own)


def vector_slot(name: str, rows: int | Cut) -> Slot:
    """Return the slot of a vector of one role: all of so many elements, or a cut of them."""
    cut = WHOLE.share(rows) if isinstance(rows, int) else rows
    return Slot(name, (Part(name, False, cut),), None)


def matrix_slots(name: str, parts: Mapping[str, Cut], columns: Cut, *, bias: bool = False) -> Iterator[Slot]:
    """A weight of one or more roles below each other, and its bias if it has one."""
    yield Slot(name, tuple(Part(role, False, rows) for role, rows in parts.items()), columns)
    if bias:
        yield Slot(f"{name}_bias", tuple(Part(role, True, rows) for role, rows in parts.items()), None)


def fused(cuts: Mapping[str, Cut], names: Mapping[str, str], role: str) -> Mapping[str, Cut]:
    """The same rows in one stored tensor, if a family's names have `role` in place of the others."""
    return {role: Cut.stacked(list(cuts.values()))} if role in names else cuts


class LayerWeights(Protocol):
    """Hands out the weights of one layer, each once, by their names without the layer.

    ranks: those that hold the other parts of these weights; None if there are none.
    """

    @property
    def ranks(self) -> Ranks | None: ...

    def matrix(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A weight and its bias."""
        ...

    def vector(self, name: str) -> Tensor | None:
        """A tensor as it is; None if the layer has none of this name."""
        ...

    def norm(self, name: str) -> Norm | None:
        """The weight of an RMSNorm and its epsilon; None if the layer has no norm of this name."""
        ...
