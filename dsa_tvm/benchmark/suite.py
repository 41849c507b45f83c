"""The interface of a benchmark suite. There are two: `cpu` and `cuda`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import DsaError
from .check import Checker
from .clock import Clock
from .peers import Peer
from .workload import Workload


class LostError(DsaError):
    """The device has stopped working. Every later call in this process would fail."""


@dataclass(frozen=True)
class Case:
    """One row of the results.

    Parameters
    ----------
    op : str
    dtype : str
        Of the keys.
    s_q, s_kv : int
    threads : int, optional
        On a CPU.
    """

    op: str
    dtype: str
    s_q: int
    s_kv: int
    threads: int | None = None


class Suite(Protocol):
    """Cases of one command line on one kind of device.

    Attributes
    ----------
    cases : sequence of Case
    clock : Clock
    seconds : float
        Time for each figure.
    titles : mapping
        The name of each peer in the table.
    out_of_memory : tuple of type
        What the device or the generator of inputs raises when memory runs out.
    """

    cases: Sequence[Case]
    clock: Clock
    seconds: float
    titles: Mapping[str, str]
    out_of_memory: tuple[type[Exception], ...]

    def heading(self) -> list[str]:
        """Lines above the table, which describe the machine."""

    def document(self) -> dict[str, Any]:
        """The entries of the JSON file beside the rows."""

    def remarks(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Lines below the notes."""

    def header(self, op: str, first: bool) -> list[str]:
        """Lines above the rows of an operator. `first` tells whether it is the first operator."""

    def line(self, row: Mapping[str, Any]) -> str:
        """A row of the table."""

    def title(self, case: Case) -> str:
        """The name of a case in the progress display."""

    def blank(self, case: Case) -> dict[str, Any]:
        """A row without figures: "failed", "skipped" and "peers" are among its keys."""

    def inputs(self, case: Case) -> tuple[Workload, Checker]:
        """The inputs of a call, and the check of its results.

        Raises
        ------
        Exception
            One of `out_of_memory`.
        """

    def ours(self, case: Case, work: Workload) -> Callable[[], Any]:
        """Our call on these inputs."""

    def peers(self, op: str) -> Sequence[str]:
        """Names of those that do an operator's work."""

    def peer(self, name: str, case: Case, work: Workload) -> Peer:
        """A peer's call on these inputs.

        Raises
        ------
        Skipped
        """

    def figures(self, case: Case, work: Workload, seconds: float) -> dict[str, Any]:
        """What follows from the seconds of our call, as keys of a row."""

    def reason(self, error: Exception) -> str | None:
        """Why there are no figures after an error of our call; None where the error ends the run.

        Raises
        ------
        LostError
            As `check_alive`.
        """

    def check_alive(self, after: str) -> None:
        """Raise `LostError` where the device stopped working; `after` says what happened before."""

    def release(self) -> None:
        """Give memory back that nobody holds any more."""
