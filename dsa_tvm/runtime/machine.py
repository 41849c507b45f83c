"""How many CPUs and how much memory this process may use, given limits, containers and other processes.

https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1 describe the control groups that are read here. The
library counts its CPUs itself (export/c/src/cpu/cpus.c): it serves programs without Python, and this module serves the
build, which has no library yet. A test holds the two together.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError

#: Numbers of threads that a command accepts. The library starts no more.
THREADS = range(1, 1025)

#: Where the kernel describes processes and itself.
_PROC = Path("/proc")


def check_threads(command: str, threads: Sequence[int]) -> None:
    """Refuse numbers of threads that the library would not start.

    Raises
    ------
    ArgumentError
        A number is out of range.
    """
    for number in threads:
        if number not in THREADS:
            raise ArgumentError(f"{command}: threads: expected {THREADS[0]}..{THREADS[-1]}, got {number}")


@dataclass(frozen=True)
class Memory:
    """What can still be allocated.

    Parameters
    ----------
    bytes : int
        How much can be allocated without swapping, failing or being killed, as far as one can tell.
    limit : str
        What sets this limit, for messages.
    """

    bytes: int
    limit: str

    def __str__(self) -> str:
        return f"{in_units(self.bytes)} ({self.limit})"


def in_units(number: int) -> str:
    """A number of bytes for messages."""
    if number >= 2**30:
        return f"{number / 2**30:.1f} GiB"
    return f"{number / 2**20:.0f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"


def usable_cpus(proc: Path = _PROC) -> int:
    """How many threads can compute at the same time: the CPUs of the affinity mask, or fewer if a quota says so.

    A quota that is not a whole number of CPUs is rounded up.
    """
    allowed = len(os.sched_getaffinity(0))
    quotas = [quota for group in _groups("cpu", proc) if (quota := _cpu_quota(group)) is not None]
    return max(1, min([allowed, *(-int(-quota // 1) for quota in quotas)]))


def available_memory() -> int:
    """`memory` in bytes."""
    return memory().bytes


def memory(proc: Path = _PROC) -> Memory:
    """What can still be allocated, and what limits it.

    This is the least of the machine's available memory, of what the limits of the process's control group and its
    parents leave, and of what ``ulimit -v`` and ``ulimit -d`` leave.
    """
    found = [_of_machine(proc)]
    for group in _groups("memory", proc):
        if (left := _left_of_group(group)) is not None:
            found.append(Memory(left, f"the memory limit of the control group {group}"))
    for name, kind, field in (("-v", resource.RLIMIT_AS, "VmSize"), ("-d", resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found.append(Memory(max(soft - of_process(field, proc), 0), f"ulimit {name}"))
    return min(found, key=lambda memory: memory.bytes)


def of_process(field: str, proc: Path = _PROC) -> int:
    """A field of this process's status, such as VmHWM, in bytes; 0 where the kernel does not tell."""
    return _kib(proc / "self" / "status", field) or 0


def _of_machine(proc: Path) -> Memory:
    available = _kib(proc / "meminfo", "MemAvailable")
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Memory(available, "the machine's available memory")


def _kib(path: Path, field: str) -> int | None:
    """A field in KiB of a file of ``/proc``, in bytes."""
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return _number(value.split()[0], 1024) if value.split() else None
    return None


def _left_of_group(group: Path) -> int | None:
    """What the memory limits of one control group leave; None if it has no limit."""
    # memory.high does not kill, but it slows a process down until nothing moves.
    limits = [_number(_text(group / name)) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    set_ones = [limit for limit in limits if limit is not None and limit < 1 << 60]
    if not set_ones:
        return None
    used = _number(_text(group / "memory.current"))
    if used is None:
        used = _number(_text(group / "memory.usage_in_bytes")) or 0
    # The kernel drops pages of files when memory is short. Active ones would be read again, so half of them count.
    stat = dict(line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    idle = _number(stat.get("total_inactive_file", stat.get("inactive_file", ""))) or 0
    active = _number(stat.get("total_active_file", stat.get("active_file", ""))) or 0
    return max(min(set_ones) - max(used - idle - active // 2, 0), 0)


def _cpu_quota(group: Path) -> float | None:
    """CPUs that one control group may use; None if it has no quota."""
    words = _text(group / "cpu.max").split()
    if not words:
        words = [_text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip()]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1]) or None


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Directories of the process's control group for a controller, and of its visible parents."""
    paths: dict[str, str] = {}
    for line in _text(proc / "self" / "cgroup").splitlines():
        if line.count(":") < 2:
            continue
        _, names, path = line.split(":", 2)
        paths |= dict.fromkeys(names.split(",") if names else ["unified"], path)
    for kind, root, place in _mounts(proc):
        if kind == "cgroup2" and "unified" in paths:
            path = paths["unified"]
        elif kind == f"cgroup:{controller}" and controller in paths:
            path = paths[controller]
        else:
            continue
        # In a container, the mount may show only the process's own group, while /proc has its path outside.
        inside = os.path.relpath(path, root) if _is_below(path, root) else "."
        group = place / inside
        while True:
            if group.is_dir():
                yield group
            if group == place:
                break
            group = group.parent


def _mounts(proc: Path) -> Iterator[tuple[str, str, Path]]:
    """Mounted hierarchies of control groups: the kind, the group that is mounted, and the mount point."""
    for line in _text(proc / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        if len(fields := before.split()) < 5 or not (tail := after.split()):
            continue
        root, place = (_unescaped(field) for field in fields[3:5])
        if tail[0] == "cgroup2":
            yield "cgroup2", root, Path(place)
        elif tail[0] == "cgroup" and len(tail) >= 3:
            for option in tail[2].split(","):
                yield f"cgroup:{option}", root, Path(place)


def _is_below(path: str, root: str) -> bool:
    return ".." not in path.split("/") and (path == root or path.startswith(root.rstrip("/") + "/"))


def _unescaped(field: str) -> str:
    for code in ("040", "011", "012", "134"):
        field = field.replace(f"\\{code}", chr(int(code, 8)))
    return field


def _number(text: str, unit: int = 1) -> int | None:
    text = text.strip()
    return int(text) * unit if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
