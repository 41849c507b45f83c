"""Libraries for other sizes and machines, and for every CPU level of this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samples import indexer_inputs

import dsa_tvm
from dsa_tvm import library
from dsa_tvm.ops import OPS

pytest.importorskip("tvm", reason="building needs apache-tvm")

HERE = Path(__file__).parent


def cli(*arguments):
    command = [sys.executable, "-m", "dsa_tvm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_other_sizes(tmp_path, monkeypatch):
    """What the error for an unserved size advises works."""
    arguments = indexer_inputs(np.random.default_rng(0), OPS["lightning_indexer"].variants[0], h_idx=5, d_idx=96)
    with pytest.raises(dsa_tvm.ArgumentError, match="dsa-tvm build --d-idx 96"):
        dsa_tvm.lightning_indexer(**arguments)
    done = cli("build", "--d-idx", 96, "--d-v", 256, "--target", dsa_tvm.active_target(), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert library.verify(tmp_path / library.LIBRARY_NAME)["served"]["d_idx"] == [32, 64, 96, 128]
    monkeypatch.setenv("DSA_TVM_LIBRARY", str(tmp_path / library.LIBRARY_NAME))
    library.load.cache_clear()
    try:
        (expected,) = OPS["lightning_indexer"].reference(**arguments)
        np.testing.assert_allclose(dsa_tvm.lightning_indexer(**arguments), expected, rtol=1e-5, atol=1e-5)
        q, kv = np.ones((1, 2, 512), np.float32), np.ones((4, 512), np.float32)
        assert dsa_tvm.sparse_mla(q, kv, np.zeros((1, 1), np.int32), d_v=256)[0].shape == (1, 2, 256)
    finally:
        library.load.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "z80"], "target: expected one of"),
        (["--d-idx", "7"], "d_idx: expected a multiple of 32"),
        (["--d-v", "2048"], "d_v: expected a multiple of 64 in 64..1024, got 2048"),
        (["--cc", "no-such-compiler"], "cc: expected a C compiler"),
    ],
)
def test_refusals(tmp_path, arguments, words):
    done = cli("build", "--out", tmp_path / "lib", *arguments)
    assert done.returncode == 1 and words in done.stderr
    assert not list(tmp_path.glob("lib/*"))


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_every_level_this_cpu_runs(target):
    """The tests of the operators once more, on kernels that were not picked."""
    if target not in library.verify(library.default_path())["targets"]:
        pytest.skip(f"the library has no kernels for {target}")
    if target == dsa_tvm.active_target():
        pytest.skip(f"{target} is in use: the other tests ran on it")
    files = [HERE / f"test_{name}.py" for name in ("lightning_indexer", "topk", "sparse_mla", "threads", "guard_pages")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DSA_TVM_TARGET": target})
    if "expected a target this CPU runs" in done.stdout:
        pytest.skip(f"this CPU does not run {target}")
    assert done.returncode == 0, done.stdout[-3000:]


def test_decisions_that_do_not_divide_are_refused():
    """A tile that does not fit would leave part of the output unwritten."""
    from dsa_tvm.schedules import CPU, default_decisions

    decisions = default_decisions("x86-64-v3")
    wrong = {"lightning_indexer": {"block_keys": 49}, "topk": {"scan": 17}, "sparse_mla": {"values": 48}}
    for op, module in CPU.items():
        changed = replace(decisions[op], **wrong[op])
        variant = OPS[op].variants[0]
        with pytest.raises(ValueError, match=f"{op}: decisions that do not divide"):
            module.tensor_ir(*((variant, changed) if variant else (changed,)))


AARCH64_CC = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"


def test_aarch64_kernels_compile(tmp_path):
    from dsa_tvm.build import compile_objects

    built = compile_objects(["aarch64"], tmp_path, lambda line: None)
    header = built["aarch64"]["object"].read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and header[18] == 183  # EM_AARCH64


@pytest.mark.skipif(not shutil.which(AARCH64_CC), reason=f"{AARCH64_CC} is not installed")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"{EMULATOR} is not installed")
def test_aarch64_runs_under_emulation(tmp_path):
    done = cli("build", "--target", "aarch64", "--cc", AARCH64_CC, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    include = Path(dsa_tvm.__file__).parent / "include"
    program = tmp_path / "embed"
    link = [f"-L{tmp_path}", "-ldsa_tvm", "-lm", "-lgomp", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run([AARCH64_CC, str(HERE / "c" / "embed.c"), f"-I{include}", *link, "-o", str(program)], check=True)
    done = subprocess.run(
        [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(program)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "target aarch64" in done.stdout, done.stdout + done.stderr
