"""Checks that the tests of both indexers share. ``run(a, **options)`` returns the logits of the inputs `a`."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close
from samples import DTYPES, indexer_inputs

from dsa_tvm.ops import OPS

SPEC = OPS["lightning_indexer"]


def check(run, a, tolerance="float32", **options):
    """Compare the logits with float64, by default with the tolerance of float32 sums."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        (expected,) = SPEC.reference(**a)
    logits = run(a, **options)
    assert_close(logits, expected, SPEC.tolerance["logits"][tolerance])
    return logits


def check_narrow_sums(emulator, run, dtype):
    """Check that the sums of tensor cores are within the tolerance of the type.

    Those of e4m3 on sm_89 and sm_90a are not within that of float32; sm_120 keeps 25 places of them (MMA-Sim,
    arXiv:2511.10909), as of others.
    """
    variant = dict.fromkeys("TK", dtype)
    narrow = dtype == "float8_e4m3fn"
    for seed, sizes in enumerate(({"h_idx": 1}, {"h_idx": 33, "scaled": True}, {"h_idx": 64, "scaled": True})):
        a = indexer_inputs(np.random.default_rng(seed), variant, s_kv=600, d_idx=128, **sizes)
        with emulator.narrow_sums(13 if narrow else 23):
            check(run, a, dtype)
            if narrow:
                with pytest.raises(AssertionError, match="expected errors within the tolerance"):
                    check(run, a)
        if narrow:
            with emulator.narrow_sums(25):
                check(run, a)
        with emulator.narrow_sums(13 if narrow else 23):
            # Of one sign, all that is cut off adds up.
            a["q"], a["k"], a["weights"] = np.abs(a["q"]), np.abs(a["k"]), np.abs(a["weights"])
            check(run, a, dtype)


def check_repetitive_rows(run, variant, h_idx, d_idx):
    """Check equal heads, queries and keys, which give long sums of equal terms."""
    a = indexer_inputs(np.random.default_rng(1), variant, s_kv=200, h_idx=h_idx, d_idx=d_idx)
    a["q"][:], a["k"][:] = np.abs(a["q"][0, 0]), np.abs(a["k"][0])
    check(run, a)
    # The same number everywhere, with many digits in its products and sums.
    one = {name: np.full_like(a[name], a[name].flat[2]) for name in ("q", "k")}
    check(run, a | one | {"weights": np.full_like(a["weights"], 1 / 3)})


def any_ranges(a, seed):
    """Ranges of 500 keys in and out of bounds, also empty ones and ones of a single key."""
    a["ks"][:], a["ke"][:] = np.random.default_rng(seed).integers(-50, 550, (2, len(a["ks"])))
    a["ks"][:5] = -(2**31), 2**31 - 1, 200, 499, 0
    a["ke"][:5] = 2**31 - 1, -(2**31), 201, 500, 0


def nan_and_infinity(a):
    """NaN and infinities in queries and keys. Only some rows have a product of infinity and 0."""
    a["ke"][:] = len(a["k"])
    for argument in ("q", "k"):
        a[argument][a[argument] == 0] = 1
    a["k"][3, 5] = np.nan
    a["k"][50, 7], a["k"][51, 8] = np.inf, -np.inf  # NaN in e4m3
    a["q"][1, 0, 9] = np.nan
    a["q"][2, 0, 10], a["q"][3, 0, 11] = np.inf, -np.inf
    a["k"][[60, 61, 62], [10, 11, 9]] = 0


def key_codes(dtype, step=1):
    """All bit patterns of a key, or every `step`-th."""
    width = DTYPES[dtype].itemsize
    return np.arange(0, 256**width, step, f"uint{8 * width}").view(DTYPES[dtype])


def check_codes(run, a, codes):
    """With one head, q = e0 and weight 1, the logit is relu of the key's first entry."""
    a["q"][:], a["k"][:], a["weights"][:] = 0, 0, 1
    a["q"][:, 0, 0] = 1, -1
    a["k"][:, 0] = codes
    a["ke"][:] = len(codes)
    with np.errstate(invalid="ignore"):  # of signalling NaN
        values = np.stack([a["k"][:, 0].astype(np.float32), -a["k"][:, 0].astype(np.float32)])
    np.testing.assert_array_equal(run(a, tiles=64), np.where(values <= 0, np.float32(0), values))


def check_unseen_keys(run, a):
    """Check that of 500 keys only those in [100, 200) matter."""
    a["ks"][:], a["ke"][:] = 100, 200
    before = run(a)
    a = {**a, "k": a["k"].copy(), "k_scale": a["k_scale"].copy()}
    for part in (slice(None, 100), slice(200, None)):
        a["k"][part] = np.nan
        a["k_scale"][part] = np.nan
    np.testing.assert_array_equal(run(a, schedule=(1, True)), before)


def check_some_queries(run, a):
    """Check a launch for some of 12 queries: it writes only their rows, and there only the keys that they see."""
    a["ks"][:], a["ke"][:] = np.arange(12) * 20 - 10, np.arange(12) * 25 + 20
    a["ke"][7] = 0
    everything = run(a)
    for m0, m1, row0 in ((0, 12, 0), (5, 10, 2), (11, 12, 0), (3, 3, 1)):
        for fill in (0, 1):
            out = np.full((row0 + m1 - m0, 300), 77, np.float32)
            run(a, out=out, m0=m0, m1=m1, row0=row0, fill=fill)
            expected = np.full_like(out, 77)
            expected[row0:] = everything[m0:m1]
            if not fill:
                expected[np.isneginf(expected)] = 77
            np.testing.assert_array_equal(out, expected)
