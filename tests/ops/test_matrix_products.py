"""The kernels with Arm's products of matrices: that they have them, and what they give with a plain model of them."""

from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest
from compare import assert_close
from object_code import disassembled, innermost_loops, spills
from samples import attention_inputs, indexer_inputs
from test_int8_dots import cases, exact

from dsa_tvm.ops import OPS

tvm = pytest.importorskip("tvm", reason="building needs apache-tvm")

#: The targets, their instruction, and the element types of their own kernels.
BF16 = [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float8_e4m3fn", "float8_e4m3fn")]
TARGETS = {
    "aarch64-i8mm": ("smmla", {"lightning_indexer": [("int8", "int8")], "topk": [], "sparse_mla": []}),
    "aarch64-bf16": (
        "bfmmla",
        {"lightning_indexer": BF16, "topk": [], "sparse_mla": [("bfloat16",), ("bfloat16", "float8_e4m3fn")]},
    ),
}


@pytest.mark.skipif(not shutil.which("llvm-objdump"), reason="there is no llvm-objdump")
@pytest.mark.parametrize("target", TARGETS)
def test_they_are_in_the_object_code_of_their_target_only(target, tmp_path):
    """In loops that keep their sums in registers and call nothing."""
    from dsa_tvm.schedules import CPU, cpu_kernel, cpu_variants

    instruction, own = TARGETS[target]
    assert {op: [tuple(v.values()) for v in cpu_variants(op, target)] for op in CPU} == own
    for op in CPU:
        for variant in cpu_variants(op, target):
            c = CPU[op].DEFAULT[target]
            code = disassembled(cpu_kernel(op, variant, target, c), target, tmp_path)
            loops = [loop for loop in innermost_loops(code) if any(instruction in x for x in loop)]
            largest = c.tile_keys * c.heads // 4 * c.unroll_d
            assert max(sum(instruction in x for x in loop) for loop in loops) == largest
            for loop in loops:
                assert not spills(loop) and not [x for x in loop if x.startswith("bl")], (op, variant)
    other = {"aarch64-i8mm": "aarch64-dotprod", "aarch64-bf16": "aarch64"}[target]
    variant = dict(zip(("T", "K"), own["lightning_indexer"][0], strict=True))
    kernel = cpu_kernel("lightning_indexer", variant, other, CPU["lightning_indexer"].DEFAULT[other])
    assert instruction not in disassembled(kernel, other, tmp_path)


#: `smmla` in LLVM's plain arithmetic. The k-th of 8 products of sum 2 i + j is of bytes 8 i + k and 8 j + k.
INT8_MODEL = """
define linkonce_odr hidden <4 x i32> @dsa_matrix(<4 x i32> %sum, <2 x i64> %a, <2 x i64> %b) #0 {{
  %x = bitcast <2 x i64> %a to <16 x i8>
  %y = bitcast <2 x i64> %b to <16 x i8>
  %t0 = add <4 x i32> %sum, zeroinitializer
  {products}
  ret <4 x i32> %t8
}}
attributes #0 = {{ alwaysinline nounwind }}
"""

#: `bfmmla` as the architecture defines it without FEAT_EBF16: products and sums are rounded to odd, beyond the
#: largest number they are infinite, and subnormal operands and results are 0. In f64 products are exact, and TwoSum
#: gives what a sum lost.
BF16_MODEL = """
define internal <4 x float> @model_odd(<4 x double> %x) #1 {{
  %bits = bitcast <4 x double> %x to <4 x i64>
  %low = and <4 x i64> %bits, splat (i64 536870911)
  %inexact = icmp ne <4 x i64> %low, zeroinitializer
  %high = and <4 x i64> %bits, splat (i64 -536870912)
  %odd = or <4 x i64> %high, splat (i64 536870912)
  %r = select <4 x i1> %inexact, <4 x i64> %odd, <4 x i64> %high
  %sign = and <4 x i64> %bits, splat (i64 -9223372036854775808)
  %size = and <4 x i64> %bits, splat (i64 9223372036854775807)
  %small = icmp ult <4 x i64> %size, splat (i64 4039728865751334912)
  %s = select <4 x i1> %small, <4 x i64> %sign, <4 x i64> %r
  %value = bitcast <4 x i64> %s to <4 x double>
  %f = fptrunc <4 x double> %value to <4 x float>
  ret <4 x float> %f
}}
define internal <4 x double> @model_wide(<4 x float> %x) #1 {{
  %bits = bitcast <4 x float> %x to <4 x i32>
  %sign = and <4 x i32> %bits, splat (i32 -2147483648)
  %size = and <4 x i32> %bits, splat (i32 2147483647)
  %small = icmp ult <4 x i32> %size, splat (i32 8388608)
  %s = select <4 x i1> %small, <4 x i32> %sign, <4 x i32> %bits
  %f = bitcast <4 x i32> %s to <4 x float>
  %r = fpext <4 x float> %f to <4 x double>
  ret <4 x double> %r
}}
define internal <4 x float> @model_add(<4 x float> %a, <4 x float> %b) #1 {{
  %x = call <4 x double> @model_wide(<4 x float> %a)
  %y = call <4 x double> @model_wide(<4 x float> %b)
  %s = fadd <4 x double> %x, %y
  %v = fsub <4 x double> %s, %x
  %u = fsub <4 x double> %s, %v
  %e0 = fsub <4 x double> %x, %u
  %e1 = fsub <4 x double> %y, %v
  %e = fadd <4 x double> %e0, %e1
  %lost = fcmp one <4 x double> %e, zeroinitializer
  %bits = bitcast <4 x double> %s to <4 x i64>
  %lost_bits = bitcast <4 x double> %e to <4 x i64>
  %signs = xor <4 x i64> %bits, %lost_bits
  %toward = ashr <4 x i64> %signs, splat (i64 63)
  %step = or <4 x i64> %toward, splat (i64 1)
  %last = and <4 x i64> %bits, splat (i64 1)
  %even = icmp eq <4 x i64> %last, zeroinitializer
  %moves = and <4 x i1> %lost, %even
  %other = add <4 x i64> %bits, %step
  %r = select <4 x i1> %moves, <4 x i64> %other, <4 x i64> %bits
  %value = bitcast <4 x i64> %r to <4 x double>
  %f = call <4 x float> @model_odd(<4 x double> %value)
  ret <4 x float> %f
}}
define linkonce_odr hidden <4 x float> @dsa_matrix(<4 x float> %sum, <2 x i64> %a, <2 x i64> %b) #0 {{
  %x = bitcast <2 x i64> %a to <8 x i16>
  %y = bitcast <2 x i64> %b to <8 x i16>
  {products}
  %p01 = call <4 x float> @model_add(<4 x float> %p0, <4 x float> %p1)
  %p23 = call <4 x float> @model_add(<4 x float> %p2, <4 x float> %p3)
  %r0 = call <4 x float> @model_add(<4 x float> %sum, <4 x float> %p01)
  %r1 = call <4 x float> @model_add(<4 x float> %r0, <4 x float> %p23)
  ret <4 x float> %r1
}}
attributes #0 = {{ alwaysinline nounwind }}
attributes #1 = {{ noinline nounwind strictfp }}
"""


def model(sum_type):
    steps, width, lines = (8, "16 x i8", []) if sum_type == "i32" else (4, "8 x i16", [])
    for k in range(steps):
        for name, rows in (("x", (0, 0, 1, 1)), ("y", (0, 1, 0, 1))):
            mask = ", ".join(f"i32 {steps * row + k}" for row in rows)
            element = width.split()[-1]
            lines.append(f"%{name}{k} = shufflevector <{width}> %{name}, <{width}> poison, <4 x i32> <{mask}>")
            if sum_type == "i32":
                lines.append(f"%{name}w{k} = sext <4 x {element}> %{name}{k} to <4 x i32>")
            else:
                lines.append(f"%{name}z{k} = zext <4 x i16> %{name}{k} to <4 x i32>")
                lines.append(f"%{name}s{k} = shl <4 x i32> %{name}z{k}, splat (i32 16)")
                lines.append(f"%{name}f{k} = bitcast <4 x i32> %{name}s{k} to <4 x float>")
                lines.append(f"%{name}w{k} = call <4 x double> @model_wide(<4 x float> %{name}f{k})")
        if sum_type == "i32":
            lines.append(f"%m{k} = mul <4 x i32> %xw{k}, %yw{k}")
            lines.append(f"%t{k + 1} = add <4 x i32> %t{k}, %m{k}")
        else:
            lines.append(f"%m{k} = fmul <4 x double> %xw{k}, %yw{k}")
            lines.append(f"%p{k} = call <4 x float> @model_odd(<4 x double> %m{k})")
    return (INT8_MODEL if sum_type == "i32" else BF16_MODEL).format(products="\n  ".join(lines))


def linked(op, variant, target, tmp_path, monkeypatch):
    """The kernel with the model, for this machine, as a function of arguments and outputs."""
    from devices import float_target
    from dsa_tvm.schedules import CPU, cpu_kernel
    from dsa_tvm.schedules.cpu import products

    from dsa_tvm.build import candidates, objects

    monkeypatch.setattr(products, "_matrix_ir", model)
    decisions = CPU[op].DEFAULT[target]
    kernel = cpu_kernel(op, variant, target, decisions)
    types = tuple(variant.values())
    linker = candidates.Linker(op, types, float_target())
    paths = [tmp_path / f"{suffix}.o" for suffix in candidates.SUFFIXES]
    for path, suffix in zip(paths, candidates.SUFFIXES, strict=True):
        objects.write_object({objects.symbol(op, types, float_target(), suffix): kernel}, float_target(), path)
    linker.link(paths[0], decisions, paths[1], decisions, tmp_path / "model.so")
    return tvm.runtime.load_module(str(tmp_path / "model.so"))


ARRAYS = ("q", "kv", "indices", "attn_sink", "topk_length")
needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")


def logits_of(module, arguments, num_threads=1):
    found = np.full((len(arguments["q"]), len(arguments["k"])), np.nan, np.float32)
    out = tvm.runtime.tensor(found)
    module["call"](0, num_threads, *(tvm.runtime.tensor(x) for x in arguments.values()), out)
    return out.numpy()


@needs_cc
def test_smmla_gives_exact_scores(tmp_path, monkeypatch):
    module = linked("lightning_indexer", {"T": "int8", "K": "int8"}, "aarch64-i8mm", tmp_path, monkeypatch)
    spec = OPS["lightning_indexer"]
    for arguments in cases():
        assert_close(logits_of(module, arguments), spec.reference(**arguments)[0], spec.tolerance["logits"]["float32"])
        one = arguments | {n: arguments[n][:, :1].copy() for n in ("q", "weights")}
        np.testing.assert_array_equal(
            logits_of(module, one), (exact(one) * one["k_scale"].astype(np.float32)).astype(np.float32)
        )


@needs_cc
@pytest.mark.parametrize("types", BF16)
def test_bfmmla_gives_scores_within_the_tolerance(types, tmp_path, monkeypatch):
    """With tails of heads and keys, one key, and the same bits for any number of threads."""
    spec, variant = OPS["lightning_indexer"], {"T": types[0], "K": types[1]}
    module = linked("lightning_indexer", variant, "aarch64-bf16", tmp_path, monkeypatch)
    rng = np.random.default_rng(0)
    for s_q, s_kv, h_idx, d_idx in [
        (1, 1, 1, 32),
        (3, 301, 64, 128),
        (9, 77, 33, 64),
        (2, 2001, 17, 32),
        (2, 9, 5, 128),
    ]:
        arguments = indexer_inputs(rng, variant, s_q=s_q, s_kv=s_kv, h_idx=h_idx, d_idx=d_idx, scaled=True)
        found = logits_of(module, arguments)
        assert_close(found, spec.reference(**arguments)[0], spec.tolerance["logits"]["bfloat16"])
        for num_threads in (2, 5):
            np.testing.assert_array_equal(found, logits_of(module, arguments, num_threads))


@needs_cc
def test_odd_numbers_of_bfmmla(tmp_path, monkeypatch):
    """NaN and infinities are as in float32, and subnormal numbers count as 0."""
    variant = {"T": "bfloat16", "K": "bfloat16"}
    module = linked("lightning_indexer", variant, "aarch64-bf16", tmp_path, monkeypatch)
    rng = np.random.default_rng(0)
    arguments = indexer_inputs(rng, variant, s_q=4, s_kv=700, h_idx=1, d_idx=32, scaled=True)
    odd = np.array([np.inf, -np.inf, np.nan, 3e18, -3e18, 0.0, -0.0, 1.0, -2.0, 1e-30], ml_dtypes.bfloat16)
    for name in ("q", "k"):
        chosen = rng.random(arguments[name].shape) < 0.05
        arguments[name][chosen] = rng.choice(odd, int(chosen.sum()))
    actual, expected = logits_of(module, arguments), OPS["lightning_indexer"].reference(**arguments)[0]
    for test in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(test(actual), test(expected))
    assert np.isnan(actual).any()
    arguments["q"][:], arguments["k"][:], arguments["weights"][:] = 0, 0, 1
    arguments["q"][:, :, 0], arguments["k_scale"][:] = 2.0**100, 1
    arguments["k"][:4, 0] = np.array([0x7F, 0x80, 0x01, 0x81], np.uint16).view(ml_dtypes.bfloat16)
    arguments["ks"][:], arguments["ke"][:] = 0, 700
    np.testing.assert_array_equal(
        logits_of(module, arguments)[0, :4], np.float32([0, 2.0**-26, 0, 1.0078125 * 2.0**-26])
    )


@needs_cc
@pytest.mark.parametrize(("h_q", "topk"), [(1, 1), (17, 33), (64, 130)])
def test_attention_with_bfmmla_is_within_the_tolerance(h_q, topk, tmp_path, monkeypatch):
    """With tails of heads, and odd numbers of keys."""
    spec = OPS["sparse_mla"]
    module = linked("sparse_mla", {"T": "bfloat16"}, "aarch64-bf16", tmp_path, monkeypatch)
    arguments = attention_inputs(np.random.default_rng(0), "bfloat16", s_q=3, s_kv=300, h_q=h_q, topk=topk)
    expected = spec.reference(**arguments, sm_scale=0.1, d_v=512)
    outputs = [np.empty((3, h_q, 512), ml_dtypes.bfloat16), *np.empty((2, 3, h_q), np.float32)]
    results = [tvm.runtime.tensor(x) for x in outputs]
    given = [tvm.runtime.tensor(arguments[n]) if n in arguments else None for n in ARRAYS]
    module["call"](0, 1, *given, 0.1, 512, *results)
    for name, result, x in zip(("out", "max_logits", "lse"), results, expected, strict=True):
        assert_close(result.numpy(), x, spec.tolerance[name]["bfloat16"])
