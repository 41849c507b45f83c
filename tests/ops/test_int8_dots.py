"""The indexer's kernels with the processor's dot products of bytes: that they have them, and that they are exact."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from compare import assert_close
from object_code import disassembled, innermost_loops, spills
from samples import indexer_inputs

import dsa_tvm
from dsa_tvm.ops import OPS

INT8 = {"T": "int8", "K": "int8"}
#: The targets that have such kernels, their instruction and their vectors' registers.
TARGETS = {
    "x86-64-v3-vnni": ("vpdpbusd", "%ymm"),
    "x86-64-v4-vnni": ("vpdpbusd", "%zmm"),
    "aarch64-dotprod": ("sdot", ".4s"),
}
SPEC = OPS["lightning_indexer"]


def kernel_for(target):
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    from dsa_tvm.schedules import CPU, cpu_kernel

    return cpu_kernel("lightning_indexer", INT8, target, CPU["lightning_indexer"].DEFAULT[target])


@pytest.mark.parametrize("target", TARGETS)
def test_they_are_in_the_object_code_of_their_targets_only(target, tmp_path):
    """In a loop that keeps its sums in registers. AVX-VNNI is not AVX512-VNNI: it has another encoding."""
    program = "llvm-objdump" if target.startswith("aarch64") else "objdump"
    if not shutil.which(program):
        pytest.skip(f"there is no {program}")
    kernel = kernel_for(target)
    from dsa_tvm.schedules import BASES, CPU, DOTS, cpu_variants
    from dsa_tvm.schedules.cpu.products import products_of

    assert {op: [dict(v) for v in cpu_variants(op, target)] for op in CPU} == {
        "lightning_indexer": [INT8],
        "topk": [],
        "sparse_mla": [],
    }
    code = disassembled(kernel, target, tmp_path)
    instruction, register = TARGETS[target]
    found = [line for line in code.splitlines() if instruction in line]
    assert found and all(register in line for line in found)
    if target == "x86-64-v3-vnni":
        assert all("{vex}" in line for line in found)
        assert not any(x in code for x in ("%zmm", "%k1", "%ymm16", "%xmm16"))
    c = CPU["lightning_indexer"].DEFAULT[target]
    dots = c.tile_keys * c.heads // products_of(DOTS[target]).lanes * c.unroll_d
    # Others sum up queries.
    (loop,) = (loop for loop in innermost_loops(code) if sum(instruction in x for x in loop) == dots)
    assert not spills(loop)
    assert instruction not in disassembled(kernel_for(BASES[target]), BASES[target], tmp_path)


#: The instruction in LLVM's plain arithmetic, for any processor.
MODEL = """
define linkonce_odr hidden {sums} @dsa_int8_dot({sums} %sum, {sums} %a, {sums} %b) #0 {{
  %u = bitcast {sums} %a to {quads}
  %s = bitcast {sums} %b to {quads}
  %x = {extend} {quads} %u to {wide}
  %y = sext {quads} %s to {wide}
  %products = mul {wide} %x, %y
  {picks}
  ret {sums} %t4
}}
attributes #0 = {{ alwaysinline nounwind }}
"""


def model(lanes):
    picks = ["%t0 = add <N x i32> %sum, zeroinitializer"]
    for i in range(4):
        mask = ", ".join(f"i32 {4 * lane + i}" for lane in range(lanes))
        picks.append(f"%p{i} = shufflevector <W x i32> %products, <W x i32> poison, <N x i32> <{mask}>")
        picks.append(f"%t{i + 1} = add <N x i32> %t{i}, %p{i}")
    text = "\n  ".join(picks).replace("N x", f"{lanes} x").replace("W x", f"{4 * lanes} x")
    # Arm multiplies signed bytes.
    extend = "sext" if lanes == 4 else "zext"
    types = {
        "extend": extend,
        "sums": f"<{lanes} x i32>",
        "quads": f"<{4 * lanes} x i8>",
        "wide": f"<{4 * lanes} x i32>",
    }
    return MODEL.format(picks=text, **types)


def cases():
    """Arguments whose sums are of every size: the ends of the range everywhere, tails of heads and keys, one key."""
    rng = np.random.default_rng(0)
    for s_q, s_kv, h_idx, d_idx in [(1, 1, 1, 32), (3, 300, 64, 128), (9, 77, 33, 64), (2, 2001, 17, 32)]:
        for q, k in [(None, None), (-128, -128), (127, -128), (-128, 127), (127, 127), (1, -128)]:
            arguments = indexer_inputs(rng, INT8, s_q=s_q, s_kv=s_kv, h_idx=h_idx, d_idx=d_idx, scaled=True)
            arguments["weights"][:] = 1  # with exact scores, the sums of a head each are exact too
            for name, value in {"q": q, "k": k}.items():
                if value is not None:
                    arguments[name][:] = value
            yield arguments


def exact(arguments):
    """The logits of integer scores whose weights are 1, before the scale."""
    q, k = (arguments[name].astype(np.int64) for name in ("q", "k"))
    logits = np.maximum(np.einsum("mhd,nd->mhn", q, k), 0).sum(1)
    keys = np.arange(len(k))
    seen = (arguments["ks"][:, None] <= keys) & (keys < arguments["ke"][:, None])
    return np.where(seen, logits, -np.inf)


def test_results_of_this_machine_are_exact():
    """Whatever it multiplies with, scores are integers below 2**24."""
    for arguments in cases():
        expected = exact(arguments)
        assert_close(
            dsa_tvm.lightning_indexer(**arguments), SPEC.reference(**arguments)[0], SPEC.tolerance["logits"]["float32"]
        )
        one_head = arguments | {"q": arguments["q"][:, :1].copy(), "weights": arguments["weights"][:, :1].copy()}
        expected = exact(one_head) * one_head["k_scale"].astype(np.float32)
        np.testing.assert_array_equal(dsa_tvm.lightning_indexer(**one_head), expected.astype(np.float32))


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_model_of_the_instruction_gives_the_same(target, tmp_path, monkeypatch):
    """The kernels on any machine; where it has the instruction, also the bits that the library gives."""
    tvm = pytest.importorskip("tvm", reason="building needs apache-tvm")
    from devices import float_target
    from dsa_tvm.schedules import CPU, cpu_kernel
    from dsa_tvm.schedules.cpu import products

    from dsa_tvm.build import candidates, objects

    monkeypatch.setattr(products, "_int8_dot_ir", model)
    decisions = CPU["lightning_indexer"].DEFAULT[target]
    kernel = cpu_kernel("lightning_indexer", INT8, target, decisions)
    linker = candidates.Linker("lightning_indexer", ("int8", "int8"), float_target())
    paths = [tmp_path / f"{suffix}.o" for suffix in candidates.SUFFIXES]
    for path, suffix in zip(paths, candidates.SUFFIXES, strict=True):
        name = objects.symbol("lightning_indexer", ("int8", "int8"), float_target(), suffix)
        objects.write_object({name: kernel}, float_target(), path)
    linker.link(paths[0], decisions, paths[1], decisions, tmp_path / "model.so")
    module = tvm.runtime.load_module(str(tmp_path / "model.so"))
    found = []
    for arguments in cases():
        found.append(np.full((len(arguments["q"]), len(arguments["k"])), np.nan, np.float32))
        out = tvm.runtime.tensor(found[-1])
        module["call"](0, 1, *(tvm.runtime.tensor(x) for x in arguments.values()), out)
        found[-1] = out.numpy()
        assert_close(found[-1], SPEC.reference(**arguments)[0], SPEC.tolerance["logits"]["float32"])
    native = of_the_library(target)
    if native is None:
        pytest.skip(f"this machine does not run {target}: only the model was tested")
    assert native == [x.tobytes().hex() for x in found]


def of_the_library(target):
    """The logits of the cases, on a target; None where that does not run."""
    code = (
        "import dsa_tvm, test_int8_dots as cases\n"
        "for arguments in cases.cases(): print(dsa_tvm.lightning_indexer(**arguments).tobytes().hex())"
    )
    environment = os.environ | {"DSA_TVM_TARGET": target}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    if "DSA_TVM_TARGET: expected" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.split()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_weights_may_be_anything(num_threads):
    """A head that is not positive counts 0 times its weight: NaN where that is infinite or NaN, as for other types."""
    arguments = indexer_inputs(np.random.default_rng(0), INT8, s_q=4, s_kv=200, h_idx=9, d_idx=32)
    arguments["weights"][0, 8], arguments["weights"][1, 3], arguments["weights"][2, :] = np.inf, np.nan, 1e-45
    wide = arguments | {n: arguments[n].astype(np.float32) for n in ("q", "k")}
    actual, expected = (dsa_tvm.lightning_indexer(**x, num_threads=num_threads) for x in (arguments, wide))
    assert np.isnan(actual[0]).any() and np.isposinf(actual[0, :197]).any() and np.isnan(actual[1, :198]).all()
    assert_close(actual, expected, SPEC.tolerance["logits"]["float32"])
