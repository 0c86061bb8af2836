"""How far a long piece of work has come, on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressLine:
    """Shows what share of `what` is done: a bar on a terminal, a plain line each quarter elsewhere.

    Call it with (done, total). Writes to stderr.
    """

    def __init__(self, what: str = "Loading weights") -> None:
        self._what = what
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._quarter = 0
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn(what),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # gives the cursor back, also after Ctrl-C

    def __call__(self, done: int, total: int) -> None:
        if total < 1:
            return
        if self._bar is None:
            quarter = 4 * done // total
            if quarter > self._quarter:
                self._quarter = quarter
                print(f"{self._what}: {25 * quarter} %", file=sys.stderr, flush=True)
            return
        if self._task is None:
            self._task = self._bar.add_task("work", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self._bar.stop()
