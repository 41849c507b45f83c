"""The CUDA indexer, run on the CPU, against float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from samples import DTYPES, indexer_inputs

from emulator import Emulator, indexer

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source
from dsa_tvm.schedules.cuda.indexer.portable.kernel import Decisions, default, product_of, tensor_ir

SPEC = indexer.SPEC
BF16, FP8, INT8 = (dict.fromkeys("TK", name) for name in ("bfloat16", "float8_e4m3fn", "int8"))
ALL = {"-".join(v.values()): v for v in SPEC.variants}
SMALL = Decisions(warps=2, key_tiles=1, head_tiles=2, queries=2, stages=2)


def _default(variant, few_queries=False, arch="cuda"):
    return variant, product_of(variant, arch), default(variant, 128, few_queries, arch), 128


#: Kernels by name: types, what is multiplied, decisions and width.
KERNELS = {
    **{name: (variant, product_of(variant), SMALL, 64) for name, variant in ALL.items()},
    "fp8": (FP8, "float8_e4m3fn", SMALL, 64),
    # Rows of 64 and 32 bytes, which are padded; more of everything else.
    "bf16-32": (BF16, "bfloat16", Decisions(warps=1, key_tiles=4, head_tiles=4, queries=3, stages=3), 32),
    "f32-32": (ALL["float32-float32"], "float32", Decisions(2, key_tiles=2, head_tiles=4, queries=3, stages=3), 32),
    "fp8-f16-32": (FP8, "float16", Decisions(warps=2, key_tiles=2, head_tiles=4, queries=1, stages=4), 32),
    "fp8-32": (FP8, "float8_e4m3fn", Decisions(warps=2, key_tiles=4, head_tiles=4, queries=3, stages=4), 32),
    "int8-32": (INT8, "int8", Decisions(warps=1, key_tiles=2, head_tiles=2, queries=3, stages=3), 32),
    "f32-fp8-32": (ALL["float32-float8_e4m3fn"], "bfloat16", Decisions(2, 2, 4, queries=2, stages=3), 32),
    "bf16-few": _default(BF16, few_queries=True),
    "bf16-many": _default(BF16),
    "f32-many": _default(ALL["float32-float32"]),
    "fp8-f16-many": _default(FP8),
    "fp8-many": _default(FP8, arch="sm_89"),
    "int8-few": _default(INT8, few_queries=True),
    "int8-many": _default(INT8),
    "int8-256": (INT8, "int8", Decisions(warps=2, key_tiles=4, head_tiles=2, queries=1, stages=1), 256),
}

#: Orders of threads and whether copies land at once.
SCHEDULES = [(0, False), (1, True), (2, False), (3, True)]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    functions = [(_symbol(name), tensor_ir(*kernel)) for name, kernel in KERNELS.items()]
    return Emulator(source.cuda_source(functions), source.DEVICE_HEADERS, tmp_path_factory.mktemp("indexer"))


def _symbol(name):
    return "indexer_" + name.replace("-", "_")


def _unaligned(x):
    """The same memory, which an order of threads that puts it before a guard page misaligns by an element."""
    return np.append(x.ravel(), x.ravel()[:1])


def launch(emulator, name, a, *, out=None, m0=0, m1=None, row0=0, tiles=2, fill=1, schedule=(0, False), misalign=False):
    """Logits of `a`, written to rows of `out` where that is given."""
    variant, product, c, d_idx = KERNELS[name]
    s_q, h_idx, _ = a["q"].shape
    s_kv = len(a["k"])
    m1 = s_q if m1 is None else m1
    out = np.full((s_q, s_kv), 77, np.float32) if out is None else out
    runs = -(-s_kv // (tiles * c.block_keys))
    blocks = -(-(m1 - m0) // c.queries)
    tensors = [a[n] for n in ("q", "k", "weights", "ks", "ke", "k_scale")]
    if misalign:
        assert schedule[0] % 2 == 0
        tensors = [None if x is None else _unaligned(x) for x in tensors]
    for x in tensors:
        if x is not None:
            x.flags.writeable = False
    scalars = (s_kv, h_idx, m0, m1, row0, tiles, int(a["k_scale"] is not None), fill, blocks, runs)
    emulator.launch(
        _symbol(name),
        (blocks, runs),
        *tensors,
        out,
        *scalars,
        shared_bytes=c.shared_bytes(variant, product, d_idx, h_idx),
        order=schedule[0],
        eager=schedule[1],
    )
    assert emulator.bank_conflicts == 0
    return out


def check(emulator, name, a, **options):
    return indexer.check(partial(launch, emulator, name), a, **options)


def inputs(name, seed=0, **sizes):
    variant, _, _, d_idx = KERNELS[name]
    return indexer_inputs(np.random.default_rng(seed), variant, d_idx=d_idx, **sizes)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scaled", [False, True])
def test_kernels(emulator, name, scaled):
    a = inputs(name, s_kv=270, h_idx=33, scaled=scaled)
    for schedule in SCHEDULES:
        # One run of more tiles than there are stages, and several.
        for tiles in (1000, 2):
            check(emulator, name, a, tiles=tiles, schedule=schedule)


@pytest.mark.parametrize("name", KERNELS)
def test_repetitive_rows(emulator, name):
    variant, _, _, d_idx = KERNELS[name]
    indexer.check_repetitive_rows(partial(launch, emulator, name), variant, 64, d_idx)


@pytest.mark.parametrize("name", KERNELS)
def test_unaligned(emulator, name):
    check(emulator, name, inputs(name, s_kv=131, h_idx=7, scaled=True), misalign=True)


@pytest.mark.parametrize(
    "name", ["bf16-32", "bfloat16-bfloat16", "bf16-many", "f32-32", "fp8-f16-32", "fp8-32", "f32-fp8-32", "int8-32"]
)
@pytest.mark.parametrize("h_idx", [1, 8, 15, 16, 17, 32, 33, 63, 64])
def test_heads(emulator, name, h_idx):
    check(emulator, name, inputs(name, h_idx, s_kv=77, h_idx=h_idx), schedule=SCHEDULES[h_idx % 4])


@pytest.mark.parametrize("s_kv", [1, 15, 31, 32, 33, 63, 64, 65, 127, 128, 129, 500])
@pytest.mark.parametrize("s_q", [1, 2, 7])
@pytest.mark.parametrize("tiles", [1, 3, 1000])
def test_lengths(emulator, s_q, s_kv, tiles):
    for name in ("bfloat16-bfloat16", "bf16-32", "f32-32", "fp8-32", "int8-32"):
        a = inputs(name, s_kv, s_q=s_q, s_kv=s_kv, h_idx=3)
        a["ke"][:] = s_kv
        check(emulator, name, a, tiles=tiles, schedule=SCHEDULES[s_kv % 4])


@pytest.mark.parametrize("name", ["bfloat16-bfloat16", "bf16-32", "fp8-f16-32", "fp8-32", "f32-32", "int8-int8"])
@pytest.mark.parametrize("tiles", [1, 4, 1000])
def test_ranges(emulator, name, tiles):
    a = inputs(name, s_q=60, s_kv=500, h_idx=4)
    indexer.any_ranges(a, tiles)
    for schedule in SCHEDULES:
        check(emulator, name, a, tiles=tiles, schedule=schedule)


@pytest.mark.parametrize("name", [*(name for name in ALL if name != "int8-int8"), "fp8"])
@pytest.mark.parametrize("h_idx", [1, 33])
def test_nan_and_infinity_go_where_they_belong(emulator, name, h_idx):
    a = inputs(name, s_kv=150, h_idx=h_idx)
    indexer.nan_and_infinity(a)
    a["weights"][4, -1] = np.inf
    for schedule in SCHEDULES:
        logits = check(emulator, name, a, schedule=schedule)
    assert np.isnan(logits[0]).sum() < 5 < np.isfinite(logits[0]).sum()


@pytest.mark.parametrize("name", ["bfloat16-bfloat16", "float16-float16", "bfloat16-float8_e4m3fn", "fp8", "int8-int8"])
def test_every_code_of_a_key_is_read_exactly(emulator, name):
    codes = indexer.key_codes(KERNELS[name][0]["K"])
    indexer.check_codes(partial(launch, emulator, name), inputs(name, s_q=2, s_kv=len(codes), h_idx=1), codes)


@pytest.mark.parametrize(
    "name",
    ["float8_e4m3fn-float8_e4m3fn", "float32-float8_e4m3fn", "float16-float8_e4m3fn", "fp8", "int8-int8"],
)
def test_every_element_of_a_query_is_read_exactly(emulator, name):
    """A key for each of them that is zero elsewhere: none is lost on the way, and none in another's place."""
    dtype = DTYPES[KERNELS[name][0]["T"]]
    a = inputs(name, s_q=4, s_kv=64, h_idx=2)
    bits = np.random.default_rng(0).integers(0, 256**dtype.itemsize, (4, 2, 64), dtype=f"uint{8 * dtype.itemsize}")
    a["q"] = bits.view(dtype)
    # Smaller numbers have parts that are less than the least bf16.
    a["q"][~(np.abs(a["q"].astype(np.float64)) > 1e-30) | ~np.isfinite(a["q"].astype(np.float64))] = 2
    a["k"][:] = np.eye(64)
    a["weights"][:] = 1, 0
    a["ke"][:] = 64
    logits = launch(emulator, name, a)
    np.testing.assert_array_equal(logits, np.maximum(a["q"][:, 0].astype(np.float32), 0))


@pytest.mark.parametrize("name", ["fp8-many", "bf16-many"])
def test_sums_of_tensor_cores(emulator, name):
    indexer.check_narrow_sums(emulator, partial(launch, emulator, name), KERNELS[name][0]["T"])


def test_unseen_keys_do_not_matter(emulator):
    indexer.check_unseen_keys(partial(launch, emulator, "bf16-many"), inputs("bf16-many", s_kv=500, scaled=True))


def test_decisions_do_not_change_bits(emulator):
    for kind in ("bf16", "int8"):
        a = inputs(f"{kind}-many", s_kv=400, scaled=True)
        many = launch(emulator, f"{kind}-many", a, tiles=2)
        np.testing.assert_array_equal(launch(emulator, f"{kind}-few", a, tiles=1), many)


@pytest.mark.parametrize("name", ["bfloat16-bfloat16", "bf16-32", "fp8-32", "int8-32"])
def test_some_queries(emulator, name):
    indexer.check_some_queries(partial(launch, emulator, name), inputs(name, s_q=12, s_kv=300, h_idx=4))


@pytest.mark.parametrize("ends", [(-128, -128), (-128, 127), (127, 127)])
def test_the_largest_sums_of_integers_are_exact(emulator, ends):
    """They reach 2**22, where f32 numbers with the bits of a larger one plus a sum end."""
    a = inputs("int8-256", s_q=2, s_kv=70, h_idx=1)
    a["q"][:], a["k"][:], a["weights"][:], a["ke"][:] = *ends, 1, 70
    a["q"][1] += np.int8(1) if ends[0] < 0 else np.int8(-1)
    scores = a["q"][:, 0].astype(np.int64) @ a["k"].astype(np.int64).T
    np.testing.assert_array_equal(launch(emulator, "int8-256", a), np.maximum(scores, 0).astype(np.float32))


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 10), (3, 0)])
def test_empty(emulator, s_q, s_kv):
    launch(emulator, "bf16-32", inputs("bf16-32", s_q=s_q, s_kv=s_kv, h_idx=2))
