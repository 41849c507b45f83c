"""What is known about the candidates of a family: each is measured at every size, unless it fails at one."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from ..records import Record, as_key
from ..terminal.text import duration
from .source import Decisions
from .tasks import Task


class Trials:
    """The records of one kind, trials or finals.

    Parameters
    ----------
    tasks : sequence of Task
        They share a kernel.
    records : iterable of Record
        Records of these tasks; those of other sizes are ignored.
    """

    def __init__(self, tasks: Sequence[Task], records: Iterable[Record]) -> None:
        self._sizes = [as_key(task.shape) for task in tasks]
        self._found: dict[tuple, dict[tuple, Record]] = {}
        for record in records:
            if as_key(record.shape) in self._sizes:
                self.add(record)

    def add(self, record: Record) -> None:
        """Add a record. It replaces an earlier one of the same candidate and size."""
        self._found.setdefault(as_key(record.decisions), {})[as_key(record.shape)] = record

    @property
    def count(self) -> int:
        """The number of records, including those that a failed candidate does not need any more."""
        return sum(len(self._sizes) if self._is_done(of) else len(of) for of in self._found.values())

    @property
    def done(self) -> int:
        """The number of candidates that were measured at every size, or failed."""
        return sum(map(self._is_done, self._found.values()))

    def is_done(self, decisions: Decisions) -> bool:
        """Whether nothing is left to measure for a candidate."""
        return self._is_done(self._found.get(as_key(decisions), {}))

    def has(self, task: Task, decisions: Decisions) -> bool:
        """Whether a candidate was measured at this size."""
        return as_key(task.shape) in self._found.get(as_key(decisions), {})

    def begun(self) -> list[dict[str, int]]:
        """Candidates that were measured at some sizes only, because an earlier job was stopped."""
        return [dict(key) for key, of in self._found.items() if not self._is_done(of)]

    def at(self, task: Task) -> list[Record]:
        """The records of one size."""
        size = as_key(task.shape)
        return [of[size] for of in self._found.values() if size in of]

    def line(self, task: Task, wanted: int) -> str:
        """A line of progress for one size."""
        here = self.at(task)
        best = max(here, key=lambda r: r.speedup)
        line = f"{task.title}  trial {len(here)}/{wanted}"
        if not best.seconds:
            return f"{line}  no candidate has worked yet"
        threads = max(best.seconds)
        taken = duration(statistics.median(best.seconds[threads]))
        where = "" if task.stage else f" on {threads} threads"
        return f"{line}  best {taken}{where}, {best.speedup:.2f} x DEFAULT"

    def of(self, decisions: Decisions) -> list[Record]:
        """The records of one candidate, in the order of the tasks."""
        of = self._found.get(as_key(decisions), {})
        return [of[size] for size in self._sizes if size in of]

    def left_out(self, record: Record) -> int:
        """The number of sizes at which a candidate is not measured because it failed at another."""
        return len(self._sizes) - len(self._found[as_key(record.decisions)])

    def told(self, only: Sequence[Decisions] | None = None) -> list[tuple[Decisions, float | None]]:
        """The speedups of the candidates that are done, all or only some; None for a failed candidate."""
        keys = [key for key, of in self._found.items() if self._is_done(of)]
        wanted = None if only is None else {as_key(d) for d in only}
        return [(dict(key), self._speedup(key) or None) for key in keys if wanted is None or key in wanted]

    def best(self, count: int) -> list[dict[str, int]]:
        """The fastest candidates that are faster than DEFAULT."""
        speedups = {key: self._speedup(key) for key, of in self._found.items() if self._is_done(of)}
        order = sorted(speedups, key=speedups.__getitem__, reverse=True)
        return [dict(key) for key in order[:count] if speedups[key] > 1]

    def _speedup(self, key: tuple) -> float:
        ratios = [record.speedup for record in self._found[key].values()]
        return statistics.geometric_mean(ratios) if all(ratios) else 0.0

    def _is_done(self, of: dict[tuple, Record]) -> bool:
        return len(of) == len(self._sizes) or any(record.error is not None for record in of.values())
