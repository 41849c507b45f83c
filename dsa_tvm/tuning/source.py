"""Where a job's candidates come from: compiled here while it runs, or built elsewhere before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import DsaError
from .fleet import Remote
from .tasks import Effort, Task
from .workers import Request, WorkerError

Decisions = Mapping[str, int]


class Proposer(Protocol):
    """Proposes decisions, and may learn from what they turned out to be worth."""

    def covers(self, decisions: Decisions) -> bool:
        """Whether these decisions are among those that it can propose."""
        ...

    def ask(self) -> list[dict[str, int]]:
        """Up to a batch of decisions that were not told yet; none when there are no more."""
        ...

    def tell(self, trials: list[tuple[Decisions, float | None]]) -> None:
        """Speedups over DEFAULT, None for what failed."""
        ...

    def skip(self, decisions: Decisions) -> None:
        """Do not propose these any more, though nothing is known of them."""
        ...


class Source(Protocol):
    """Candidates, as files that a worker measures."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Packages beside this one that the candidates are made with."""
        ...

    def default(self, task: Task) -> dict[str, int]:
        """DEFAULT of the task's kernel as plain values."""
        ...

    def search(self, task: Task, seed: int, batch: int) -> Proposer:
        """What proposes the candidates of a task, and of those of its family."""
        ...

    def libraries(self, task: Task, proposals: Sequence[Decisions]) -> Iterator[tuple[int, Path | WorkerError]]:
        """A library for each of `proposals`, in any order, or why there is none."""
        ...

    def request(self, task: Task, library: Path, effort: Effort, remote: Remote | None) -> Request:
        """What a worker is asked, to measure a library."""
        ...

    def discard(self, library: Path) -> None:
        """The job needs a library no more."""
        ...


def no_default(title: str, outcome: WorkerError) -> DsaError:
    """The error of a task whose DEFAULT there is no library of."""
    what = "DEFAULT was not compiled" if outcome.is_surroundings else "DEFAULT does not compile"
    return DsaError(f"tune: {title}: {what}: {outcome}")


#: A job stops when so many candidates in a row could not be tried.
_MOST_LOST = 3


class Losses:
    """Candidates that could not be tried, because the disk was full, there was no memory, or somebody ended a worker.

    They have no record: nothing is known of them. A few do not stop a job; several in a row do.

    Parameters
    ----------
    say : callable
        Takes a line for every candidate that was lost.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._row = say, 0

    def add(self, title: str, outcome: WorkerError) -> None:
        """Another one.

        Raises
        ------
        DsaError
            It is the last of several in a row.
        """
        self._row += 1
        if self._row == _MOST_LOST:
            raise DsaError(
                f"tune: {title}: {_MOST_LOST} candidates in a row could not be tried; the last: {outcome}; what was "
                "measured is kept, and the same command goes on from there"
            )
        self._say(f"{title}: a candidate could not be tried and has no record: {outcome}")

    def end(self) -> None:
        """One was tried."""
        self._row = 0


def failure(outcome: Any) -> str:
    """Why there is no library or no time: the reason that a record keeps."""
    if outcome.kind == "CheckError":
        return f"wrong result: {outcome}"
    return str(outcome) if outcome.kind in ("crashed", "timed out") else f"{outcome.kind}: {outcome}"
