"""The limits of a process, tested on made-up trees of control groups as in the kernel's documentation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_tvm.runtime import machine

MIB = 1 << 20


class Kernel:
    """``/proc`` and hierarchies of control groups."""

    def __init__(self, root):
        self.proc, self.root = root / "proc", root / "sys fs"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n")
        self.cgroup, self.mountinfo = [], []

    def mount(self, kind, options, root="/", place="memory"):
        path = self.root / place
        path.mkdir(parents=True, exist_ok=True)
        escaped = str(path).replace(" ", "\\040")
        self.mountinfo.append(f"30 23 0:26 {root} {escaped} rw,nosuid shared:4 - {kind} {kind} {options}")
        (self.proc / "self" / "mountinfo").write_text("\n".join(self.mountinfo))
        return path

    def process(self, line):
        self.cgroup.append(line)
        (self.proc / "self" / "cgroup").write_text("\n".join(self.cgroup) + "\n")


@pytest.fixture
def kernel(tmp_path):
    return Kernel(tmp_path)


def put(group, **files):
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("__", ".")).write_text(f"{text}\n")


def test_no_groups(kernel):
    assert machine.memory(kernel.proc).bytes == 32000000 * 1024
    assert machine.usable_cpus(kernel.proc) == len(os.sched_getaffinity(0))


def test_memory_of_version_2(kernel):
    """The smallest limit of the group and its parents counts. Unused pages of files count as free."""
    top = kernel.mount("cgroup2", "rw,nsdelegate", place="unified")
    kernel.process("0::/a/b")
    put(top / "a", memory__max=500 * MIB, memory__current=450 * MIB, memory__stat=f"anon 1\ninactive_file {50 * MIB}")
    put(top / "a" / "b", memory__max="max", memory__high="max", memory__current=1)
    found = machine.memory(kernel.proc)
    assert found.bytes == 100 * MIB
    assert str(found) == f"100 MiB (the memory limit of the control group {top / 'a'})"
    put(top / "a" / "b", memory__high=60 * MIB, memory__current=10 * MIB)
    assert machine.memory(kernel.proc).bytes == 50 * MIB
    put(top / "a" / "b", memory__current=70 * MIB)
    assert machine.memory(kernel.proc).bytes == 0


def test_memory_of_version_1(kernel):
    top = kernel.mount("cgroup", "rw,memory")
    kernel.process("4:memory:/jobs/one")
    put(top, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    usage, stat = 200 * MIB, f"inactive_file 7\ntotal_inactive_file {20 * MIB}\ntotal_active_file {40 * MIB}"
    put(top / "jobs" / "one", memory__limit_in_bytes=300 * MIB, memory__usage_in_bytes=usage, memory__stat=stat)
    assert machine.memory(kernel.proc).bytes == 140 * MIB


def test_a_container_sees_its_own_group_only(kernel):
    """The root of the mount is the group itself, but the path of the process is the one outside."""
    group = kernel.mount("cgroup", "rw,memory", root="/docker/4711")
    kernel.process("4:memory:/docker/4711")
    put(group, memory__limit_in_bytes=300 * MIB, memory__usage_in_bytes=100 * MIB)
    assert machine.memory(kernel.proc).bytes == 200 * MIB
    kernel.cgroup.clear()
    kernel.process("4:memory:/docker/4711/inner")
    put(group / "inner", memory__limit_in_bytes=30 * MIB, memory__usage_in_bytes=0)
    assert machine.memory(kernel.proc).bytes == 30 * MIB
    # A path that is not below the mount's root, as a namespace may show it.
    for path in ("/elsewhere", "/../../x"):
        kernel.cgroup.clear()
        kernel.process(f"4:memory:{path}")
        assert machine.memory(kernel.proc).bytes == 200 * MIB


@pytest.mark.parametrize(
    ("limit", "cpus"), [("max 100000", 64), ("150000 100000", 2), ("10000 100000", 1), ("9900000 100000", 64)]
)
def test_quota_of_version_2(kernel, monkeypatch, limit, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    top = kernel.mount("cgroup2", "rw", place="unified")
    kernel.process("0::/a")
    put(top / "a", cpu__max=limit)
    assert machine.usable_cpus(kernel.proc) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 64), ("350000", 4), ("300000", 3), ("1000", 1)])
def test_quota_of_version_1(kernel, monkeypatch, quota, cpus):
    """The controller is mounted together with another one, and the parent has the quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    top = kernel.mount("cgroup", "rw,cpu,cpuacct", place="cpu,cpuacct")
    kernel.process("3:cpu,cpuacct:/a/b")
    put(top / "a", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    put(top / "a" / "b", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert machine.usable_cpus(kernel.proc) == cpus


@pytest.mark.parametrize("text", ["", "nonsense", "1 2 3", "-5", "\x00", "max", "0 0", "5 0", "99999999999999999999"])
def test_nonsense_is_no_limit(kernel, text):
    top = kernel.mount("cgroup2", "rw", place="unified")
    kernel.process("0::/")
    kernel.process("not a line")
    put(top, memory__max=text, cpu__max=text, memory__current=text, memory__stat=text)
    assert machine.memory(kernel.proc).bytes == 32000000 * 1024
    assert machine.usable_cpus(kernel.proc) == len(os.sched_getaffinity(0))


def left(**options):
    code = "from dsa_tvm.runtime import machine; print(machine.memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)
    return done.stdout


def test_ulimit():
    import resource

    limit = 3000 * MIB
    said = left(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert said.endswith("(ulimit -v)\n") and 1000 < float(said.split()[0]) * 1024 < 3000, said


def test_a_control_group_of_this_machine():
    """Uses a real control group if this machine allows one."""
    places = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    names = ("memory.limit_in_bytes", "memory.max")
    for place in places:
        group = place / f"dsa_tvm_test_{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            limit = next((group / name for name in names if (group / name).exists()), None)
            if limit is None:
                continue
            limit.write_text(str(300 * MIB))
            said = left(preexec_fn=lambda group=group: (group / "cgroup.procs").write_text(str(os.getpid())))
            assert str(group) in said and 200 < int(said.split()[0]) < 300, said
            return
        except PermissionError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no control group can be made")
