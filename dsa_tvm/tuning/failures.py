"""What went wrong with a candidate, and whether that was its own fault or that of its surroundings.

A full disk, missing memory and a worker that somebody killed say nothing of a candidate: it is tried again, and in the
end has no record rather than a record of a failure.
"""

from __future__ import annotations

import errno
import re
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DsaError

#: The kind of a failure that is not the candidate's fault.
SURROUNDINGS = "surroundings"
#: What the system says where it has too little of something, or where a disk fails or is cleared.
EXHAUSTED = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
        *(errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE),
        # Somebody cleared the directory for temporary files.
        errno.ENOENT,
    }
)
#: Nobody's own fault sends these: the kernel that runs out of memory, an administrator, a limit of CPU time, a session
#: that ends.
FROM_OUTSIDE = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU, signal.SIGXFSZ}
)
#: What compilers, linkers, LLVM, the loader, CUDA and this package say where the disk is full or there is no memory.
_COMPLAINTS = re.compile(
    r"no space left on device|no such file or directory|disk quota exceeded|read-only file system|input/output error"
    r"|too many open files|resource temporarily unavailable|cannot create thread|killed signal terminated|signal 9\b"
    r"|cannot allocate memory|memory allocation failure|out of memory|out_of_memory|memory exhausted|std::bad_alloc"
    r"|\bMemoryError\b|\bno memory\b|fit into memory",
    re.IGNORECASE,
)
#: How often a request is tried whose worker met its surroundings, and the seconds before each further try.
PAUSES = (1.0, 5.0)


def complaint(words: str) -> str:
    """The first line of `words` in which a program complains of a full disk, missing memory and the like; or ""."""
    return next((line for line in words.splitlines() if _COMPLAINTS.search(line)), "")


class WorkerError(DsaError):
    """A request failed.

    Parameters
    ----------
    kind : str
        Type of the exception in the worker; ``"crashed"`` or ``"timed out"`` where the worker itself went;
        `SURROUNDINGS` where the disk was full, there was no memory, or somebody else ended the worker.
    message : str
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        # A compiler's exit status does not tell a wrong program from a full disk: only its words do.
        told = kind not in ("CheckError", "timed out") and complaint(message)
        self.kind = SURROUNDINGS if told else kind

    @property
    def is_surroundings(self) -> bool:
        """Whether what was asked for has not happened: asking again may go well."""
        return self.kind == SURROUNDINGS


def patiently(action: Callable[[], Any], pauses: Sequence[float] = (0.0, *PAUSES)) -> Any:
    """Do something until its outcome is not that it met its surroundings, waiting before each try.

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
