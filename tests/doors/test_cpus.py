"""How many CPUs a process may use, and which kernels its CPU runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_tvm import get_num_threads
from dsa_tvm.build.link import export_directory
from dsa_tvm.runtime import library, machine

HERE = Path(__file__).parent
NO_LIMIT = 2**31 - 1
HOST = "22 1 0:20 / /proc rw - proc proc rw\n"
V2 = HOST + "30 1 0:28 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    HOST + "31 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)
#: A container without a cgroup namespace: the mount begins at its own group, of which the path is the host's.
V1_CONTAINER = HOST + "31 30 0:29 /docker/ab /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
HYBRID = V1 + "33 30 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


def compiled(name, directory, *sources):
    source = export_directory() / "src"
    files = [str(HERE.parent / "c" / f"{name}.c"), *(str(source / s) for s in sources)]
    subprocess.run(["cc", "-Wall", "-Werror", f"-I{source}", *files, "-o", str(directory / name)], check=True)
    return str(directory / name)


@pytest.fixture(scope="module")
def quota(tmp_path_factory):
    return compiled("quota", tmp_path_factory.mktemp("quota"), "cpu/cpus.c")


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "expected"),
    [
        (V2, "0::/\n", {}, NO_LIMIT),
        (V2, "0::/a\n", {"sys/fs/cgroup/a/cpu.max": "max 100000\n"}, NO_LIMIT),
        (V2, "0::/a\n", {"sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),
        (V2, "0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        (V2, "0::/a\n", {"sys/fs/cgroup/a/cpu.max": "10000 100000\n"}, 1),
        # The tightest on the way up counts.
        (V2, "0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        (V2, "0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "100000 50000", "sys/fs/cgroup/a/cpu.max": "900000 1000"}, 2),
        (V2, "0::/../x\n", {"sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (V2, "0::/a\n", {"sys/fs/cgroup/a/cpu.max": "nonsense"}, NO_LIMIT),
        (V2, "0::/a\n", {"sys/fs/cgroup/a/cpu.max": "9223372036854775807 1"}, NO_LIMIT),
        (V1, "4:cpu,cpuacct:/g\n3:cpuset:/\n", {"sys/fs/cgroup/cpu,cpuacct/g/cpu.cfs_quota_us": "-1"}, NO_LIMIT),
        (V1, "4:cpuacct,cpu:/g\n", {"sys/fs/cgroup/cpu,cpuacct/g/cpu.cfs_quota_us": "250000"}, 3),
        (V1, "3:cpuset:/g\n", {"sys/fs/cgroup/cpuset/g/cpu.cfs_quota_us": "100000"}, NO_LIMIT),
        (V1_CONTAINER, "5:cpu:/docker/ab\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000"}, 1),
        (V1_CONTAINER, "5:cpu:/docker/ab/in\n", {"sys/fs/cgroup/cpu/in/cpu.cfs_quota_us": "200000"}, 2),
        (HYBRID, "4:cpu,cpuacct:/g\n0::/g\n", {"sys/fs/cgroup/cpu,cpuacct/g/cpu.cfs_quota_us": "200000"}, 2),
        ("", "", {}, NO_LIMIT),
    ],
)
def test_quota(quota, tmp_path, monkeypatch, mounts, groups, files, expected):
    """The library and the Python package count alike. The package counts for itself: it also builds the library."""
    files = {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.name == "cpu.cfs_quota_us":
            (path.parent / "cpu.cfs_period_us").write_text("100000\n")
    assert int(subprocess.run([quota, str(tmp_path)], capture_output=True, check=True).stdout) == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(99))
    (tmp_path / "proc/self/mountinfo").write_text(mounts.replace(" /sys/", f" {tmp_path}/sys/"))
    assert machine.usable_cpus(tmp_path / "proc") == min(expected, 99)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_cpus_are_counted_again():
    """The pool starts at most four threads for each CPU, however many a call asks for."""
    code = """
import os, numpy as np, dsa_tvm
cpus = os.sched_getaffinity(0)
x, n = np.zeros((1000, 4000), np.float32), np.full(1000, 4000, np.int32)
before = len(os.listdir("/proc/self/task"))
def started():
    dsa_tvm.topk(x, n * 0, n, 9, num_threads=1000)
    return len(os.listdir("/proc/self/task")) - before
os.sched_setaffinity(0, {min(cpus)})
dsa_tvm.set_num_threads(0)
first = started()
os.sched_setaffinity(0, sorted(cpus)[:2])
assert first == started() == 4, first
dsa_tvm.set_num_threads(0)
print(started())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "8\n", done.stdout + done.stderr


def threads(environment=(), before=""):
    code = f"import os\n{before}\nimport dsa_tvm\nprint(dsa_tvm.get_num_threads())"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | dict(environment))
    return int(done.stdout)


def test_default_number_of_threads():
    default = threads()
    assert 1 <= default <= len(os.sched_getaffinity(0))
    assert threads(before="os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})") == 1
    for value, expected in {"3": 3, " 5 ": 5, "4,2": 4, "2000000": 1024, "99999999999999999999": 1024}.items():
        assert threads({"OMP_NUM_THREADS": value}) == expected
    for value in ("", "0", "-1", "x", "3x"):
        assert threads({"OMP_NUM_THREADS": value}) == default
    assert threads({"OMP_NUM_THREADS": "7", "OMP_THREAD_LIMIT": "2"}) == 2
    assert threads({"OMP_THREAD_LIMIT": "3"}, "import dsa_tvm; dsa_tvm.set_num_threads(9)") == 3


def test_a_quota_of_this_machine(tmp_path):
    """Uses a real cgroup if this process may make one."""
    group = Path("/sys/fs/cgroup/cpu" if Path("/sys/fs/cgroup/cpu").is_dir() else "/sys/fs/cgroup", "dsa_tvm_test")
    if get_num_threads() < 2 or not os.access(group.parent, os.W_OK):
        pytest.skip("no second CPU, or no right to make a cgroup")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup: {error}")
    try:
        v1 = group / "cpu.cfs_quota_us"
        try:
            (v1 if v1.exists() else group / "cpu.max").write_text("50000" if v1.exists() else "50000 100000")
        except OSError as error:
            pytest.skip(f"no quota: {error}")
        assert threads(before=f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))") == 1
    finally:
        group.rmdir()


LEAVES = {
    "leaf 1": (0, {"SSE3": 0, "SSSE3": 9, "CX16": 13, "SSE4.1": 19, "SSE4.2": 20, "POPCNT": 23}, 2),
    "leaf 1, AVX": (0, {"FMA": 12, "MOVBE": 22, "OSXSAVE": 27, "AVX": 28, "F16C": 29}, 3),
    "leaf 7": (1, {"BMI1": 3, "AVX2": 5, "BMI2": 8}, 3),
    "leaf 7, AVX-512": (1, {"F": 16, "DQ": 17, "CD": 28, "BW": 30, "VL": 31}, 4),
    "leaf 80000001": (2, {"LAHF": 0}, 2),
    "leaf 80000001, ABM": (2, {"LZCNT": 5}, 3),
    "XCR0": (3, {"SSE": 1, "AVX": 2}, 3),
    "XCR0, AVX-512": (3, {"opmask": 5, "ZMM_Hi256": 6, "Hi16_ZMM": 7}, 4),
}


def test_each_feature_of_a_level_is_looked_at(tmp_path):
    """Bits as Intel's manual numbers them, one masked at a time as a hypervisor may; and all of the psABI's levels."""
    program = compiled("x86_level", tmp_path)
    masked, expected = [[2**32 - 1] * 4, [0] * 4], [4, 1]
    for word, bits, level in LEAVES.values():
        for bit in bits.values():
            words = [2**32 - 1] * 4
            words[word] &= ~(1 << bit)
            masked.append(words)
            expected.append(level - 1)
    arguments = [str(word) for words in masked for word in words]
    done = subprocess.run([program, *arguments], capture_output=True, check=True, text=True)
    assert list(map(int, done.stdout.split())) == expected


def test_the_level_of_this_cpu_is_glibcs():
    """The level agrees with that of the loader, if the loader prints it."""
    if not library.active_target().startswith("x86-64-v") or os.environ.get("DSA_TVM_TARGET"):
        pytest.skip("no x86-64, or a target that was set")
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    done = subprocess.run([str(loader), "--help"], capture_output=True, text=True)
    found = [line.split()[0] for line in done.stdout.splitlines() if "x86-64-v" in line and "supported" in line]
    if not found:
        pytest.skip("it does not")
    level, *_ = re.findall(r"x86-64-v\d", library.active_target())  # without what is beside the levels
    assert level == max(found)
