"""Load a shared library from the very file that was checked, whatever happens to its path meanwhile."""

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

#: Names under which libraries were loaded. The loader does not load a second library under a name that it knows.
_names: set[str] = set()


@dataclass(frozen=True)
class CheckedFile:
    """A library that may only be loaded if it has this digest.

    Parameters
    ----------
    path : str
    sha256 : str
    """

    path: str
    sha256: str


def open_file(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading. Returns its descriptor.

    Raises
    ------
    OSError
        The file cannot be opened, or it is not a regular file.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "not a regular file", os.fspath(path))
    return descriptor


def sha256(descriptor: int) -> str:
    """Hex digest of a whole open file."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(descriptor: int, path: str) -> ctypes.CDLL:
    """Load an open file for as long as the process lives.

    The loader is given the name ``/proc/PID/fd/N``. The descriptor stays open, because debuggers and symbolizers read
    the library by that name. ``/proc/PID/maps`` has the path.

    Parameters
    ----------
    descriptor : int
        This function owns it from now on.
    path : str
        The path that was opened. It is used if the process cannot read its own ``/proc``.

    Raises
    ------
    LibraryError
        There is no ``/proc``, and the path now leads to another file.
    OSError
        The loader refuses it.
    """
    try:
        # If the caller has closed all descriptors of the process, their numbers are used again.
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
    """Load a file if it has the digest that it should have.

    Worker processes load hundreds of files, and each one keeps a descriptor. So this raises the limit of the process.

    Raises
    ------
    LibraryError
        The file cannot be read, or it has another digest.
    OSError
        The loader refuses the file.
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
    """Whether a path leads to the file that a descriptor is open on."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
