"""What the builders of candidates for CPUs and GPUs have in common."""

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
    """Builds the candidates of a job while it runs. It has most of what a `source.Source` needs.

    Parameters
    ----------
    workers : Workers
        Processes that compile.
    directory : Path
        For files that are made; the caller removes it.
    seconds : float
        Time limit of one compilation.
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
        """The library of each proposal, by its position, or the error that left it without one. Any order."""

    def default(self, task: Task) -> dict[str, int]:
        """DEFAULT of the task's kernel as plain values."""
        return asdict(self.space(task).DEFAULT[task.target])

    def search(self, task: Task, seed: int, batch: int) -> Search:
        """A search over the decisions of the task's kernel."""
        return Search(task.op, self.space(task), task.target, seed=seed, batch=batch)

    def discard(self, library: Path) -> None:
        """Remove a library: a job makes thousands."""
        library.unlink()

    def _path(self, task: Task, suffix: str) -> Path:
        """A new name each time, because the loader would take a library of an old name for the loaded one."""
        return self._directory / f"{task.op}.{next(self._numbers)}{suffix}"

    @staticmethod
    def _expected(task: Task, built: Iterator[tuple[int, Path | WorkerError]]) -> Path:
        """The library of DEFAULT, the only one in `built`.

        Raises
        ------
        DsaError
            It did not compile or link.
        """
        ((_, outcome),) = built
        if isinstance(outcome, WorkerError):
            raise no_default(task.title, outcome)
        return outcome
