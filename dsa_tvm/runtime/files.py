"""Write files whole, wherever their path leads, and make directories for temporary files."""

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

from ..errors import ArgumentError, DsaError

#: A directory gives these errors although an existing file in it can be written: a mount, or missing permissions.
_NO_NEW_FILES = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)
_SCRATCH_PREFIX = "dsa-tvm.scratch."
#: `tempfile.mkdtemp` adds eight characters to a prefix.
_SCRATCH_NAME = re.compile(re.escape(_SCRATCH_PREFIX) + "[a-z0-9_]{8}")


def write_atomically(path: Path, data: bytes, mode: int = 0o644, *, in_place: bool = False) -> None:
    """Write `data` to `path`.

    A regular file is replaced as a whole: a reader sees the old content or the new one. A symbolic link stays, and the
    file that it leads to is written. FIFOs, terminals and device nodes receive the bytes.

    Parameters
    ----------
    path : Path
        Missing directories are made.
    data : bytes
    mode : int
        Permissions of a new file, without those that the umask takes away. An existing file keeps its own.
    in_place : bool
        Overwrite a file that cannot be replaced, such as one that is mounted into a container. A reader may then see
        half of it, and a kill may leave half of it.

    Raises
    ------
    OSError
        The file cannot be written. A regular file that could be replaced is as it was before.
    """
    if (descriptor := _inherited(path)) is not None:
        # A shell has opened it. Opening it again would start at the beginning of the file.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        _write_all(descriptor, data)
        return
    kept = _status(path)
    if kept is not None and not stat.S_ISREG(kept.st_mode):
        _write_in_place(path, data)
        return
    # Replace the file that a link leads to, not the link.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _about(path):
            _replace(path, data, mode, kept)
    except OSError as error:
        # Something is mounted there, or the directory accepts no new files.
        if not in_place or kept is None or error.errno not in _NO_NEW_FILES:
            raise
        _write_in_place(path, data)


def expect_writable(path: Path) -> None:
    """Find out before long work whether `write_atomically` will succeed, in place if it has to.

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
            # Opening a FIFO would wait for a reader.
            return
    try:
        expect_writable_directory(Path(os.path.realpath(path)).parent)
    except OSError as error:
        if kept is None or error.errno not in _NO_NEW_FILES:
            raise


def expect_output(what: str, path: Path | None, kind: type[DsaError] = ArgumentError) -> None:
    """Refuse a file that a command is to write at its end, now and not after minutes of work.

    Parameters
    ----------
    what : str
        The command and the option, for the message.
    path : Path, optional
        None: the option was not given.
    kind : type
        Of the error.

    Raises
    ------
    DsaError
        It cannot be written.
    """
    if path is None:
        return
    try:
        expect_writable(path)
    except OSError as error:
        raise kind(f"{what}: expected a file that can be written, got {error}") from error


def write_output(what: str, path: Path, data: bytes, kind: type[DsaError] = DsaError) -> None:
    """Write what a command made to the file that its user named.

    Parameters
    ----------
    what : str
        The command and the option, for the message.
    path : Path
    data : bytes
    kind : type
        Of the error.

    Raises
    ------
    DsaError
        It cannot be written.
    """
    try:
        write_atomically(path, data, in_place=True)
    except OSError as error:
        raise kind(f"{what}: expected a file that can be written, got {error}") from error


def expect_writable_directory(directory: Path) -> None:
    """Make a directory, and find out before long work whether files can be made in it.

    Raises
    ------
    OSError
        Something else has this name, permissions forbid it, or the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _about(directory):
        handle, probe = tempfile.mkstemp(dir=directory, prefix=".dsa-tvm.")
        try:
            # Some file systems notice only when data goes to the disk that there is no room.
            os.write(handle, bytes(4096))
            os.fsync(handle)
        finally:
            os.close(handle)
            os.unlink(probe)


def sync_directory(directory: Path) -> None:
    """Write the entries of a directory to the disk."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except PermissionError:  # files can be made in it, but not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Lock a directory against other processes that use this function. The lock ends with the process.

    Raises
    ------
    BlockingIOError
        Another process holds the lock.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        # Closing alone would not unlock: a process forked meanwhile may have inherited the descriptor.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory below ``$TMPDIR`` that is removed at the end.

    Directories that killed processes of this user left there are removed first. A living process holds a lock on its
    own.

    Raises
    ------
    OSError
        There is no directory for temporary files, or it is full.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    with ExitStack() as held:
        while True:
            directory = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX))
            # Before it is locked, another process may think that it is abandoned, and remove it.
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
    """Make an error name the path that the caller knows, not that of a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _status(path: Path) -> os.stat_result | None:
    """The status of the file that `path` leads to; None if there is none yet."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _inherited(path: Path) -> int | None:
    """The descriptor that `path` names, if it names one of this process: ``/dev/stdout`` or ``/dev/fd/3``."""
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
    # os.umask reads the mask only by setting it, which other threads would notice.
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
