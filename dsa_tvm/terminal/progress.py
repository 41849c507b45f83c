"""Show on standard error how far a long command has come: as a bar on a terminal with rich, otherwise as lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """A counter of steps, used as a context manager.

    Parameters
    ----------
    total : int
        How many times `step` will be called.
    estimate : bool
        Whether the steps are similar enough to estimate the time that is left.
    """

    def __init__(self, total: int, estimate: bool = False) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()
        self._skipped, self._estimate = 0, estimate
        self._bar: Any = _rich_bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task("", total=total) if self._bar else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, what: str) -> None:
        """Begin the next step and show `what` it does."""
        elapsed = time.monotonic() - self._start
        if self._estimate and self._done > self._skipped:
            left = elapsed / (self._done - self._skipped) * (self._total - self._done)
            what = f"{what}, {left / 60:.0f} min left"
        if self._bar:
            self._bar.update(self._task, description=what, completed=self._done)
            self._bar.refresh()
        else:
            print(f"[{self._done + 1}/{self._total}] {elapsed:5.1f} s  {what}", file=sys.stderr, flush=True)
        self._done += 1

    def advance(self, steps: int) -> None:
        """Count steps that an earlier run has done."""
        self._done += steps
        self._skipped += steps

    def say(self, line: str) -> None:
        """Print a line of the result on standard output, clear of the bar."""
        if self._bar:
            self._bar.stop()
        print(line, flush=True)
        if self._bar:
            self._bar.start()


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    return Bar(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
        # A thread that redraws would disturb what is being measured.
        auto_refresh=False,
        # Standard output may go to a file while the bar is on the terminal.
        redirect_stdout=False,
        redirect_stderr=False,
    )
