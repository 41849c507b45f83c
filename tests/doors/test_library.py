"""A library is loaded only if it is complete and can run here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

import dsa_tvm
from dsa_tvm.runtime import files, library

USE = "import dsa_tvm; print(dsa_tvm.active_target())"


@pytest.fixture
def copy(tmp_path):
    source = library.default_path()
    for name in (library.LIBRARY_NAME, library.MANIFEST_NAME):
        shutil.copy(source.parent / name, tmp_path / name)
    return tmp_path / library.LIBRARY_NAME


def use(code=USE, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)


def edit_manifest(path, **values):
    manifest = path.parent / library.MANIFEST_NAME
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))


def test_manifest_tells_what_the_library_is(copy):
    manifest = library.verify(copy)
    assert manifest["version"] == dsa_tvm.__version__
    assert manifest["size"] == copy.stat().st_size
    assert manifest["served"] == {"d_idx": [32, 64, 128], "d_qk": [512, 576], "d_v": [512]}
    assert dsa_tvm.active_target() in manifest["targets"]


def test_exports_are_exactly_the_public_symbols():
    listed = subprocess.run(["nm", "-D", "--defined-only", library.default_path()], capture_output=True, text=True)
    symbols = sorted(line.split()[-1] for line in listed.stdout.splitlines())
    assert symbols == library.exported_symbols() == library.verify(library.default_path())["symbols"]


@pytest.mark.parametrize("keep", [0, 1, 64, 4095, 4096, 100_000, -1])
def test_truncated(copy, keep):
    data = copy.read_bytes()
    copy.write_bytes(data[:keep])
    done = use(DSA_TVM_LIBRARY=str(copy))
    assert done.returncode == 1 and "LibraryError: library: expected" in done.stderr and "damaged" in done.stderr


@pytest.mark.parametrize("position", [0, 0.3, 0.99])
def test_one_flipped_bit(copy, position):
    data = bytearray(copy.read_bytes())
    data[int(position * len(data))] ^= 1
    copy.write_bytes(data)
    with pytest.raises(dsa_tvm.LibraryError, match="sha256"):
        dsa_tvm.get_library_path(copy)


def test_other_abi(copy):
    edit_manifest(copy, abi=999)
    with pytest.raises(dsa_tvm.LibraryError, match="expected ABI 1, got 999"):
        dsa_tvm.get_library_path(copy)


@pytest.mark.parametrize("repeat", [1, 10**5], ids=["once", "nested"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"abi": 1}', "\x00", "[", '{"a":'])
def test_manifest_that_cannot_be_read(copy, text, repeat):
    text *= repeat
    (copy.parent / library.MANIFEST_NAME).write_text(text)
    with pytest.raises(dsa_tvm.LibraryError, match="manifest"):
        dsa_tvm.get_library_path(copy)


def test_nothing_there(tmp_path):
    with pytest.raises(dsa_tvm.LibraryError, match="expected a file"):
        dsa_tvm.get_library_path(tmp_path / "libdsa_tvm.so")
    (tmp_path / "libdsa_tvm.so").write_bytes(b"")
    with pytest.raises(dsa_tvm.LibraryError, match="expected its manifest"):
        dsa_tvm.get_library_path(tmp_path / "libdsa_tvm.so")


def test_a_whole_file_that_is_no_library(copy):
    copy.write_bytes(b"not an ELF file")
    edit_manifest(copy, size=copy.stat().st_size, sha256=files.sha256(copy))
    with pytest.raises(dsa_tvm.LibraryError):
        library.load(str(copy))


def test_another_library_through_the_environment(copy):
    assert use(DSA_TVM_LIBRARY=str(copy)).stdout.split() == [dsa_tvm.active_target()]


def test_target_override():
    for target in library.verify(library.default_path())["targets"]:
        done = use(DSA_TVM_TARGET=target)
        assert done.stdout.split() == [target] or "expected a target this CPU runs" in done.stderr
    done = use(DSA_TVM_TARGET="x86-64-v9")
    assert "LibraryError: DSA_TVM_TARGET: expected one of" in done.stderr and "x86-64-v9" in done.stderr


def test_no_tvm_in_the_process():
    code = """
import sys, numpy as np, dsa_tvm
n = np.array([5], np.int32)
dsa_tvm.topk(np.zeros((1, 5), np.float32), n * 0, n, 2)
assert not {"tvm", "torch", "onnxruntime"} & set(sys.modules), sys.modules.keys()
assert "tvm_runtime" not in open("/proc/self/maps").read()
"""
    done = use(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["import tvm, dsa_tvm", "import dsa_tvm; dsa_tvm.active_target(); import tvm"])
def test_beside_tvm(order):
    """TVM's runtime defines the symbols that our kernels use. Neither may use those of the other."""
    pytest.importorskip("tvm")
    code = f"""
{order}
import numpy as np
from tvm.script import tirx as T
n = np.array([5], np.int32)
x = np.array([[1, 5, 2, 4, 3]], np.float32)
assert dsa_tvm.topk(x, n * 0, n, 2).tolist() == [[1, 3]]
assert tvm.runtime.tensor(x).numpy().sum() == 15
"""
    done = use(code, TVM_FFI_DISABLE_TORCH_C_DLPACK="1")
    assert done.returncode == 0, done.stderr


def test_atomic_write(tmp_path, monkeypatch):
    from dsa_tvm.runtime.files import write_atomically

    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_bounded_memory():
    """The formula of the header: at most 4 * min(s_q, 32 * threads) * s_kv bytes of logits, not 4 * s_q * s_kv."""
    code = """
import resource, numpy as np, dsa_tvm
s_q, s_kv = 256, 65536
q, k = np.ones((s_q, 1, 32), np.float32), np.ones((s_kv, 32), np.float32)
w, n = np.ones((s_q, 1), np.float32), np.full(s_q, s_kv, np.int32)
dsa_tvm.indexer_topk(q[:1], k[:9], w[:1], n[:1] * 0, n[:1], topk=16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dsa_tvm.indexer_topk(q, k, w, n * 0, n, topk=16, num_threads=2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = use(code)
    # 16 MiB of logits at most; whole they would be 64 MiB.
    assert float(done.stdout) < 28, done.stderr


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("dsa_tvm.indexer_topk(q, k, w, n * 0, n, topk=16, num_threads=1)", "no memory for the logits"),
        ("dsa_tvm.sparse_mla(a, kv, i, sm_scale=1, out=out, num_threads=1)", "no memory for the workspace of a task"),
    ],
)
def test_no_memory_is_an_error(call, words):
    code = f"""
import resource, numpy as np, dsa_tvm
q, k, w = np.ones((8, 1, 32), np.float32), np.ones((2**20, 32), np.float32), np.ones((8, 1), np.float32)
n = np.full(8, 2**20, np.int32)
a, kv, i = np.ones((1, 128, 576), np.float32), np.ones((9, 576), np.float32), np.zeros((1, 4), np.int32)
out = np.ones((1, 128, 512), np.float32), np.ones((1, 128), np.float32), np.ones((1, 128), np.float32)
dsa_tvm.topk(w, n * 0, n, 1)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**18, size + 2**18))
try:
    {call}
except dsa_tvm.KernelError as error:
    print(error)
"""
    done = use(code)
    assert words in done.stdout, done.stdout + done.stderr
