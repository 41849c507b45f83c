"""The sm_90a indexer, run on the CPU, against float64."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
from samples import indexer_inputs

from emulator import Emulator, TensorMap, indexer

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source
from dsa_tvm.schedules.cuda.indexer.sm90.kernel import (
    DEFAULT,
    Decisions,
    choices,
    default,
    padded_heads,
    serves,
    span,
    tensor_ir,
)

SPEC = indexer.SPEC
FP8, BF16, F16 = (dict.fromkeys("TK", t) for t in ("float8_e4m3fn", "bfloat16", "float16"))

#: Kernels by name: types, decisions, width and heads.
KERNELS = {
    "fp8": (FP8, default(FP8, 128, few_queries=False), 128, 64),
    "fp8-32": (FP8, default(FP8, 128, few_queries=False), 128, 32),
    "fp8-few": (FP8, default(FP8, 128, few_queries=True), 128, 64),
    "bf16": (BF16, default(BF16, 128, few_queries=False), 128, 64),
    "f16": (F16, Decisions(3, 64, 1, 2), 64, 32),
    # Rows of other bytes, sums of other numbers of queries.
    "fp8-2": (FP8, Decisions(2, 128, 2, 4), 128, 64),
    "fp8-64": (FP8, Decisions(2, 64, 1, 2), 64, 64),
    "fp8-96": (FP8, Decisions(2, 64, 2, 3), 96, 32),
    "fp8-wide": (FP8, Decisions(2, 256, 1, 2), 32, 32),
    "bf16-wide": (BF16, Decisions(2, 256, 1, 3), 32, 64),
    "bf16-3": (BF16, Decisions(3, 64, 2, 2), 96, 64),
}

#: Orders of threads and whether asynchronous work is done at once.
SCHEDULES = [(0, False), (1, True), (2, False), (3, True), (0, True), (1, False)]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    functions = [(_symbol(name), tensor_ir(*kernel)) for name, kernel in KERNELS.items()]
    return Emulator(source.cuda_source(functions), source.DEVICE_HEADERS, tmp_path_factory.mktemp("hopper_indexer"))


def _symbol(name):
    return "indexer_" + name.replace("-", "_")


def launch(emulator, name, a, *, out=None, m0=0, m1=None, row0=0, tiles=2, fill=1, schedule=(0, False)):
    """Logits of `a`, written to rows of `out` where that is given."""
    variant, c, d_idx, heads = KERNELS[name]
    s_q, h_idx, _ = a["q"].shape
    s_kv = len(a["k"])
    m1 = s_q if m1 is None else m1
    out = np.full((s_q, s_kv), 77, np.float32) if out is None else out
    runs = -(-s_kv // (tiles * c.block_keys))
    blocks = -(-(m1 - m0) // c.queries(heads))
    swizzle = span(variant, d_idx)
    maps = (
        TensorMap(a["q"], c.q_box(variant, d_idx, heads), swizzle),
        TensorMap(a["k"], c.k_box(variant, d_idx), swizzle),
    )
    tensors = [a[n] for n in ("weights", "ks", "ke", "k_scale")]
    for x in (*tensors, a["q"], a["k"]):
        if x is not None:
            x.flags.writeable = False
    scalars = (s_kv, h_idx, m0, m1, row0, tiles, int(a["k_scale"] is not None), fill, blocks, runs)
    emulator.launch(
        _symbol(name),
        (blocks, runs),
        *maps,
        *tensors,
        out,
        *scalars,
        shared_bytes=c.shared_bytes(variant, d_idx),
        order=schedule[0],
        eager=schedule[1],
    )
    return out


def check(emulator, name, a, **options):
    return indexer.check(partial(launch, emulator, name), a, **options)


def inputs(name, seed=0, **sizes):
    variant, _, d_idx, _ = KERNELS[name]
    return indexer_inputs(np.random.default_rng(seed), variant, d_idx=d_idx, **sizes)


@pytest.mark.parametrize("name", KERNELS)
def test_repetitive_rows(emulator, name):
    variant, _, d_idx, heads = KERNELS[name]
    indexer.check_repetitive_rows(partial(launch, emulator, name), variant, heads, d_idx)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scaled", [False, True])
def test_kernels(emulator, name, scaled):
    a = inputs(name, s_kv=400, h_idx=KERNELS[name][3], scaled=scaled)
    for schedule in SCHEDULES[scaled::2]:
        check(emulator, name, a, schedule=schedule)


@pytest.mark.parametrize("name", KERNELS)
def test_more_tiles_than_stages(emulator, name):
    a = inputs(name, s_q=2, s_kv=1500, h_idx=5, scaled=True)
    for schedule in SCHEDULES[:4]:
        check(emulator, name, a, tiles=1000, schedule=schedule)


@pytest.mark.parametrize("name", ["fp8", "fp8-few", "bf16-3", "fp8-wide"])
@pytest.mark.parametrize("h_idx", [1, 2, 7, 8, 31, 32, 33, 63, 64])
def test_heads(emulator, name, h_idx):
    if h_idx <= KERNELS[name][3]:
        check(emulator, name, inputs(name, h_idx, s_kv=77, h_idx=h_idx), schedule=SCHEDULES[h_idx % 4])


@pytest.mark.parametrize("s_kv", [1, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("s_q", [1, 2, 9])
@pytest.mark.parametrize("tiles", [1, 1000])
def test_lengths(emulator, s_q, s_kv, tiles):
    for name in ("fp8-64", "bf16-3", "fp8-96"):
        a = inputs(name, s_kv, s_q=s_q, s_kv=s_kv, h_idx=3)
        a["ke"][:] = s_kv
        check(emulator, name, a, tiles=tiles, schedule=SCHEDULES[s_kv % 6])


@pytest.mark.parametrize("name", ["fp8-64", "fp8-96", "bf16-3"])
@pytest.mark.parametrize("tiles", [1, 3, 1000])
def test_ranges(emulator, name, tiles):
    a = inputs(name, s_q=40, s_kv=500, h_idx=4)
    indexer.any_ranges(a, tiles)
    for schedule in SCHEDULES[:4]:
        check(emulator, name, a, tiles=tiles, schedule=schedule)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("h_idx", [1, 31, 32])
def test_nan_and_infinity_go_where_they_belong(emulator, name, h_idx):
    a = inputs(name, s_kv=150, h_idx=h_idx)
    indexer.nan_and_infinity(a)
    logits = check(emulator, name, a, schedule=SCHEDULES[h_idx % 4])
    assert np.isnan(logits[0]).sum() < 5 < np.isfinite(logits[0]).sum()


@pytest.mark.parametrize("name", ["fp8-64", "f16"])
def test_every_code_of_a_key_is_read_exactly(emulator, name):
    codes = indexer.key_codes(KERNELS[name][0]["K"], 1 if name == "fp8-64" else 17)
    indexer.check_codes(partial(launch, emulator, name), inputs(name, s_q=2, s_kv=len(codes), h_idx=1), codes)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_sums_of_tensor_cores(emulator, name):
    indexer.check_narrow_sums(emulator, partial(launch, emulator, name), KERNELS[name][0]["T"])


def test_unseen_keys_do_not_matter(emulator):
    indexer.check_unseen_keys(partial(launch, emulator, "fp8"), inputs("fp8", s_kv=500, scaled=True))


def test_decisions_do_not_change_bits(emulator):
    a = inputs("fp8", s_kv=400, h_idx=20, scaled=True)
    many = launch(emulator, "fp8", a, tiles=2)
    for name in ("fp8-few", "fp8-32"):
        np.testing.assert_array_equal(launch(emulator, name, a, tiles=1), many)


@pytest.mark.parametrize("name", ["fp8", "bf16-3"])
def test_some_queries(emulator, name):
    indexer.check_some_queries(partial(launch, emulator, name), inputs(name, s_q=12, s_kv=300, h_idx=4))


@pytest.mark.parametrize("d_idx", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("few_queries", [False, True])
def test_defaults_fit(d_idx, few_queries):
    for variant in (v for v in SPEC.variants if serves(v)):
        c = default(variant, d_idx, few_queries)
        assert c.shared_bytes(variant, d_idx) <= c.shared_limit
        assert c.warpgroups in choices("sm_90a")["warpgroups"] and c.columns in choices("sm_90a")["columns"]
    assert [padded_heads(h) for h in (1, 32, 33, 64)] == [32, 32, 64, 64]


def test_what_there_is_no_kernel_for():
    assert {tuple(v.values()) for v in SPEC.variants if serves(v)} == {
        (t, t) for t in ("float8_e4m3fn", "bfloat16", "float16")
    }
    default_ = DEFAULT["sm_90a"]
    for wrong in ({"warpgroups": 5}, {"columns": 32}, {"parts": 3}, {"columns": 256}, {"stages": 1}):
        with pytest.raises(ValueError, match="lightning_indexer"):
            Decisions(**{**asdict(default_), **wrong})
    for arguments, message in (
        ((SPEC.variants[0], default_), "no sm_90a kernel"),
        ((FP8, default_, 48), "d_idx"),
        ((FP8, default_, 128, 16), "heads: expected 32 or 64"),
        ((BF16, replace(default_, stages=12), 256), "more than 115712 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            tensor_ir(*arguments)
