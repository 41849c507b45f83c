"""The kernels of every aarch64 target, run by QEMU, which knows the products of matrices."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from compare import assert_close, tolerance_of
from samples import attention_inputs, indexer_inputs, packed_attention_inputs, repeat_rows

import dsa_tvm
from dsa_tvm.ops import OPS

COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-gcc", "qemu-aarch64", "/usr/aarch64-linux-gnu"
pytestmark = [
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"{COMPILER} is not installed"),
    pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"{EMULATOR} is not installed"),
]
#: The target that the library has to choose, by QEMU's name of a CPU.
CPUS = {"max": "aarch64-bf16", "neoverse-n1": "aarch64-dotprod", "cortex-a72": "aarch64"}
#: DLPack's type code and bits.
CODES = {
    "int8": (0, 8),
    "int32": (0, 32),
    "uint8": (1, 8),
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "float8_e4m3fn": (10, 8),
}
INDEXER = OPS["lightning_indexer"]
NARROW = [v for v in INDEXER.variants if v["T"] not in ("float32", "float16")]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    directory = tmp_path_factory.mktemp("arm")
    build = [sys.executable, "-m", "dsa_tvm.cli", "build", "--target", "aarch64-bf16", "--cc", COMPILER]
    subprocess.run([*build, "--out", directory], check=True, capture_output=True, timeout=600)
    source = Path(__file__).parents[1] / "c" / "from_stdin.c"
    include = f"-I{Path(dsa_tvm.__file__).parent / 'include'}"
    link = [directory / "libdsa_tvm.so", "-lm", f"-Wl,-rpath,{directory}"]
    subprocess.run([COMPILER, "-O1", source, include, *link, "-o", directory / "program"], check=True)
    return directory / "program"


def run(program, cpu, op, *tensors):
    """The bytes of the outputs, which are the same for any number of threads."""
    sent = b""
    for x in map(np.ascontiguousarray, tensors):
        sent += struct.pack(f"<{3 + x.ndim}q", *CODES[x.dtype.name], x.ndim, *x.shape) + x.tobytes()
    found = set()
    for threads in ("1", "2", "5"):
        command = [EMULATOR, "-L", SYSTEM, "-cpu", cpu, program, op, threads]
        done = subprocess.run(command, input=sent, capture_output=True, timeout=120)
        assert (done.returncode, done.stderr.decode()) == (0, CPUS[cpu])
        found.add(done.stdout)
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("variant", NARROW, ids=lambda v: "-".join(v.values()))
def test_indexer(program, cpu, variant):
    for s_q, s_kv, h_idx, d_idx, period in (
        (5, 300, 64, 128, 0),
        (1, 1, 1, 32, 0),
        (3, 77, 9, 64, 0),
        (2, 50, 17, 128, 3),
    ):
        rng = np.random.default_rng(s_kv)
        x = indexer_inputs(rng, variant, s_q=s_q, s_kv=s_kv, h_idx=h_idx, d_idx=d_idx)
        if period:
            repeat_rows(x["k"], period)
        expected = INDEXER.reference(**x)
        logits = run(program, cpu, INDEXER.name, *(x[n] for n in ("q", "k", "weights", "ks", "ke")))
        actual = np.frombuffer(logits, np.float32).reshape(s_q, s_kv)
        assert_close(actual, np.asarray(expected).reshape(s_q, s_kv), tolerance_of(INDEXER, "logits", variant["T"]))


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("op", ["sparse_mla", "sparse_mla_fp8"])
def test_attention(program, cpu, op):
    for s_q, s_kv, h_q, topk in ((3, 300, 16, 64), (1, 1, 1, 1), (2, 200, 5, 33), (2, 300, 33, 97), (1, 400, 128, 200)):
        x = inputs(op, s_q=s_q, s_kv=s_kv, h_q=h_q, topk=topk)
        check(program, cpu, op, x)
    repetitive = inputs(op, s_kv=300, h_q=50, topk=300)
    repeat_rows(repetitive["kv"], 3)
    check(program, cpu, op, repetitive)
    invalid = inputs(op, h_q=7, topk=31)
    invalid["indices"][:, ::3] = -1
    check(program, cpu, op, invalid)


@pytest.mark.parametrize("cpu", CPUS)
def test_nan_and_infinity_of_a_selected_row(program, cpu):
    x = inputs("sparse_mla", h_q=7, topk=31)
    x["kv"][x["indices"][0, 3], 4] = np.nan
    x["kv"][x["indices"][1, 2], 9] = np.inf
    check(program, cpu, "sparse_mla", x)


def inputs(op, **sizes):
    rng = np.random.default_rng(sizes["h_q"])
    return attention_inputs(rng, "bfloat16", **sizes) if op == "sparse_mla" else packed_attention_inputs(rng, **sizes)


def check(program, cpu, op, x):
    spec = OPS[op]
    expected = spec.reference(**x, sm_scale=0.1, d_v=512)
    outputs = run(program, cpu, op, *(x[n] for n in ("q", "kv", "indices")))
    for output, reference in zip(spec.outputs, expected, strict=True):
        dtype = ml_dtypes.bfloat16 if output.name == "out" else np.float32
        size = reference.size * np.dtype(dtype).itemsize
        actual = np.frombuffer(outputs[:size], dtype).reshape(reference.shape)
        outputs = outputs[size:]
        assert_close(actual, reference, spec.tolerance[output.name]["bfloat16"])
