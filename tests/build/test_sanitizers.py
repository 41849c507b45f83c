"""Runs the C files under the compiler's sanitizers for addresses, undefined behaviour and threads."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm", reason="the build compiles kernels, and makes the tables of the operators")

import dsa_tvm
from dsa_tvm.build import command, kernel_table, link, spec_table
from dsa_tvm.build.kernel_table import Kernels
from dsa_tvm.spec import DIMS, INT32_MAX

TESTS = Path(__file__).parent.parent
INCLUDE = Path(dsa_tvm.__file__).parent / "include"
#: Groups of a few queries a thread, and tasks of a few keys.
CUT = SimpleNamespace(
    **{"rows": 8, "task_keys": 64, "block_keys": 16, "min_keys": 16, "tasks_per_thread": 2, "heads": 2, "task_heads": 4}
)
KERNELS = {"lightning_indexer": "plain_indexer", "topk": "plain_topk", "sparse_mla": "plain_mla"}
TYPES = {"lightning_indexer": ("float32", "float32"), "topk": (), "sparse_mla": ("float32",)}
#: What a sanitizer prints about an error.
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
}
# ThreadSanitizer cannot lay out its memory where addresses are much randomized.
FIXED = ["setarch", "-R"] if shutil.which("setarch") else []


def run(program, *arguments, **environment):
    command = [*FIXED, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | OPTIONS | environment)


@pytest.fixture(scope="module", params=list(link.SANITIZERS))
def sanitizer(request, tmp_path_factory):
    """The name of a sanitizer that the compiler has and that runs here."""
    work = tmp_path_factory.mktemp("sanitizer")
    (work / "nothing.c").write_text("int main(void) { return 0; }\n")
    flags = link.SANITIZERS[request.param]
    made = (
        shutil.which("cc")
        and not subprocess.run(
            ["cc", *flags, str(work / "nothing.c"), "-o", str(work / "nothing")], capture_output=True
        ).returncode
    )
    if not made:
        pytest.skip(f"there is no C compiler with {flags[0]}")
    if run(work / "nothing").returncode:
        pytest.skip(f"programs made with {flags[0]} do not run here")
    return request.param


@pytest.fixture(scope="module")
def plain(sanitizer, tmp_path_factory):
    """A library that is all C, including its kernels, so that the sanitizer watches everything."""
    work = tmp_path_factory.mktemp("plain")
    spec_table.write(work, DIMS, "0")
    tables = {op: [Kernels(INT32_MAX, INT32_MAX, CUT, {TYPES[op]: name})] for op, name in KERNELS.items()}
    (work / "table.c").write_text(kernel_table.source([(dsa_tvm.active_target(), tables)]))
    kernels = work / "kernels.o"
    link.compile_object([TESTS / "c" / "plain_kernels.c"], kernels, work, "cc", *link.SANITIZERS[sanitizer])
    return link.link_library([kernels], work, "cc", sanitizer)


def compiled(program, library, sanitizer, directory):
    out = directory / program
    command = [
        "cc",
        "-O1",
        *link.SANITIZERS[sanitizer],
        f"-I{INCLUDE}",
        str(TESTS / "c" / f"{program}.c"),
        str(library),
    ]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-lm", "-lpthread", "-o", str(out)], check=True)
    return out


def test_an_error_is_reported(plain, sanitizer, tmp_path):
    """The sanitizer works: it reports a read behind an array, and two threads that share an output."""
    (tmp_path / "broken.c").write_text(
        """
        #include <pthread.h>
        #include <string.h>
        #include "dsa_tvm/dsa_tvm.h"
        static int32_t indices[8], from[2], to[2] = {64, 64};
        static float logits[2 * 64];
        static dsa_tvm_tensor tensor(void *data, int code, int64_t *shape, int ndim) {
          return (dsa_tvm_tensor){data, {1, 0}, ndim, {code, 32, 1}, shape, 0, 0};
        }
        static void *call(void *keys) {
          int64_t rows[] = {2, *(int64_t *)keys}, two[] = {2}, chosen[] = {2, 4};
          dsa_tvm_tensor x = tensor(logits, DSA_TVM_FLOAT, rows, 2), out = tensor(indices, DSA_TVM_INT, chosen, 2);
          dsa_tvm_tensor ks = tensor(from, DSA_TVM_INT, two, 1), ke = tensor(to, DSA_TVM_INT, two, 1);
          dsa_tvm_topk(&x, &ks, &ke, 4, &out, NULL);
          return NULL;
        }
        int main(void) {
          /* More keys than there is memory for; two threads write to one output. */
          int64_t keys[] = {%s};
          pthread_t threads[2];
          to[0] = to[1] = (int32_t)keys[0];
          for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, call, keys);
          for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
          return 0;
        }
        """
        % (80 if sanitizer == "address" else 64)
    )
    out = tmp_path / "broken"
    flags = [*link.SANITIZERS[sanitizer], f"-I{INCLUDE}", f"-Wl,-rpath,{plain.parent}"]
    subprocess.run(["cc", *flags, str(tmp_path / "broken.c"), str(plain), "-lpthread", "-o", str(out)], check=True)
    done = run(out)
    word = {"address": "global-buffer-overflow", "thread": "data race"}[sanitizer]
    assert done.returncode == 66 and word in done.stderr, done.stderr
    # It names our own file, not only the program's.
    assert "plain_kernels.c" in done.stderr


@pytest.mark.parametrize("program", ["embed", "callers"])
def test_programs(program, plain, sanitizer, tmp_path):
    """Programs make calls as applications do: alone, with many threads, with wrong arguments, and in a child."""
    arguments = ["fork"] if (program, sanitizer) == ("callers", "address") else []
    done = run(compiled(program, plain, sanitizer, tmp_path), *arguments)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "ok", done.stdout + done.stderr


def test_hostile_calls(tmp_path):
    """Every hostile call of the C door, on a complete library from ``dsa-tvm build --sanitize address``."""
    runtime = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer that a Python process can load")
    target = command.DEFAULT_TARGETS[platform.machine()][0]
    command.build(tmp_path, targets=[target], version=dsa_tvm.__version__, sanitizer="address")
    environment = {
        **{"DSA_TVM_LIBRARY": str(tmp_path / "libdsa_tvm.so"), "LD_PRELOAD": runtime, "PYTHONSAFEPATH": "1"},
        # Python leaves memory behind at its end.
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{TESTS}/hostile", "-k", "dsa_tvm_call"]
    done = subprocess.run(tests, capture_output=True, text=True, env=os.environ | environment, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
