"""The results of a job as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..records import Record
from ..records.selection.gpu import choose
from ..terminal.text import duration, table
from .tasks import Task


def summary(tasks: Sequence[Task], finals: Sequence[Record]) -> list[str]:
    """A table of DEFAULT and the best decisions that hold, followed by the tasks that keep DEFAULT."""
    families: dict[tuple, list[Task]] = {}
    for task in tasks:
        families.setdefault(task.family, []).append(task)
    rows, kept = [], []
    for family in families.values():
        mine = [f for task in family for f in finals if (f.op, f.types, f.shape) == (task.op, task.types, task.shape)]
        holding = choose(mine).records
        if not holding:
            count = len({tuple(sorted(f.decisions.items())) for f in mine})
            measured = f"the best of {count} did not hold" if mine else "no candidate was faster"
            title = ", ".join(task.title for task in family)
            kept.append(f"{title}: DEFAULT stays: {measured}")
        for task in family:
            for best in (f for f in holding if f.shape == task.shape):
                rows += [[task.title, *cells] for cells in _cells(task, best)]
    # A GPU has no threads to choose.
    header = ["kernel and size", "threads", "DEFAULT", "tuned", "ratio", "of roof"]
    if all(task.stage for task in tasks):
        header, rows = header[:1] + header[2:], [row[:1] + row[2:] for row in rows]
    return [*(table(header, rows) if rows else []), *kept]


def _cells(task: Task, best: Record) -> list[list[str]]:
    found = []
    for threads, speedup in best.speedups.items():
        tuned = statistics.median(best.seconds[threads])
        default = statistics.median(best.default_seconds[threads])
        share = best.roof[threads] / tuned
        found.append([str(threads), duration(default), duration(tuned), f"{speedup:.2f}", f"{share:.2f}"])
    return found
