"""Remember which files had the right digest, until the next reboot.

Hashing a library of 3 MB takes 1.5 ms, and one with CUDA kernels takes longer. The first process of a user does it for
all others. It records the state of the file: device, inode, size, and the times of its last change. No program can set
ctime back. The record is an empty file in a folder in memory that only this user can write. Without such a folder every
process hashes for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path

#: Within one tick of the file system's clock a file may change again without new times.
_SETTLED_NS = 2_000_000_000
_here: set[str] = set()


def _folder() -> Path | None:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime, "dsa_tvm") if runtime else Path(f"/dev/shm/dsa_tvm-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    own = stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o077
    return folder if own else None


def _key(state: os.stat_result, digest: str) -> str:
    numbers = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    # Hash the digest too: it comes from a file, may be any text, and must not lead to another folder.
    return hashlib.sha256(repr((numbers, digest)).encode()).hexdigest()


def is_known(state: os.stat_result, digest: str) -> bool:
    """Whether a file in this state is known to have this digest."""
    key = _key(state, digest)
    if key in _here:
        return True
    try:
        folder = _folder()
        return folder is not None and (folder / key).exists()
    except OSError:
        return False


def remember(state: os.stat_result, digest: str) -> None:
    """Record that a file has this digest, unless it has just been changed. `state` is from before it was read."""
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) <= _SETTLED_NS:
        return
    key = _key(state, digest)
    _here.add(key)
    # There may be no memory left, or no folder.
    with contextlib.suppress(OSError):
        if folder := _folder():
            (folder / key).touch(mode=0o600)
