"""Files of lines that several processes append to. A kill at any instant leaves them readable.

The lock is on the file itself (``flock``), so nothing has to be cleaned up after a kill. A rewrite puts a new file in
its place. A process that then gets the lock of the old file notices this and opens the new one.
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

#: The most bytes of a line. Readers cut longer lines there, so that no file can fill the memory.
MAX_LINE = 2**20


def append(path: Path, line: bytes) -> None:
    """Append a line with one write, and sync it. The time does not depend on the length of the file.

    If a killed process has left half a line, that is ended first, so that it does not swallow this one.

    Parameters
    ----------
    path : Path
        The file and its directories are made if they do not exist.
    line : bytes
        Without a newline.

    Raises
    ------
    OSError
        The line cannot be written. The file is as it was before, as far as the system allows that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        end = os.lseek(file, 0, os.SEEK_END)
        torn = end > 0 and os.pread(file, 1, end - 1) != b"\n"
        data = b"\n" * torn + line + b"\n"
        try:
            # A second write happens only if the first met a full disk. It gets the error.
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except OSError:
            # Remove half a line, or a whole line that the caller will believe to be missing.
            with suppress(OSError):
                os.ftruncate(file, end)
            raise
        if not end:
            sync_directory(path.parent)


def lines(path: Path) -> Iterator[bytes]:
    """The lines that the file has now, without their newlines. Longer lines are cut after ``MAX_LINE + 1`` bytes.

    Raises
    ------
    OSError
        The file cannot be opened or read, or it is not a regular file.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        _expect_regular(path, file.fileno())
        # Wait until nobody is appending: half a line would seem damaged. What the file holds now never changes.
        fcntl.flock(file, fcntl.LOCK_SH)
        size = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        yield from _split(file, size)


def rewrite(path: Path, change: Callable[[Iterator[bytes]], bytes]) -> None:
    """Replace a file by what `change` makes of its lines, as a whole. No line that is appended meanwhile is lost.

    Raises
    ------
    OSError
        The file cannot be written, and is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as descriptor, open(path, "rb") as file:
        status = os.fstat(descriptor)
        write_atomically(path, change(_split(file, status.st_size)), stat.S_IMODE(status.st_mode))


def expect_appendable(path: Path) -> None:
    """Find out before long work whether `append` will succeed.

    Raises
    ------
    OSError
        The file or its directory cannot be written, or the disk is full.
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
    # Even if the file exists: a full disk shows only when something is written.
    expect_writable_directory(Path(os.path.realpath(path)).parent)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A locked descriptor for appending. The file is made if it does not exist."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            _expect_regular(path, file)
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                yield file
                return
        finally:
            # Closing alone would not unlock: a process forked meanwhile may have inherited the descriptor.
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)


def _expect_regular(path: Path, file: int) -> None:
    """Refuse FIFOs and devices: reading would take the lines away."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _is_at(path: Path, file: int) -> bool:
    """Whether `path` still leads to the open file. A rewrite may have replaced it before it was locked."""
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
