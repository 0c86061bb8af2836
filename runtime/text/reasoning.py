"""Follows the reasoning of an output by its token ids: where it begins and ends, and how long it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Place:
    """Where an output is: `inside` the reasoning, or else where it `may_begin` or not.

    `count` tokens of reasoning came so far, the tags aside. `matched` tokens of the tag that comes next stand
    at the end, and as many as `repeated` of one that begins the reasoning once more, None for no such tag.
    """

    inside: bool = False
    may_begin: bool = True
    count: int = 0
    matched: int = 0
    repeated: int | None = None


class ReasoningTags:
    """The tags around the reasoning; `begun`, or without a `start`: an output begins within it.

    With `blank`, the ids of white space, it begins where the output does or behind reasoning, for elsewhere a
    tag is a part of the text; None: wherever the tag stands. Some models repeat the tag that the prompt ends
    in, which is no reasoning.
    """

    def __init__(
        self, start: Sequence[int], end: Sequence[int], blank: Collection[int] | None, *, begun: bool
    ) -> None:
        self.start, self.end = list(start), list(end)
        self._blank = blank
        begun = begun or not start
        self.first = Place(inside=begun, repeated=0 if begun and start else None)

    def after(self, place: Place, token: int) -> Place:
        """Return where an output is behind its next token."""
        if place.inside:
            return self._inside(place, token)
        if not place.may_begin:
            return place
        if self._blank is None:
            matched = _matched(self.start, place.matched, token)
        elif token == self.start[place.matched]:
            matched = place.matched + 1
        elif not place.matched and token in self._blank:
            return place
        else:
            return replace(place, may_begin=False)
        if matched == len(self.start):
            return Place(inside=True, count=place.count)
        return replace(place, matched=matched)

    def _inside(self, place: Place, token: int) -> Place:
        count, repeated = place.count + 1, place.repeated
        if repeated is not None:
            if token == self.start[repeated]:
                repeated += 1
            elif repeated or token not in (self._blank or ()):
                repeated = None
            if repeated == len(self.start):
                return Place(inside=True, count=count - repeated)
        matched = _matched(self.end, place.matched, token)
        if matched == len(self.end):
            return Place(count=count - matched, may_begin=bool(self.start))
        return Place(inside=True, count=count, matched=matched, repeated=repeated)


def _matched(sequence: Sequence[int], matched: int, token: int) -> int:
    """Return how much of `sequence` stands at the end of `sequence[:matched]` and `token`."""
    tail = [*sequence[:matched], token]
    return next(size for size in range(len(tail), -1, -1) if tail[len(tail) - size :] == sequence[:size])
