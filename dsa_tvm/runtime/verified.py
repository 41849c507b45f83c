"""Which files had the digest that they should have, remembered until the machine is started again.

Hashing a library of 3 MB takes 1.5 ms, and one with CUDA kernels takes longer. The first process of a user does it for
the others. It remembers the state of the very file: device, inode, size, and the times of its last change; no program
can set back ctime. An empty file says so, in a folder in memory that only this user can write. Where there is no such
folder, every process hashes for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path

#: A file may change again within one tick of the clock that its times are from.
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
    # The digest is from a file: it may be anything, and must not lead to another folder.
    return hashlib.sha256(repr((numbers, digest)).encode()).hexdigest()


def is_known(state: os.stat_result, digest: str) -> bool:
    """Whether a file of this state had this digest."""
    key = _key(state, digest)
    if key in _here:
        return True
    try:
        folder = _folder()
        return folder is not None and (folder / key).exists()
    except OSError:
        return False


def remember(state: os.stat_result, digest: str) -> None:
    """A file had this digest, and had this state before it was read."""
    key = _key(state, digest)
    _here.add(key)
    # There may be no memory, or no place to write to.
    with contextlib.suppress(OSError):
        if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _SETTLED_NS and (folder := _folder()):
            (folder / key).touch(mode=0o600)
