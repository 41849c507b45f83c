"""The same work done by others, each in the fastest form it offers: on a CPU, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Skipped(Exception):
    """Why a peer does not run."""


@dataclass(frozen=True)
class Peer:
    """One peer's call.

    Parameters
    ----------
    call : callable
        Takes nothing; does the work, or enqueues it on a GPU.
    result : callable, optional
        Takes what `call` returned, and gives the operator's first output as `check.Checker.peer` takes it. None: what
        it returned does not say enough to be checked.
    product : str
        The element type that it multiplies in, if one can be told.
    """

    call: Callable[[], Any]
    result: Callable[[Any], Any] | None = lambda x: x
    product: str = ""
