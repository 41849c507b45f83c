"""The kernels with tile products of AMX: that they have them, and what they give with a plain model of them.

No machine here has them. What a CPU or a system must say before they run is in tests/build/test_choice.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close, tolerance_of
from devices import float_target
from object_code import disassembled
from samples import (
    DTYPES,
    attention_inputs,
    indexer_inputs,
    odd_attention_inputs,
    packed_attention_inputs,
    repeat_rows,
)

import dsa_tvm
from dsa_tvm.ops import OPS

tvm = pytest.importorskip("tvm", reason="building needs apache-tvm")
from dsa_tvm.schedules import BASES, CPU, CPU_TARGETS, CpuSpace, cpu_kernel, cpu_variants, space  # noqa: E402
from dsa_tvm.schedules.cpu import amx  # noqa: E402

from dsa_tvm.build import candidates, link, objects  # noqa: E402

TARGET = "x86-64-v4-amx"
INSTRUCTIONS = ("tdpbf16ps", "tdpbssd")
OWN = [(op, variant) for op in CPU for variant in cpu_variants(op, TARGET)]
INDEXER, MLA = OPS["lightning_indexer"], OPS["sparse_mla"]
needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")


def name_of(case):
    op, variant = case
    return "-".join((op, *variant.values()))


def test_which_kernels_they_are():
    assert [(op, *variant.values()) for op, variant in OWN] == [
        ("lightning_indexer", "bfloat16", "bfloat16"),
        ("lightning_indexer", "bfloat16", "float8_e4m3fn"),
        ("lightning_indexer", "float8_e4m3fn", "float8_e4m3fn"),
        ("lightning_indexer", "int8", "int8"),
        ("sparse_mla", "bfloat16"),
        ("sparse_mla", "bfloat16", "float8_e4m3fn"),
    ]


@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump")
@pytest.mark.parametrize("case", OWN, ids=name_of)
def test_they_are_in_the_object_code_of_that_target_only(case, tmp_path):
    op, variant = case
    code = disassembled(cpu_kernel(op, variant, TARGET, CPU[op].DEFAULT[TARGET]), TARGET, tmp_path)
    mine, other = INSTRUCTIONS[:: -1 if variant["T"] == "int8" else 1]
    assert mine in code and other not in code
    assert "vdpbf16ps" not in code and "vpdpbusd" not in code
    # Configured before the first product and released after the last one; every other exit comes before.
    order = [line.split(":")[1].split()[0] for line in code.splitlines() if "\ttile" in line or "\tldtilecfg" in line]
    assert order.count("ldtilecfg") == 1 and order.count("tilerelease") >= 1
    base = next(t for t in (BASES[TARGET], *BASES.values()) if variant in cpu_variants(op, t))
    code = disassembled(cpu_kernel(op, variant, base, CPU[op].DEFAULT[base]), base, tmp_path)
    assert not any(x in code for x in (*INSTRUCTIONS, "ldtilecfg", "tileload"))


class Modelled:
    """The kernels of AMX, whose instructions are functions of tests/c/amx_model.c."""

    def __init__(self, op, variant, decisions, directory):
        types = tuple(variant.values())
        target = float_target()
        measured = "sparse_mla_fp8" if (op, len(types)) == ("sparse_mla", 2) else op
        linker = candidates.Linker(measured, types, target)
        linker._op = op  # packed rows have a kernel of sparse_mla
        kernel = CpuSpace(CPU[op], variant, TARGET).kernel(decisions)
        paths = [directory / f"{suffix}.o" for suffix in candidates.SUFFIXES]
        for path, suffix in zip(paths, candidates.SUFFIXES, strict=True):
            objects.write_object({objects.symbol(op, types, target, suffix): kernel}, target, path)
        model = Path(__file__).parent.parent / "c" / "amx_model.c"
        link.run(
            [
                "cc",
                "-O2",
                "-march=native",
                "-std=gnu11",
                "-ffp-contract=off",
                "-fPIC",
                "-c",
                str(model),
                "-o",
                f"{directory}/model.o",
            ]
        )
        both = directory / "both.o"
        link.run(["cc", "-r", "-nostdlib", str(paths[1]), f"{directory}/model.o", "-o", str(both)])
        linker.link(paths[0], decisions, both, decisions, directory / "model.so")
        self.spec, self.module = OPS[measured], tvm.runtime.load_module(str(directory / "model.so"))

    def __call__(self, arguments, threads=1, **attributes):
        inputs = [arguments.get(tensor.name) for tensor in self.spec.inputs]
        q = arguments["q"]
        if self.spec is INDEXER:
            results = [np.full((len(q), len(arguments["k"])), np.nan, np.float32)]
        else:
            results = [np.full((*q.shape[:2], attributes["d_v"]), np.nan, q.dtype)]
            results += [np.full(q.shape[:2], np.nan, np.float32) for _ in range(2)]
        outputs = [tvm.runtime.tensor(x) for x in results]
        given = [None if x is None else tvm.runtime.tensor(x) for x in inputs]
        self.module["call"](1, threads, *given, *(attributes[a.name] for a in self.spec.attrs), *outputs)
        return tuple(x.numpy() for x in outputs)


@pytest.fixture
def modelled(monkeypatch, tmp_path):
    monkeypatch.setattr(amx, "_PREFIX", "model_")
    monkeypatch.setattr(amx, "_ATTRIBUTES", "nounwind")
    declared = amx._declarations
    monkeypatch.setattr(amx, "_declarations", lambda: declared().replace(" immarg", ""))

    def make(op, variant, decisions=None):
        return Modelled(op, variant, decisions or CPU[op].DEFAULT[TARGET], tmp_path)

    return make


def attention(packed=False, **sizes):
    rng = np.random.default_rng(0)
    arguments = packed_attention_inputs(rng, **sizes) if packed else attention_inputs(rng, "bfloat16", **sizes)
    chosen = rng.random(arguments["indices"].shape)
    arguments["indices"][chosen < 0.1] = -1
    return arguments


@needs_cc
@pytest.mark.parametrize("variant", cpu_variants("lightning_indexer", TARGET), ids=lambda v: "-".join(v.values()))
def test_the_indexer_with_a_model(variant, modelled):
    """Tails of heads, keys and entries, several blocks, one key and ranges; the same bits for any number of threads."""
    run = modelled("lightning_indexer", variant)
    rng = np.random.default_rng(0)
    for s_q, s_kv, h_idx, d_idx in [
        (1, 1, 1, 32),
        (3, 300, 64, 128),
        (9, 77, 33, 64),
        (2, 1001, 17, 32),
        (2, 65, 40, 128),
    ]:
        arguments = indexer_inputs(rng, variant, s_q=s_q, s_kv=s_kv, h_idx=h_idx, d_idx=d_idx, scaled=s_kv % 2 == 1)
        arguments["ks"][-1] = s_kv // 3
        expected = INDEXER.reference(**arguments)[0]
        found = run(arguments)[0]
        assert_close(found, expected, tolerance_of(INDEXER, "logits", variant["T"]))
        for threads in (2, 5):
            assert run(arguments, threads)[0].tobytes() == found.tobytes()


@needs_cc
@pytest.mark.parametrize(
    ("tile_keys", "heads"), [(16, 16), (16, 32), (32, 16), (16, 48), (48, 16), (96, 16)], ids=lambda x: str(x)
)
def test_every_shape_of_a_tile_is_exact_in_int8(tile_keys, heads, modelled):
    base = CPU["lightning_indexer"].DEFAULT[TARGET]
    c = type(base)(**{**vars(base), "tile_keys": tile_keys, "heads": heads, "block_keys": 96})
    run = modelled("lightning_indexer", {"T": "int8", "K": "int8"}, c)
    rng = np.random.default_rng(0)
    for h_idx, d_idx in [(64, 128), (33, 32), (1, 64)]:
        arguments = indexer_inputs(rng, {"T": "int8", "K": "int8"}, s_q=2, s_kv=203, h_idx=h_idx, d_idx=d_idx)
        arguments["weights"][:] = 1
        q, k = (arguments[name].astype(np.int64) for name in ("q", "k"))
        exact = np.maximum(np.einsum("mhd,nd->mhn", q, k), 0).sum(1)
        seen = np.arange(203) < arguments["ke"][:, None]
        np.testing.assert_array_equal(run(arguments)[0], np.where(seen, exact, -np.inf).astype(np.float32))


@needs_cc
def test_infinities_and_nan_of_the_indexer(modelled):
    run = modelled("lightning_indexer", {"T": "bfloat16", "K": "bfloat16"})
    rng = np.random.default_rng(0)
    odd = np.array([np.inf, -np.inf, np.nan, 3e18, -3e18, 0.0, -0.0, 1.0], DTYPES["bfloat16"])
    arguments = indexer_inputs(rng, {"T": "bfloat16", "K": "bfloat16"}, s_q=4, s_kv=300, h_idx=1, d_idx=32)
    for name in ("q", "k"):
        chosen = rng.random(arguments[name].shape) < 0.05
        arguments[name][chosen] = rng.choice(odd, int(chosen.sum()))
    with np.errstate(all="ignore"):
        expected = INDEXER.reference(**arguments)[0].astype(np.float32)
    found = run(arguments)[0]
    for test in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(test(found), test(expected))
    assert np.isnan(found).any() and np.isposinf(found[:, :290]).any()


@needs_cc
@pytest.mark.parametrize("packed", [False, True])
def test_the_attention_with_a_model(packed, modelled):
    """Odd heads and keys, no or one key, missing indices, equal rows; the same bits for any number of threads."""
    variant = {"T": "bfloat16"} | ({"K": "float8_e4m3fn"} if packed else {})
    run = modelled("sparse_mla", variant)
    for h_q, topk, sizes in [(16, 64, {}), (70, 100, {"s_q": 1}), (33, 97, {}), (1, 1, {}), (50, 31, {"s_kv": 1})]:
        arguments = attention(packed, h_q=h_q, topk=topk, **sizes)
        arguments["indices"][0] = -1 if h_q == 33 else arguments["indices"][0]
        if h_q == 16 and not packed:
            repeat_rows(arguments["kv"], 1)
        attributes = {"sm_scale": 0.07, "d_v": 512}
        found, expected = run(arguments, **attributes), run.spec.reference(**arguments, **attributes)
        for tensor, x, y in zip(run.spec.outputs, found, expected, strict=True):
            assert_close(x, y, tolerance_of(run.spec, tensor.name, "bfloat16"))
        for threads in (2, 5):
            again = run(arguments, threads, **attributes)
            assert [x.tobytes() for x in again] == [x.tobytes() for x in found]


@needs_cc
def test_weights_of_the_attention_are_two_numbers(modelled):
    """Two keys that almost cancel: a weight of one bf16 would be off by far more than out is."""
    kv = np.zeros((2, 576), DTYPES["bfloat16"])
    kv[:, 0], kv[:, 575] = (256, -255), (0, 1)
    arguments = {"q": np.zeros((1, 50, 576), kv.dtype), "kv": kv, "indices": np.int32([[0, 1]])}
    arguments["q"][0, :, 575] = np.linspace(-1, 1, 50)
    attributes = {"sm_scale": 0.1, "d_v": 512}
    found = modelled("sparse_mla", {"T": "bfloat16"})(arguments, **attributes)[0][0, :, 0].astype(np.float32)
    expected = MLA.reference(**arguments, **attributes)[0][0, :, 0]
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=256 * 2.0**-15)


@pytest.mark.parametrize("op", ["lightning_indexer", "sparse_mla"])
def test_decisions_are_those_of_tiles(op):
    """What other targets are tuned with is refused, and a search finds some that are not."""
    module = CPU[op]
    mine = CpuSpace(module, next(v for o, v in OWN if o == op), TARGET)
    mine.check(module.DEFAULT[TARGET])
    for target in CPU_TARGETS:
        if target in module.DEFAULT and target != TARGET:
            with pytest.raises(ValueError, match="do not divide"):
                mine.check(module.DEFAULT[target])
    tried = space.values(mine, TARGET)
    assert all(value % amx.ROWS == 0 for name in ("tile_keys", "heads") for value in tried[name])


@needs_cc
@pytest.mark.skipif(dsa_tvm.active_target() == TARGET, reason="this CPU has tiles")
def test_a_candidate_is_not_measured_where_its_instructions_are_missing(tmp_path):
    """They would end the process. TVM's RPC server runs candidates without any other check."""
    decisions = CPU["sparse_mla"].DEFAULT[TARGET]
    paths = [tmp_path / f"{suffix}.o" for suffix in candidates.SUFFIXES]
    for path, suffix in zip(paths, candidates.SUFFIXES, strict=True):
        candidates.compile_kernel("sparse_mla", {"T": "bfloat16"}, TARGET, decisions, suffix, path)
    library = tmp_path / "amx.so"
    candidates.Linker("sparse_mla", ("bfloat16",), TARGET).link(paths[0], decisions, paths[1], decisions, library)
    module = tvm.runtime.load_module(str(library))
    arguments = attention()
    out = np.zeros((3, 16, 512), arguments["q"].dtype), *(np.zeros((3, 16), np.float32) for _ in range(2))
    given = [tvm.runtime.tensor(arguments[name]) for name in ("q", "kv", "indices")]
    with pytest.raises(RuntimeError, match=f"target: expected one this CPU runs, got {TARGET}"):
        module["call"](1, 1, *given, None, None, 0.1, 512, *map(tvm.runtime.tensor, out))
    with pytest.raises(RuntimeError, match=f"target: expected one this CPU runs, got {TARGET}"):
        module["peak"](1, 1, 10)


@needs_cc
def test_infinities_and_nan_of_the_attention(modelled):
    """Of q and of selected rows, as in float32; a query has few of them, so that there are outputs of every kind."""
    arguments = odd_attention_inputs(s_q=40)
    wide = arguments | {n: arguments[n].astype(np.float32) for n in ("q", "kv")}
    found = modelled("sparse_mla", {"T": "bfloat16"})(arguments, sm_scale=0.1, d_v=512)
    for x, y in zip(found, dsa_tvm.sparse_mla(**wide, sm_scale=0.1), strict=True):
        for test in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(test(x.astype(np.float32)), test(y))
        assert np.isnan(x.astype(np.float32)).any() and np.isfinite(y).any()
    assert np.isneginf(found[1][0]).all()
