"""Where a job's candidates come from: compiled here while it runs, or built elsewhere before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from .failures import WorkerError
from .fleet import Remote
from .tasks import Effort, Task
from .workers import Request

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
