"""Reports how far the start of an engine has come."""

from __future__ import annotations

from time import perf_counter
from typing import Protocol


class OnProgress(Protocol):
    """Callback for start-up progress."""

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        """Report that `done` of the `total` parts of `what` are done; the last call may have a `note`."""
        ...


class Stage:
    """A piece of work in equal parts, reported to `on_progress` at its beginning and after each part."""

    def __init__(self, what: str, total: int, on_progress: OnProgress | None) -> None:
        self._what = what
        self._total = total
        self._on_progress = on_progress
        self._done = 0
        self._started = perf_counter()
        self._report()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return perf_counter() - self._started

    def advance(self) -> None:
        """Count a part; `finish` reports the last one."""
        self._done += 1
        if self._done < self._total:
            self._report()

    def finish(self, note: str) -> None:
        """Report the end with a note such as "Captured 35 graphs in 4.2 s, 1.1 GB"."""
        self._done = self._total
        self._report(note)

    def _report(self, note: str = "") -> None:
        if self._on_progress is not None:
            self._on_progress(self._what, self._done, self._total, note)
