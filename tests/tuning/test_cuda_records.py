"""What tuning on a GPU rests on: which records a build uses, what no GPU can be faster than, and element types."""

from __future__ import annotations

import math
import types
from dataclasses import replace

import numpy as np
import pytest
from tuning_records import LENGTHS, make

from dsa_tvm import presets
from dsa_tvm.errors import RecordError
from dsa_tvm.gpu.architectures import FEW_HEADS, best_for, is_arch, runs_on, shared_bytes, tensor_flops
from dsa_tvm.ops.element_types import decode, encode
from dsa_tvm.records.selection import gpu
from dsa_tvm.records.selection.gpu import BUCKETS, TIMED, choose, stage_of
from dsa_tvm.tuning.gpu import measure as cuda_measure
from dsa_tvm.tuning.tasks import Task
from dsa_tvm.tuning.trials import Trials

PRESET = presets.get("deepseek-v3.2")
SIZES = ((1, 8192), (64, 65536), (4096, 8192))


def final(size, n, speedup, op="topk", **changes):
    decisions = {"threads": n, "sample": 1024, "list_factor": 2, "list_min": 4096, "list_max": 8192}
    given = {"kind": "final", "target": "sm_90a", "decisions": decisions, "machine": "H100"}
    return make(op, size, (speedup,), **given | changes)


def everywhere(n, speedup, **changes):
    return [final(size, n, speedup, **changes) for size in SIZES]


def chosen(records):
    decisions = choose(records).decisions
    return None if decisions is None else decisions["threads"]


def test_the_fastest_that_holds_everywhere():
    slow, fast = everywhere(256, 1.1), everywhere(1024, 1.2)
    assert chosen([]) is None
    assert chosen([*slow, *fast]) == 1024 and chosen([*fast, *slow]) == 1024
    assert chosen([*slow, *fast[:2]]) == 256, "not measured at every size"
    assert chosen([*slow, *fast[:2], final(SIZES[2], 1024, 0.98)]) == 256, "slower somewhere"
    assert chosen([*slow, *fast, final(SIZES[2], 1024, 0.98)]) == 256, "the latest counts"
    assert chosen([*slow, *fast[:2], final(SIZES[2], 1024, 0.995)]) == 1024
    assert chosen(everywhere(256, 0.999)) is None
    assert choose(slow).speedup == pytest.approx(1.1)
    failed = final(SIZES[0], 1024, 1.2, seconds={}, error="crashed")
    assert chosen([*slow, failed]) == 256
    assert "none of 1 finalists was measured at all 3 sizes" in gpu.explain("topk", everywhere(256, 0.5), LENGTHS)[0]


def test_sizes():
    for op, sizes in BUCKETS.items():
        for element_types in TIMED[op]:
            tasks = [Task(op, "sm_90a", PRESET, *size, element_types) for size in sizes]
            stages = {task.stage for task in tasks}
            assert stages == ({"hopper_few", "hopper_many"} if op == "lightning_indexer" else stages) and all(stages)
            assert all(task.types == element_types for task in tasks)


@pytest.mark.parametrize("op", ["sparse_mla", "sparse_mla_fp8"])
def test_few_heads(op):
    """They have decisions of their own, which hold for any few heads of a model and for no others."""
    few, dtype = presets.get("deepseek-v3.2-tp8"), ("bfloat16",)

    def stage(h_q, arch="sm_90a", dtype=dtype):
        return stage_of(op, {"s_q": 1, "s_kv": 65536, "h_q": h_q}, arch, dtype)

    assert (stage(1), stage(16), stage(17), stage(17, "sm_80")) == ("few_heads", "few_heads", "hopper_attend", "attend")
    assert stage(16, dtype=("float32",)) == "attend", "one kernel serves all heads"
    assert Task(op, "sm_90a", few, 1, 65536, dtype).stage == "few_heads"
    finals = [
        make(op, (1, 65536), (1.5,), kind="final", target="sm_90a", types=dtype, shape=shape)
        for h_q in (8, 16, 64)
        for shape in [Task(op, "sm_90a", replace(few, h_q=h_q), 1, 65536, dtype).shape]
    ]

    def found(stage, preset):
        return [r.shape["h_q"] for r in gpu.finals_of(finals, op, "sm_90a", dtype, stage, vars(preset))]

    assert found("few_heads", few) == found("few_heads", PRESET) == [8, 16]
    assert found("few_heads", presets.get("deepseek-v4-512")) == []
    assert found("hopper_attend", PRESET) == [] and found("hopper_attend", replace(PRESET, h_q=64)) == [64]


def test_few_heads_of_several_models():
    """What is chosen holds for all numbers of few heads that were measured: none hides another."""
    few = presets.get("deepseek-v3.2-tp8")

    def final(h_q, ratio, list_size):
        task = Task("sparse_mla", "sm_90a", replace(few, h_q=h_q), 1, 65536, ("bfloat16",))
        decisions = {"split_keys": list_size}
        what = {"kind": "final", "target": "sm_90a", "types": task.types, "shape": task.shape, "decisions": decisions}
        return make("sparse_mla", (1, 65536), (ratio,), **what)

    assert gpu.choose([final(16, 1.2, 64), final(8, 1.5, 64)]).decisions == {"split_keys": 64}
    assert gpu.choose([final(16, 0.6, 64), final(8, 1.5, 64)]).decisions is None
    assert gpu.choose([final(16, 1.2, 64), final(8, 1.5, 128)]).decisions is None


def test_few_heads_in_a_build():
    """The decisions of a record are those of the kernel for few heads, and no other kernel has them."""
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    from dsa_tvm.build.cuda.kernels import OPERATORS
    from dsa_tvm.build.cuda.plan import Plan
    from dsa_tvm.build.cuda.space import Space
    from dsa_tvm.spec import DIMS

    few = presets.get("deepseek-v3.2-tp8")
    task = Task("sparse_mla", "sm_90a", few, 1, 65536, ("bfloat16",))
    space = Space(task.op, task.target, task.stage, task.types, vars(few))
    decisions = dict(vars(space.DEFAULT["sm_90a"]), split_keys=192)
    record = make(
        *(task.op, (1, 65536), (1.5,)),
        **{"kind": "final", "target": "sm_90a", "types": task.types, "shape": task.shape, "decisions": decisions},
    )
    plan = Plan([record], PRESET)

    def chosen(*arguments):
        return plan("sm_90a", "sparse_mla", *arguments)

    made = [k for k in OPERATORS["sparse_mla"]("sm_90a", DIMS, chosen) if k.stage == "attend"]
    found = [k for k in made if k.facts["split_keys"] == 192]
    assert {(k.variant["T"], k.sizes["d_qk"], k.limits["h_q"]) for k in found} == {
        ("bfloat16", 576, FEW_HEADS),
        ("float16", 576, FEW_HEADS),
    }


def test_families():
    def family(*arguments):
        return Task(*arguments).family

    bf16 = ("bfloat16", "bfloat16")
    many = ("lightning_indexer", "sm_90a", PRESET)
    assert family(*many, 4096, 8192, bf16) == family(*many, 64, 65536, bf16) != family(*many, 1, 8192, bf16)
    assert family(*many, 4096, 8192, bf16) != family(*many, 4096, 8192, ("float8_e4m3fn",) * 2)
    assert family("topk", "x86-64-v3", PRESET, 1, 4096) != family("topk", "x86-64-v3", PRESET, 1, 32768)


def test_a_candidate_is_done_at_every_size_or_when_it_failed():
    tasks = [Task("topk", "sm_90a", PRESET, *size, ()) for size in SIZES]
    trials = Trials(tasks, [final(SIZES[0], 256, 1.5), *everywhere(512, 1.2), final((7, 7), 1024, 1.0)])
    a, b = (final(SIZES[0], n, 1.0).decisions for n in (256, 512))
    assert trials.done == 1 and trials.count == 4 and trials.begun() == [a] and trials.best(4) == [b]
    assert trials.told() == [(dict(b), pytest.approx(1.2))]
    trials.add(failed := final(SIZES[1], 256, 1.0, seconds={}, error="crashed"))
    assert trials.done == 2 and trials.count == 6 and trials.is_done(a) and not trials.begun()
    assert trials.left_out(failed) == 1 and (dict(a), None) in trials.told() and trials.best(4) == [b]
    assert trials.told([a]) == [(dict(a), None)] and len(trials.of(b)) == 3 and len(trials.at(tasks[1])) == 2


H100 = types.SimpleNamespace(
    capability=90, multiprocessors=132, clock_hertz=1.83e9, bytes_per_second=3.35e12, l2_bytes=50 << 20
)


def test_roof():
    """The indexer's products at 989 TFLOPS, twice that in fp8; top-k's reading at 3.35 TB/s; a launch at least."""
    flops = 2 * 64 * 128 * sum(65536 - 4096 + m + 1 for m in range(4096))

    def roof(op, s_q, s_kv, *element_types):
        return cuda_measure.roof(Task(op, "sm_90a", PRESET, s_q, s_kv, element_types), H100)

    bf16 = roof("lightning_indexer", 4096, 65536, "bfloat16", "bfloat16")
    assert bf16 == pytest.approx(flops / 989.4e12, rel=1e-3)
    assert roof("lightning_indexer", 4096, 65536, *["float8_e4m3fn"] * 2) == pytest.approx(bf16 / 2)
    assert roof("topk", 4096, 65536) == pytest.approx((4 * 4096 * 63488.5 - (50 << 20)) / 3.35e12, rel=1e-3)
    assert roof("topk", 1, 8192) == roof("sparse_mla", 1, 65536, "bfloat16") == 1e-6
    assert roof("sparse_mla", 4096, 65536, "bfloat16") == pytest.approx(4096 * 2048 * 128 * 2 * 1088 / 989.4e12, 1e-3)
    with pytest.raises(RecordError, match="the roof of 1 threads"):
        final(SIZES[0], 256, 1.0, roof={1: 1.0})


def test_architectures():
    assert [runs_on("sm_86", n) for n in (80, 86, 87, 89, 90)] == [False, True, False, True, False]
    assert runs_on("sm_87", 87) and not runs_on("sm_100", 101), "Tegra"
    assert not runs_on("sm_87", 89) and not runs_on("sm_101", 103), "nor its code elsewhere"
    assert [runs_on("sm_90a", n) for n in (90, 91, 100)] == [True, False, False]
    archs = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
    found = {n: best_for(n, archs) for n in (75, 80, 87, 89, 90, 103, 110, 121)}
    assert list(found.values()) == [None, "sm_80", None, "sm_89", "sm_90a", "sm_100", None, "sm_120"]
    assert is_arch("sm_120") and not is_arch("sm_9") and not is_arch("x86-64-v4") and not is_arch("compute_90")
    assert shared_bytes("sm_90a") == 227 << 10 and shared_bytes("sm_86") == shared_bytes("sm_999") == 99 << 10
    assert tensor_flops(80, 8) == tensor_flops(80, 16) and tensor_flops(89, 8) == 2 * tensor_flops(89, 16)


def test_int8():
    x = np.float32([-1e9, -128.6, -2.5, -0.5, 0.5, 1.5, 126.7, 128, np.inf, np.nan])
    assert encode(x, "int8").tolist() == [-128, -128, -2, 0, 0, 2, 127, 127, 127, 0]
    codes = np.arange(-128, 128, dtype=np.int8)
    assert np.array_equal(decode(codes, "int8"), np.arange(-128, 128, dtype=np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_element_types(dtype):
    """Rounded as ml_dtypes does, at ties too."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    codes = np.arange(256**kind.itemsize, dtype=f"u{kind.itemsize}")
    numbers = codes.view(kind).astype(np.float32)
    assert np.array_equal(decode(codes if dtype != "float16" else codes.view(kind), dtype), numbers, equal_nan=True)
    finite = np.unique(numbers[np.isfinite(numbers)])
    with np.errstate(over="ignore"):
        between = [finite[1:] * np.float32(w) + finite[:-1] * np.float32(1 - w) for w in (0.25, 0.5, 0.75)]
    x = np.concatenate([finite, *between, [np.nan, 0.0, -0.0]]).astype(np.float32)
    x = x[~np.isinf(x)]
    assert np.array_equal(
        encode(x, dtype).view(codes.dtype)[~np.isnan(x)], x.astype(kind).view(codes.dtype)[~np.isnan(x)]
    )
    assert np.isnan(decode(encode(x, dtype), dtype)[np.isnan(x)]).all()
    assert math.isclose(float(decode(encode(np.float32([1e9]), "float8_e4m3fn"), "float8_e4m3fn")[0]), 448)


def test_records_in_a_build(monkeypatch):
    """What holds is used on its architecture alone; what no search proposes is left out and reported."""
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    from dsa_tvm.build.cuda import fatbins
    from dsa_tvm.build.cuda import kernels as cuda_kernels
    from dsa_tvm.build.cuda import plan as cuda_plan
    from dsa_tvm.spec import DIMS

    monkeypatch.setattr(fatbins, "OPERATORS", {"topk": cuda_kernels.OPERATORS["topk"]})
    said = []
    absurd = [final(size, 0, 9.0, decisions={"threads": 256, "gone": 1}) for size in SIZES]
    huge = [final(size, 0, 8.0, decisions=dict(final(size, 256, 1).decisions, list_max=2**20)) for size in SIZES]
    plan = cuda_plan.Plan([*everywhere(1024, 1.25), *absurd, *huge], PRESET, said.append)
    first, second = fatbins.generate(("sm_80", "sm_90a"), DIMS, plan)
    assert (first.archs, first.ptx, second.archs) == (("sm_80",), "compute_80", ("sm_90a",))
    assert {f.threads for f in first.units[0].functions} == {512}
    assert {f.threads for f in second.units[0].functions} == {1024}
    (made,) = plan.made()
    assert (made["arch"], made["op"], made["stage"], made["speedup"]) == ("sm_90a", "topk", "rows", 1.25)
    assert made["decisions"]["threads"] == 1024
    assert sum("leaving out a record of topk on sm_90a" in line for line in said) == 6
    assert said[-1].startswith("sm_90a topk rows: list_factor=2")
    assert LENGTHS["topk"] == PRESET.topk
    plan = cuda_plan.Plan(everywhere(1024, 1.25), presets.get("deepseek-v4-512"))
    (alone,) = fatbins.generate(("sm_90a",), DIMS, plan)
    assert not plan.made() and {f.threads for f in alone.units[0].functions} == {512}


@pytest.mark.parametrize(("like", "dtype"), [("bfloat16", "float16"), ("float8_e4m3fn", "int8")])
def test_what_is_not_tuned_follows_what_is(like, dtype):
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    from dsa_tvm.build.cuda.plan import Plan
    from dsa_tvm.build.cuda.space import Space

    lengths = vars(PRESET)
    space = Space("lightning_indexer", "sm_100", "many", (like,) * 2, lengths)
    default = space.DEFAULT["sm_100"]
    decisions = dict(vars(default), queries=1)
    element_types = {"types": (like, like), "decisions": decisions, "target": "sm_100"}
    records = [final((4096, 65536), 0, 1.5, "lightning_indexer", **element_types)]
    plan = Plan(records, PRESET)

    def made(stage, dtype, d_idx=128):
        variant = {"T": dtype, "K": dtype}
        return plan("sm_100", "lightning_indexer", stage, variant, {"d_idx": d_idx}, default).queries

    assert made("many", like) == made("many", dtype) == 1 != default.queries
    assert {made("few", like), made("many", "float32"), made("many", like, 64)} == {default.queries}
