"""The loaded file is the very file that was checked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import dsa_tvm
from dsa_tvm.runtime import files, library, loading
from dsa_tvm.runtime.loading import CheckedFile


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_library(path, answer):
    source = f"int answer(void) {{ return {answer}; }}"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=source, text=True, check=True)
    return CheckedFile(str(path), files.sha256(path))


@pytest.fixture
def copy(tmp_path):
    for name in (library.LIBRARY_NAME, library.MANIFEST_NAME):
        shutil.copy(library.default_path().parent / name, tmp_path / name)
    return tmp_path / library.LIBRARY_NAME


#: Replaces the library right after it was read.
SWAP = """
import os, sys
from dsa_tvm.runtime import library, loading
path, other = sys.argv[1:]
read = loading.sha256
def read_and_swap(descriptor):
    digest = read(descriptor)
    os.replace(other, path)
    return digest
loading.sha256 = read_and_swap
"""


def test_a_library_that_is_replaced_while_it_is_loaded(copy, tmp_path):
    compile_library(tmp_path / "other.so", 1)
    code = f"{SWAP}\nprint(library.load(path).dsa_tvm_target().decode())"
    assert run(code, copy, tmp_path / "other.so").split() == [dsa_tvm.active_target()]


def test_a_candidate_that_is_replaced_while_it_is_loaded(tmp_path):
    file = compile_library(tmp_path / "candidate.so", 1)
    compile_library(tmp_path / "other.so", 2)
    code = f"{SWAP}\nprint(loading.load_checked(loading.CheckedFile(path, {file.sha256!r})).answer())"
    assert run(code, file.path, tmp_path / "other.so").split() == ["1"]


def test_another_candidate_than_was_built(tmp_path):
    file = compile_library(tmp_path / "candidate.so", 1)
    compile_library(tmp_path / "candidate.so", 2)
    with pytest.raises(dsa_tvm.LibraryError, match=r"expected sha256 .*, got .* at .*candidate\.so"):
        loading.load_checked(file)
    os.unlink(file.path)
    with pytest.raises(dsa_tvm.LibraryError, match=r"No such file.*candidate\.so"):
        loading.load_checked(file)


def test_a_worker_loads_a_file_only_as_it_was_built(tmp_path):
    from dsa_tvm.tuning.gpu import call as cuda_call

    file = compile_library(tmp_path / "candidate.so", 1)
    compile_library(tmp_path / "candidate.so", 2)
    with pytest.raises(dsa_tvm.LibraryError, match="expected sha256"):
        cuda_call.Library(file)


MANY = """
import os, resource, sys
from dsa_tvm.runtime.loading import CheckedFile, load_checked
digests = sys.argv[2:]
soft = len(os.listdir("/proc/self/fd")) + 3
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, 4096))
files = [CheckedFile(f"{sys.argv[1]}/{i}.so", digest) for i, digest in enumerate(digests)]
if os.environ.get("CLOSE"):
    found = []
    for file in files:
        found.append(load_checked(file).answer())
        os.closerange(3, 64)  # what makes a daemon of itself does this
else:
    found = [load_checked(file).answer() for file in files]
print(found)
"""


@pytest.mark.parametrize("close", ["", "1"])
def test_many_candidates(tmp_path, close, monkeypatch):
    """Each candidate needs its own name, because the loader takes an old name for the loaded library."""
    monkeypatch.setenv("CLOSE", close)
    digests = [compile_library(tmp_path / f"{i}.so", i).sha256 for i in range(12)]
    assert run(MANY, tmp_path, *digests).split("\n")[0] == str(list(range(12)))


def test_it_is_read_once(copy):
    code = """
import sys
from dsa_tvm.runtime import library, loading, verified
verified._SETTLED_NS = 0  # the copy is younger than what is remembered
read, number = loading.sha256, []
loading.sha256 = lambda descriptor: number.append(descriptor) or read(descriptor)
for _ in range(3):
    library.get_library_path(sys.argv[1]), library.load(sys.argv[1]), library.verify(library.Path(sys.argv[1]))
assert len(number) == 1, number
with open(sys.argv[1], "r+b") as file:
    file.seek(5000)
    byte = file.read(1)[0]
    file.seek(5000)
    file.write(bytes([byte ^ 1]))
try:
    library.get_library_path(sys.argv[1])
except library.LibraryError as error:
    print(error)
"""
    # Written to a new file: the process would have the changed page in its memory otherwise, and may need it.
    assert "sha256" in run(code, copy)


def test_onnxruntime_takes_the_copy_that_is_loaded():
    pytest.importorskip("onnxruntime")
    code = """
import dsa_tvm, onnxruntime
dsa_tvm.active_target()
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(dsa_tvm.get_library_path())
print(sum("libdsa_tvm.so" in line and " r-xp " in line for line in open("/proc/self/maps")))
"""
    assert run(code).split() == ["1"]


def test_its_name_leads_to_the_file():
    """Debuggers and symbolizers read the library by the name that the loader has."""
    code = """
import ctypes, os
from dsa_tvm.runtime import library
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_char_p) for name in ("file", "base", "symbol", "address")]
info = Info()
assert ctypes.CDLL(None).dladdr(library.load().dsa_tvm_call, ctypes.byref(info))
print(os.path.samefile(info.file, library.default_path()), os.path.realpath(info.file).decode())
"""
    same, path = run(code).split(maxsplit=1)
    assert same == "True" and path.strip() == os.path.realpath(library.default_path())


def test_without_proc(copy, monkeypatch):
    """The file at the path is compared with the one that was checked."""
    monkeypatch.setattr(loading.os, "getpid", lambda: 2**31 - 1)
    descriptor = loading.open_file(copy)
    assert loading.load(descriptor, str(copy)).dsa_tvm_abi_version() == library.ABI_VERSION
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    descriptor = loading.open_file(copy)
    shutil.copy(copy, copy.with_suffix(".new"))
    os.replace(copy.with_suffix(".new"), copy)
    with pytest.raises(dsa_tvm.LibraryError, match="expected the file that was checked"):
        loading.load(descriptor, str(copy))


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError):
            loading.open_file(path)
