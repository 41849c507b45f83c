"""Why a candidate failed, and whether that was its own fault or that of its surroundings.

A full disk, too little memory or a killed worker say nothing about a candidate. It is tried again. If that fails too,
it gets no record instead of a record of a failure.
"""

from __future__ import annotations

import errno
import re
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DsaError

#: The kind of failure that is not the fault of the candidate.
SURROUNDINGS = "surroundings"
#: Errors of a system that has run out of something, or whose disk failed or was cleared.
EXHAUSTED = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
        *(errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE),
        # Somebody has cleared the directory for temporary files.
        errno.ENOENT,
    }
)
#: Signals from outside: from the kernel when memory runs out, from an administrator, from a limit on CPU time, or at
#: the end of a session.
FROM_OUTSIDE = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU, signal.SIGXFSZ}
)
#: What compilers, linkers, LLVM, the loader, CUDA and this package say when the disk is full or memory runs out.
_COMPLAINTS = re.compile(
    r"no space left on device|no such file or directory|disk quota exceeded|read-only file system|input/output error"
    r"|too many open files|resource temporarily unavailable|cannot create thread|killed signal terminated|signal 9\b"
    r"|cannot allocate memory|memory allocation failure|out of memory|out_of_memory|memory exhausted|std::bad_alloc"
    r"|\bMemoryError\b|\bno memory\b|fit into memory",
    re.IGNORECASE,
)
#: Seconds to wait before each further try of a request that failed because of its surroundings.
PAUSES = (1.0, 5.0)


def complaint(words: str) -> str:
    """The first line of `words` that complains about a full disk, too little memory and the like, or ""."""
    return next((line for line in words.splitlines() if _COMPLAINTS.search(line)), "")


class WorkerError(DsaError):
    """A request failed.

    Parameters
    ----------
    kind : str
        Type of the exception in the worker, ``"crashed"`` or ``"timed out"`` if the worker itself ended, or
        `SURROUNDINGS` if the disk was full, memory ran out, or somebody else ended the worker.
    message : str
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        # The exit status of a compiler does not tell a wrong program from a full disk. Only its messages do.
        told = kind not in ("CheckError", "timed out") and complaint(message)
        self.kind = SURROUNDINGS if told else kind

    @property
    def is_surroundings(self) -> bool:
        """Whether the surroundings were at fault, so that another try may succeed."""
        return self.kind == SURROUNDINGS


def patiently(action: Callable[[], Any], pauses: Sequence[float] = (0.0, *PAUSES)) -> Any:
    """Try something again, after a pause, as long as its surroundings make it fail.

    Parameters
    ----------
    action : callable
        Its result may be a `WorkerError`.
    pauses : sequence of float
        Seconds before each try.

    Returns
    -------
    The last result.
    """
    for pause in pauses:
        time.sleep(pause)
        outcome = action()
        if not (isinstance(outcome, WorkerError) and outcome.is_surroundings):
            break
    return outcome


def no_default(title: str, outcome: WorkerError) -> DsaError:
    """The error for a task without a library of DEFAULT."""
    what = "DEFAULT was not compiled" if outcome.is_surroundings else "DEFAULT does not compile"
    return DsaError(f"tune: {title}: {what}: {outcome}")


#: A job stops when this many candidates in a row could not be tried.
_MOST_LOST = 3


class Losses:
    """Counts candidates that could not be tried because the disk was full, memory ran out, or a worker was killed.

    They get no record, because nothing is known about them. A few do not stop a job, but several in a row do.

    Parameters
    ----------
    say : callable
        Takes a line of text for every lost candidate.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._row = say, 0

    def add(self, title: str, outcome: WorkerError) -> None:
        """Count a lost candidate.

        Raises
        ------
        DsaError
            It is the last of too many in a row.
        """
        self._row += 1
        if self._row == _MOST_LOST:
            raise DsaError(
                f"tune: {title}: {_MOST_LOST} candidates in a row could not be tried; the last: {outcome}; "
                "measurements are kept, and the same command continues from there"
            )
        self._say(f"{title}: a candidate could not be tried and has no record: {outcome}")

    def end(self) -> None:
        """Note that a candidate could be tried."""
        self._row = 0


def failure(outcome: Any) -> str:
    """Why a candidate has no library or no time, as its record says it."""
    if outcome.kind == "CheckError":
        return f"wrong result: {outcome}"
    return str(outcome) if outcome.kind in ("crashed", "timed out") else f"{outcome.kind}: {outcome}"
