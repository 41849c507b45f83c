"""The kernels that multiply with the processor's bf16 dot products: that they do, when they run, and odd numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from compare import assert_close
from samples import DTYPES, indexer_inputs

import dsa_tvm
from dsa_tvm.ops import OPS
from dsa_tvm.runtime import library

TARGET, BASE = "x86-64-v4-bf16", "x86-64-v4"
SPEC = OPS["lightning_indexer"]
here = pytest.mark.skipif(dsa_tvm.active_target() != TARGET, reason=f"this machine does not run {TARGET}")
BF16 = {"T": "bfloat16", "K": "bfloat16"}


@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump")
def test_they_are_in_the_object_code_of_that_target_only(tmp_path):
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    from dsa_tvm.schedules import CPU, cpu_kernel, cpu_variants

    from dsa_tvm.build import objects

    own = cpu_variants("lightning_indexer", TARGET)
    assert [tuple(v.values()) for v in own] == [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float8_e4m3fn"),
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("int8", "int8"),
    ]
    decisions = CPU["lightning_indexer"].DEFAULT[TARGET]
    tile = decisions.tile_keys * decisions.heads // 16 * decisions.unroll_d
    for variant, target, least in [*((v, TARGET, tile) for v in own), (BF16, BASE, 0)]:
        kernel = cpu_kernel("lightning_indexer", variant, target, decisions)
        objects.write_object({"kernel": kernel}, target, tmp_path / "kernel.o")
        code = subprocess.run(["objdump", "-d", tmp_path / "kernel.o"], capture_output=True, text=True).stdout
        found = code.count("vdpbf16ps")
        assert found >= least and bool(found) == bool(least), (variant, target)


@here
def test_the_library_takes_the_other_kernels_from_the_base():
    """What is not multiplied in bf16 has the bits that the base gives it; what is, the same within the tolerance."""
    manifest = library.verify(library.default_path())
    assert manifest["targets"][-2:] == [BASE, TARGET]
    assert list(manifest["kernels"][TARGET]) == ["lightning_indexer"]
    code = (
        "import sys, numpy as np, dsa_tvm\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from samples import indexer_inputs, attention_inputs\n"
        "from dsa_tvm.ops import OPS\n"
        "for v in OPS['lightning_indexer'].variants:\n"
        "    x = indexer_inputs(np.random.default_rng(0), v, s_q=3, s_kv=70, h_idx=9)\n"
        "    print(dsa_tvm.lightning_indexer(**x).tobytes().hex())\n"
        "for v in OPS['sparse_mla'].variants:\n"
        "    x = attention_inputs(np.random.default_rng(0), v['T'])\n"
        "    print(dsa_tvm.sparse_mla(**x, sm_scale=0.1)[2].tobytes().hex())\n"
    )
    lines = []
    for target in (TARGET, BASE):
        command = [sys.executable, "-c", code, os.path.dirname(__file__)]
        environment = os.environ | {"DSA_TVM_TARGET": target}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr[-500:]
        lines.append(done.stdout.split())
    for i, variant in enumerate(SPEC.variants):
        mine, base = (np.frombuffer(bytes.fromhex(x[i]), np.float32) for x in lines)
        if variant["T"] in ("float32", "float16"):
            np.testing.assert_array_equal(mine, base)
        else:
            assert_close(mine, base, SPEC.tolerance["logits"]["float32"])
    assert lines[0][len(SPEC.variants) :] == lines[1][len(SPEC.variants) :]


@here
def test_infinities_and_nan_are_those_of_float32():
    rng = np.random.default_rng(0)
    odd = np.array([np.inf, -np.inf, np.nan, 3e18, -3e18, 0.0, -0.0, 1.0, -2.0, 1e-30], DTYPES["bfloat16"])
    arguments = indexer_inputs(rng, BF16, s_q=4, s_kv=700, h_idx=1, d_idx=32)
    for name in ("q", "k"):
        chosen = rng.random(arguments[name].shape) < 0.05
        arguments[name][chosen] = rng.choice(odd, int(chosen.sum()))
    wide = arguments | {n: arguments[n].astype(np.float32) for n in ("q", "k")}
    actual, expected = (dsa_tvm.lightning_indexer(**x) for x in (arguments, wide))
    for test in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(test(actual), test(expected))
    assert np.isnan(actual).any() and np.isposinf(actual[:, :690]).any()
    finite = np.isfinite(expected)
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=1e-5, atol=1e-5 * np.abs(expected[finite]).max())


@here
def test_a_product_beyond_float32_is_infinite():
    k = np.zeros((3, 32), DTYPES["bfloat16"])
    k[:, 7] = [3e38, -3e38, 1.0]
    q = np.zeros((1, 1, 32), DTYPES["bfloat16"])
    q[0, 0, 7] = 3e38
    n = np.array([3], np.int32)
    logits = dsa_tvm.lightning_indexer(q, k, np.ones((1, 1), np.float32), n * 0, n)
    np.testing.assert_array_equal(logits[0], np.float32([np.inf, 0, q[0, 0, 7].astype(np.float32)]))


@here
def test_subnormal_numbers_count_as_zero():
    """As the docstring says; the smallest normal number does not."""
    q = np.zeros((1, 1, 32), ml_dtypes.bfloat16)
    q[0, 0, 0] = 2.0**100
    k = np.zeros((4, 32), ml_dtypes.bfloat16)
    k[:, 0] = np.array([0x7F, 0x80, 0x01, 0x81], np.uint16).view(ml_dtypes.bfloat16)
    n = np.array([4], np.int32)
    logits = dsa_tvm.lightning_indexer(q, k, np.ones((1, 1), np.float32), n * 0, n)
    np.testing.assert_array_equal(logits[0], np.float32([0, 2.0**-26, 0, 1.0078125 * 2.0**-26]))


def test_they_are_not_tuned_in_float32():
    command = [sys.executable, "-m", "dsa_tvm.cli", "tune", "lightning_indexer", "--target", TARGET, "--output", "logs"]
    pytest.importorskip("tvm", reason="tuning needs apache-tvm")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "tune: target: expected one of x86-64-v2, x86-64-v3, x86-64-v4, aarch64, got" in done.stderr
