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
from object_code import disassembled, innermost_loops, spills
from samples import DTYPES, attention_inputs, indexer_inputs, odd_attention_inputs

import dsa_tvm
from dsa_tvm.ops import OPS
from dsa_tvm.runtime import library

TARGET, BASE = "x86-64-v4-bf16", "x86-64-v4"
SPEC = OPS["lightning_indexer"]
here = pytest.mark.skipif(dsa_tvm.active_target() != TARGET, reason=f"this machine does not run {TARGET}")
BF16 = {"T": "bfloat16", "K": "bfloat16"}


@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump")
def test_they_are_in_the_object_code_of_that_target_only(tmp_path):
    """In loops that keep their sums in registers."""
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    from dsa_tvm.schedules import CPU, cpu_kernel, cpu_variants

    own = {op: cpu_variants(op, TARGET) for op in CPU}
    assert {op: [tuple(v.values()) for v in variants] for op, variants in own.items()} == {
        "lightning_indexer": [
            ("bfloat16", "bfloat16"),
            ("bfloat16", "float8_e4m3fn"),
            ("float8_e4m3fn", "float8_e4m3fn"),
        ],
        "topk": [],
        "sparse_mla": [("bfloat16",), ("bfloat16", "float8_e4m3fn")],
    }
    index, mla = (CPU[op].DEFAULT[TARGET] for op in ("lightning_indexer", "sparse_mla"))
    tiles = {
        # A tile of all its heads, and one of 16 for models with fewer.
        "lightning_indexer": [index.tile_keys * heads // 16 * index.unroll_d for heads in (index.heads, 16)],
        # Of the scores, of the output, and of the scores of half as many heads and twice as many keys.
        "sparse_mla": [mla.tile_keys * mla.heads // 16 * mla.unroll_d, mla.tile_heads * mla.values // 16],
    }
    for op, expected in tiles.items():
        cases = [(variant, TARGET, set(expected)) for variant in own[op]] + [(own[op][0], BASE, set())]
        for variant, target, sizes in cases:
            kernel = cpu_kernel(op, variant, target, CPU[op].DEFAULT[target])
            code = disassembled(kernel, target, tmp_path)
            loops = [loop for loop in innermost_loops(code) if any("vdpbf16ps" in x for x in loop)]
            assert {sum("vdpbf16ps" in x for x in loop) for loop in loops} == sizes, (op, variant, target)
            assert bool(sizes) == ("vdpbf16ps" in code)
            assert not [x for loop in loops for x in spills(loop)], (op, variant)


@here
def test_the_library_takes_the_other_kernels_from_the_base():
    """What is not multiplied in bf16 has the bits that the base gives it; what is, the same within the tolerance."""
    manifest = library.verify(library.default_path())
    assert {BASE, TARGET} <= set(manifest["targets"])
    assert list(manifest["kernels"][TARGET]) == ["lightning_indexer", "sparse_mla"]
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
    for i, variant in enumerate(OPS["sparse_mla"].variants, len(SPEC.variants)):
        mine, base = (np.frombuffer(bytes.fromhex(x[i]), np.float32) for x in lines)
        if variant["T"] == "bfloat16":
            assert not np.array_equal(mine, base)
            assert_close(mine, base, OPS["sparse_mla"].tolerance["lse"]["bfloat16"])
        else:
            np.testing.assert_array_equal(mine, base)


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


def attention_of(arguments):
    return dict(zip(("out", "max_logits", "lse"), dsa_tvm.sparse_mla(**arguments, sm_scale=0.1), strict=True))


@here
def test_infinities_and_nan_of_the_attention_are_those_of_float32():
    """Of q and of selected rows; a query has few of them, so that there are outputs of every kind."""
    arguments = odd_attention_inputs(s_q=60)
    wide = arguments | {n: arguments[n].astype(np.float32) for n in ("q", "kv")}
    actual, expected = attention_of(arguments), attention_of(wide)
    for name, x in actual.items():
        x, y = x.astype(np.float32), expected[name]
        for test in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(test(x), test(y), name)
        assert np.isnan(x).any() and np.isfinite(x).any()
        finite = np.isfinite(y)
        np.testing.assert_allclose(x[finite], y[finite], rtol=1e-2, atol=1e-2, err_msg=name)
    assert np.isneginf(actual["max_logits"][0]).all()


@here
def test_subnormal_numbers_of_the_attention_count_as_zero():
    """In q, in what is key only and in values; the smallest normal number does not."""
    codes = np.array([0x7F, 0x80, 0x01, 0x81], np.uint16).view(ml_dtypes.bfloat16)
    taken = np.float32([0, 2.0**-126, 0, 1.0078125 * 2.0**-126])
    kv = np.zeros((4, 576), ml_dtypes.bfloat16)
    kv[:, 0] = kv[:, 575] = codes
    q = np.zeros((4, 1, 576), ml_dtypes.bfloat16)
    q[:, 0, 575] = 2.0**100
    one = {"q": q, "kv": kv, "indices": np.arange(4, dtype=np.int32)[:, None]}
    found = attention_of(one)
    np.testing.assert_array_equal(found["out"][:, 0, 0].astype(np.float32), taken)
    np.testing.assert_array_equal(found["max_logits"][:, 0], taken * np.float32(2.0**100) * np.float32(0.1))
    kv[:, 575], q[:, 0, 575] = 2.0**100, codes
    found = attention_of(one)["max_logits"][:, 0]
    np.testing.assert_array_equal(found, taken * np.float32(2.0**100) * np.float32(0.1))


@here
def test_weights_are_as_precise_as_in_float32():
    """Two keys that almost cancel: a weight of one bf16 would be off by far more than out is."""
    kv = np.zeros((2, 576), ml_dtypes.bfloat16)
    kv[:, 0], kv[:, 575] = (256, -255), (0, 1)
    arguments = {"q": np.zeros((1, 50, 576), ml_dtypes.bfloat16), "kv": kv, "indices": np.int32([[0, 1]])}
    arguments["q"][0, :, 575] = np.linspace(-1, 1, 50)
    wide = arguments | {n: arguments[n].astype(np.float32) for n in ("q", "kv")}
    actual, expected = (attention_of(x)["out"][0, :, 0].astype(np.float32) for x in (arguments, wide))
    np.testing.assert_allclose(actual, expected, rtol=2.0**-8, atol=256 * 2.0**-15)


@here
@pytest.mark.parametrize("sm_scale", [1.0, -1.0, 0.0, 1e-30, 3e38])
def test_the_scale_multiplies_the_sum(sm_scale):
    arguments = attention_inputs(np.random.default_rng(0), "bfloat16", h_q=17, topk=33)
    q, kv = (arguments[n].astype(np.float64) for n in ("q", "kv"))
    scores = np.einsum("mhd,mjd->mhj", q, kv[arguments["indices"]]) * sm_scale
    with np.errstate(over="ignore"):
        expected = scores.max(-1).astype(np.float32)
    found = dsa_tvm.sparse_mla(**arguments, sm_scale=sm_scale)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
