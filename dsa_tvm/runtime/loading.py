"""Shared libraries loaded from the very file that was checked, whatever happens to its path meanwhile."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import resource
import stat
from dataclasses import dataclass

from ..errors import LibraryError

#: What the loader knows libraries as. It takes a library of a known name for the one that it has.
_names: set[str] = set()


@dataclass(frozen=True)
class CheckedFile:
    """A library that may be loaded only if it has this digest.

    Parameters
    ----------
    path : str
    sha256 : str
    """

    path: str
    sha256: str


def open_file(path: str | os.PathLike[str]) -> int:
    """Open a regular file to read it; a descriptor.

    Raises
    ------
    OSError
        It cannot be opened, or it is not a regular file.
    """
    # Opening a FIFO would wait for its writer otherwise.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "not a regular file", os.fspath(path))
    return descriptor


def sha256(descriptor: int) -> str:
    """Hex digest of an open file, from its beginning."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(descriptor: int, path: str) -> ctypes.CDLL:
    """Load an open file for as long as the process lives.

    The loader gets ``/proc/PID/fd/N`` for its name. The descriptor stays open, so that debuggers and symbolizers, which
    read the library by that name, find it; ``/proc/PID/maps`` has the path.

    Parameters
    ----------
    descriptor : int
        Belongs to this function from here on.
    path : str
        What it was opened as, for a process that cannot read its own ``/proc``.

    Raises
    ------
    LibraryError
        Without ``/proc``: the path leads to another file by now.
    OSError
        The loader refuses it.
    """
    try:
        # If the caller has closed every descriptor of the process, then ours too, and their numbers come again.
        while (name := f"/proc/{os.getpid()}/fd/{descriptor}") in _names:
            higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, descriptor + 1)
            os.close(descriptor)
            descriptor = higher
        if not _is_same(descriptor, name):
            name = path
            if not _is_same(descriptor, path):
                raise LibraryError(f"library: expected the file that was checked at {path}, got another")
        library = ctypes.CDLL(name)
    except BaseException:
        os.close(descriptor)
        raise
    if name == path:
        os.close(descriptor)
    else:
        _names.add(name)
    return library


def load_checked(file: CheckedFile) -> ctypes.CDLL:
    """Load a file if it has its digest.

    For worker processes, which load hundreds. Every file keeps a descriptor, so this raises the process's limit.

    Raises
    ------
    LibraryError
        It cannot be read, or it has another digest.
    OSError
        The loader refuses it.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        descriptor = open_file(file.path)
        actual = sha256(descriptor)
    except OSError as error:
        raise LibraryError(f"library: {error}") from error
    if actual != file.sha256:
        os.close(descriptor)
        raise LibraryError(f"library: expected sha256 {file.sha256}, got {actual} at {file.path}")
    return load(descriptor, file.path)


def _is_same(descriptor: int, path: str) -> bool:
    """Whether a path leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
