"""Faults of TVM 0.27 that this package works around. If a test fails here, a workaround can be removed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the workarounds are for the build, which needs apache-tvm")


# TVMScript reads its source from a file.
HEADER = """
import numpy as np, tvm
from tvm import tirx
from tvm.script import tirx as T

def compiled(func):
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    with target:
        return tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=target)["main"]
"""

FP8_CAST = """
@T.prim_func(s_tir=True)
def func(x: T.handle, y: T.handle):
    X = T.match_buffer(x, (256,), "float8_e4m3fn", align=1)
    Y = T.match_buffer(y, (256,), "float32", align=4)
    for i in range(256):
        with T.sblock("cast"):
            v = T.axis.spatial(256, i)
            Y[v] = T.Cast("float32", X[v])

codes = np.arange(256, dtype=np.uint8)
y = tvm.runtime.tensor(np.zeros(256, np.float32))
import ml_dtypes
compiled(func)(tvm.runtime.tensor(codes.view(ml_dtypes.float8_e4m3fn)), y)
print(*y.numpy().tolist())
"""

NAN_TEST = """
@T.prim_func(s_tir=True)
def func(x: T.handle, y: T.handle):
    X = T.match_buffer(x, (1,), "float32", align=4)
    Y = T.match_buffer(y, (1,), "int32", align=4)
    with T.sblock("test"):
        T.reads(X[0])
        T.writes(Y[0])
        Y[0] = T.Select(X[0] != X[0], 1, 0)

y = tvm.runtime.tensor(np.full(1, 7, np.int32))
compiled(func)(tvm.runtime.tensor(np.full(1, np.nan, np.float32)), y)
print(y.numpy()[0])
"""

LOCAL = """
@T.prim_func(s_tir=True)
def func(x: T.handle):
    X = T.match_buffer(x, (16,), "float32", align=4)
    with T.sblock("sum"):
        T.reads()
        T.writes()
        acc = T.sblock_alloc_buffer((16,), "float32", scope="local")
        for i in T.vectorized(16):
            acc[i] = X[i]
        for _ in range(100):
            for i in T.vectorized(16):
                acc[i] = acc[i] * X[i]
        for i in T.vectorized(16):
            X[i] = acc[i]

target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
from dsa_tvm.build import registers
for pipeline in ("default", registers.PIPELINE):
    with target:
        built = tvm.compile(module, target=target, tir_pipeline=pipeline)
    print("AllocWorkspace" in built.mod.inspect_source("ll"))
    y = tvm.runtime.tensor(np.ones(16, np.float32))
    built["main"](y)
    assert (y.numpy() == 1).all()
"""


def outcome(tmp_path, body):
    """The output of a script. It runs in a child process, which TVMScript may end."""
    (tmp_path / "case.py").write_text(HEADER + body)
    command = [sys.executable, "-P", str(tmp_path / "case.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def test_fp8_cast_is_wrong(tmp_path):
    """Zero and subnormals become normal numbers, NaN becomes 480. So elements.py converts with integers."""
    got = np.array(outcome(tmp_path, FP8_CAST), np.float32)
    codes = np.arange(256)
    mantissa, exponent, sign = codes & 7, codes >> 3 & 15, np.where(codes & 128, -1, 1)
    as_normal = sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    right = np.where(exponent > 0, as_normal, sign * mantissa / 8 * 2.0**-6)
    right[codes & 127 == 127] = np.nan
    assert not np.array_equal(got, right, equal_nan=True), "TVM's cast is right now: elements.widen can use it"
    np.testing.assert_array_equal(got, as_normal, "TVM's float8_e4m3fn cast is wrong in another way now")


def test_a_number_is_taken_to_equal_itself(tmp_path):
    """TVM folds x == x to true. So elements.is_nan looks at the bits."""
    assert outcome(tmp_path, NAN_TEST) == ["0"], "TVM no longer folds x != x: elements.is_nan can be that"


def test_local_buffers_are_workspaces(tmp_path):
    """So build/registers.py keeps them on the stack."""
    default, ours = outcome(tmp_path, LOCAL)
    assert default == "True", "TVM keeps small local buffers on the stack now: build/registers.py can go"
    assert ours == "False"


def test_tune_context_imports_tensor_intrinsics():
    """It takes a minute and is of no use to CPU kernels, so `tuning.search` prevents it."""
    import inspect

    from tvm.s_tir.meta_schedule import TuneContext

    assert "import tvm.s_tir.tensor_intrin" in inspect.getsource(TuneContext.__init__)
