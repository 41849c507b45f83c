"""Files of lines that several processes append to, and that a kill at any instant leaves readable.

The lock is on the file itself (``flock``), so that nothing has to be cleaned up after a kill. A rewrite puts another
file in its place; whoever then gets the lock of the old one takes the new one instead.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..runtime.files import expect_writable_directory, sync_directory, write_atomically

#: Bytes of a line. What is longer is cut there when it is read, so that no file can fill the memory.
MAX_LINE = 2**20


def append(path: Path, line: bytes) -> None:
    """Add a line in one write and sync it. The time does not depend on the length of the file.

    A line that a killed process left torn is ended first, so that it does not swallow this one.

    Parameters
    ----------
    path : Path
        Made when it does not exist, and its directories too.
    line : bytes
        Without a newline.

    Raises
    ------
    OSError
        The file is as before, as far as the system allows that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        end = os.lseek(file, 0, os.SEEK_END)
        torn = end > 0 and os.pread(file, 1, end - 1) != b"\n"
        data = b"\n" * torn + line + b"\n"
        try:
            # A second write is needed only where the first met a full disk: it gets the error's name.
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except OSError:
            # Otherwise half a line would be left, or a whole one that the caller believes not to be there.
            with suppress(OSError):
                os.ftruncate(file, end)
            raise
        if not end:
            sync_directory(path.parent)


def lines(path: Path) -> Iterator[bytes]:
    """The lines that the file has now, without their newlines; of a longer one the first ``MAX_LINE + 1`` bytes.

    Raises
    ------
    OSError
        As of `open` and reading, or it is no regular file.
    """
    # Opening a FIFO would wait for somebody who writes into it.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        _expect_regular(path, file.fileno())
        # Not while a line is being appended, which would seem torn. What the file holds now never changes later.
        fcntl.flock(file, fcntl.LOCK_SH)
        size = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        yield from _split(file, size)


def rewrite(path: Path, change: Callable[[Iterator[bytes]], bytes]) -> None:
    """Replace a file by what `change` makes of its lines: all of it or nothing, and no appended line is lost.

    Raises
    ------
    OSError
        The file is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as descriptor, open(path, "rb") as file:
        status = os.fstat(descriptor)
        write_atomically(path, change(_split(file, status.st_size)), stat.S_IMODE(status.st_mode))


def expect_appendable(path: Path) -> None:
    """Find out before long work whether `append` will do.

    Raises
    ------
    OSError
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        pass
    else:
        try:
            _expect_regular(path, file)
        finally:
            os.close(file)
    # Where there is a log already, too: a full disk shows only when something is written.
    expect_writable_directory(Path(os.path.realpath(path)).parent)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor for appending, made when it does not exist, with nobody else's beside it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            _expect_regular(path, file)
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                yield file
                return
        finally:
            # Closing would not do it where a process forked meanwhile has inherited the descriptor.
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)


def _expect_regular(path: Path, file: int) -> None:
    """Lines that were read from a FIFO or a device would be gone."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _is_at(path: Path, file: int) -> bool:
    """Whether `path` still leads to the open file: a rewrite may have replaced it before the lock was there."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _split(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (piece := file.readline(min(size, MAX_LINE + 1))):
        size -= len(piece)
        line = piece
        while size > 0 and not piece.endswith(b"\n"):
            piece = file.readline(min(size, MAX_LINE + 1))
            size -= len(piece)
        yield line.removesuffix(b"\n")
