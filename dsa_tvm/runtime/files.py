"""Writing files whole, wherever a path leads, and directories for what is needed for a while only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

#: Errors of a directory where an existing file can be written all the same: a mount, or missing permissions.
_NO_NEW_FILES = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)
_SCRATCH_PREFIX = "dsa-tvm.scratch."
#: What `tempfile.mkdtemp` puts behind a prefix.
_SCRATCH_NAME = re.compile(re.escape(_SCRATCH_PREFIX) + "[a-z0-9_]{8}")


def write_atomically(path: Path, data: bytes, mode: int = 0o644, *, in_place: bool = False) -> None:
    """Make `data` what is read from `path`.

    A regular file is replaced as a whole: a reader sees the old content or the new one. Symbolic links stay, and what
    they lead to is written. FIFOs, terminals and device nodes get the bytes themselves.

    Parameters
    ----------
    path : Path
        Its directories are made.
    data : bytes
    mode : int
        Permissions of a new file, less the process's umask. A file that exists keeps its own.
    in_place : bool
        Overwrite a file that cannot be replaced, such as one that is mounted into a container. A reader, or a kill in
        the middle, may then find half of it.

    Raises
    ------
    OSError
        A regular file that can be replaced is as before.
    """
    if (descriptor := _inherited(path)) is not None:
        # A shell's redirection: opening it anew would start at the file's beginning.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        _write_all(descriptor, data)
        return
    kept = _status(path)
    if kept is not None and not stat.S_ISREG(kept.st_mode):
        _write_in_place(path, data)
        return
    # Of a link, what it leads to is replaced.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _about(path):
            _replace(path, data, mode, kept)
    except OSError as error:
        # Something is mounted there, or the directory takes no new files.
        if not in_place or kept is None or error.errno not in _NO_NEW_FILES:
            raise
        _write_in_place(path, data)


def expect_writable(path: Path) -> None:
    """Find out before long work whether `write_atomically`, in place if need be, will do.

    Raises
    ------
    OSError
        There is a directory at `path`, permissions forbid it, or the disk is full.
    """
    if (descriptor := _inherited(path)) is not None:
        os.fstat(descriptor)
        return
    kept = _status(path)
    if kept is not None and stat.S_ISDIR(kept.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kept is not None:
        if stat.S_ISSOCK(kept.st_mode) or not os.access(path, os.W_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if not stat.S_ISREG(kept.st_mode):
            # Opening a FIFO would wait for its reader.
            return
    try:
        expect_writable_directory(Path(os.path.realpath(path)).parent)
    except OSError as error:
        if kept is None or error.errno not in _NO_NEW_FILES:
            raise


def expect_writable_directory(directory: Path) -> None:
    """Make a directory, and find out before long work whether it takes files.

    Raises
    ------
    OSError
        It is none, permissions forbid it, or the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _about(directory):
        handle, probe = tempfile.mkstemp(dir=directory, prefix=".dsa-tvm.")
        try:
            # Some file systems find out only when the data goes to the disk that there is no room.
            os.write(handle, bytes(4096))
            os.fsync(handle)
        finally:
            os.close(handle)
            os.unlink(probe)


def sync_directory(directory: Path) -> None:
    """Put on the disk which files a directory has."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except PermissionError:  # it takes files, and does not show them
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems have nothing to sync there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Keep other processes out that ask, too; the lock is on the directory itself and ends with the process.

    Raises
    ------
    BlockingIOError
        Another one is in there.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        # Closing would not do it where a process forked meanwhile has inherited the descriptor.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory below ``$TMPDIR`` that is removed at the end.

    What killed processes of this user left there is removed first: a living process holds a lock on its directory.

    Raises
    ------
    OSError
        There is no directory for temporary files, or it is full.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    with ExitStack() as held:
        while True:
            directory = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX))
            # Another process may take it for an abandoned one before it is locked, and remove it.
            with suppress(BlockingIOError, FileNotFoundError):
                held.enter_context(owned(directory))
                if directory.exists():
                    break
        held.callback(shutil.rmtree, directory, ignore_errors=True)
        yield directory


def _remove_abandoned(parent: Path) -> None:
    with suppress(OSError):
        for entry in os.scandir(parent):
            if not _SCRATCH_NAME.fullmatch(entry.name):
                continue
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                    with owned(Path(entry.path)):
                        shutil.rmtree(entry.path, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Let an error name what the caller knows, not a file beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _status(path: Path) -> os.stat_result | None:
    """Of what `path` leads to; None where there is nothing yet."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _inherited(path: Path) -> int | None:
    """The number of an open file of this process that `path` names, such as ``/dev/stdout`` or ``/dev/fd/3``."""
    place = Path(os.path.abspath(path))
    for _ in range(40):
        place = Path(os.path.realpath(place.parent)) / place.name
        if place.parent.name == "fd" and place.parent.parent == Path(f"/proc/{os.getpid()}") and place.name.isdecimal():
            return int(place.name)
        try:
            place = place.parent / os.readlink(place)
        except OSError:
            return None
    return None


def _replace(path: Path, data: bytes, mode: int, kept: os.stat_result | None) -> None:
    """Write beside `path`, sync, rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".dsa-tvm.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if kept is None:
                os.fchmod(handle, mode & ~_umask())
            else:
                with suppress(PermissionError):
                    os.fchown(handle, kept.st_uid, kept.st_gid)
                os.fchmod(handle, stat.S_IMODE(kept.st_mode))
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_directory(path.parent)


def _umask() -> int:
    # The process's mask can be read only by setting it, which other threads would see.
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def _write_in_place(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _write_all(handle, data)
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
