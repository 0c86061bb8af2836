"""Shows on stderr how far a long piece of work has come."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressLine:
    """Shows how much of some work is done: a bar on a terminal, a plain line each quarter elsewhere.

    See `microvllm.runtime.progress.OnProgress`; each new `what` begins a line of its own, and its `note` is
    what remains of it. Elsewhere work of one part has a line at its start and its note. Writes to stderr.
    """

    def __init__(self) -> None:
        self._what = ""
        self._quarter = -1
        self._on_terminal = sys.stderr.isatty()
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # shows the cursor again, also after Ctrl-C

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        if total < 1:
            return
        if self._on_terminal:
            self._show_bar(what, done, total, note)
            return
        if what != self._what:
            self._what, self._quarter = what, -1
        quarter = 4 * done // total
        if quarter > self._quarter and (quarter > 0 or done == 0):
            self._quarter = quarter
            line = note or (f"{what} ..." if total == 1 and not done else f"{what}: {25 * quarter} %")
            with contextlib.suppress(OSError):  # a full disk
                print(f"microvllm: {line}", file=sys.stderr, flush=True)

    def _show_bar(self, what: str, done: int, total: int, note: str) -> None:
        bar = self._bar
        if bar is None or what != self._what:
            if bar is not None:
                bar.stop()
            self._what, self._bar = what, (bar := _new_bar())
            bar.add_task(what, total=total)
            bar.start()
        bar.update(bar.task_ids[0], description=note or what, completed=done, total=total)
        if done >= total:
            bar.stop()


def _new_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
