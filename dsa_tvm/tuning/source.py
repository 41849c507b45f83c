"""Where the candidates of a job come from: compiled here during the job, or built elsewhere before it."""

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
    """Proposes decisions, and may learn from their measured speedups."""

    def covers(self, decisions: Decisions) -> bool:
        """Whether it could propose these decisions."""
        ...

    def ask(self) -> list[dict[str, int]]:
        """Up to a batch of decisions that were neither told nor skipped; none when there are no more."""
        ...

    def tell(self, trials: list[tuple[Decisions, float | None]]) -> None:
        """Learn speedups over DEFAULT; None stands for a failed candidate."""
        ...

    def skip(self, decisions: Decisions) -> None:
        """Do not propose these decisions any more, although their speedup is not known."""
        ...


class Source(Protocol):
    """Gives candidates as files that a worker measures."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the other packages that make the candidates."""
        ...

    def default(self, task: Task) -> dict[str, int]:
        """DEFAULT of the task's kernel as plain values."""
        ...

    def search(self, task: Task, seed: int, batch: int) -> Proposer:
        """What proposes candidates for a task and the others of its family."""
        ...

    def libraries(self, task: Task, proposals: Sequence[Decisions]) -> Iterator[tuple[int, Path | WorkerError]]:
        """The library of each proposal, by its position, or the error that left it without one. Any order."""
        ...

    def request(self, task: Task, library: Path, effort: Effort, remote: Remote | None) -> Request:
        """The request with which a worker measures a library."""
        ...

    def discard(self, library: Path) -> None:
        """Called when the job no longer needs a library."""
        ...
