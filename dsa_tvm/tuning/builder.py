"""What builders of candidates have in common, for whatever device they are."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import tvm

from ..schedules import space
from .failures import WorkerError, no_default
from .search import Search
from .source import Decisions
from .tasks import Task
from .workers import Workers


class CandidateBuilder(abc.ABC):
    """Builds the candidates of a job while it runs: most of a `source.Source`.

    Parameters
    ----------
    workers : Workers
        They compile.
    directory : Path
        For what is made; the caller removes it.
    seconds : float
        Limit for one compilation.
    """

    def __init__(self, workers: Workers, directory: Path, seconds: float) -> None:
        self._workers, self._directory, self._seconds = workers, directory, seconds
        self._numbers = itertools.count()
        self.versions = {"tvm": tvm.__version__}

    @abc.abstractmethod
    def space(self, task: Task) -> space.Module:
        """The decisions of the task's kernel."""

    @abc.abstractmethod
    def libraries(self, task: Task, proposals: Sequence[Decisions]) -> Iterator[tuple[int, Path | WorkerError]]:
        """A library for each of `proposals`, in any order, or why there is none."""

    def default(self, task: Task) -> dict[str, int]:
        """DEFAULT of the task's kernel as plain values."""
        return asdict(self.space(task).DEFAULT[task.target])

    def search(self, task: Task, seed: int, batch: int) -> Search:
        """MetaSchedule's, over the decisions of the task's kernel."""
        return Search(task.op, self.space(task), task.target, seed=seed, batch=batch)

    def discard(self, library: Path) -> None:
        """Remove it: a job makes thousands."""
        library.unlink()

    def _path(self, task: Task, suffix: str) -> Path:
        """Another name each time: the loader takes a library of the same name for one that it has."""
        return self._directory / f"{task.op}.{next(self._numbers)}{suffix}"

    @staticmethod
    def _expected(task: Task, built: Iterator[tuple[int, Path | WorkerError]]) -> Path:
        """The library of DEFAULT, the only one built.

        Raises
        ------
        DsaError
            It does not compile or link.
        """
        ((_, outcome),) = built
        if isinstance(outcome, WorkerError):
            raise no_default(task.title, outcome)
        return outcome
