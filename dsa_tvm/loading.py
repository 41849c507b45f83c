"""Shared libraries loaded from the very file that was checked, whatever happens to its path meanwhile."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import stat
import tempfile
from pathlib import Path

#: What the loader knows libraries as. It takes a library of a known name for the one that it has.
_names: set[str] = set()


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
        raise FileNotFoundError(f"not a regular file: {os.fspath(path)!r}")
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
        Taken over.
    path : str
        What it was opened as, for a process that cannot read its own ``/proc``.

    Raises
    ------
    OSError
        The loader refuses it, or, without ``/proc``, the path has come to lead to another file.
    """
    try:
        # Whoever closes all descriptors of a process closes ours too; their numbers come again then.
        while (name := f"/proc/{os.getpid()}/fd/{descriptor}") in _names:
            higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, descriptor + 1)
            os.close(descriptor)
            descriptor = higher
        if not _is_same(descriptor, name):
            if not _is_same(descriptor, path):
                raise OSError(f"{path}: was replaced while it was loaded")
            name = path
        library = ctypes.CDLL(name)
    except BaseException:
        os.close(descriptor)
        raise
    if name == path:
        os.close(descriptor)
    else:
        _names.add(name)
    return library


def load_checked(path: str, digest: str) -> ctypes.CDLL:
    """Load a file if it has this digest. A process may load thousands in this way: none keeps a descriptor.

    Raises
    ------
    ValueError
        It has another digest.
    OSError
        It cannot be read, or the loader refuses it.
    """
    descriptor = open_file(path)
    try:
        if (actual := sha256(descriptor)) != digest:
            raise ValueError(f"expected sha256 {digest}, got {actual} at {path}")
        # A name of its own in the loader, because the number of the descriptor will be used again.
        with tempfile.TemporaryDirectory(prefix="dsa-tvm-") as directory:
            link = Path(directory, Path(path).name)
            link.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
            return ctypes.CDLL(str(link))
    finally:
        os.close(descriptor)


def _is_same(descriptor: int, path: str) -> bool:
    """Whether a path leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
