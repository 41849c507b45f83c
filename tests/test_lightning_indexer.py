"""The indexer against float64, and `indexer_topk` against its two parts."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close
from samples import DTYPES, indexer_inputs

import dsa_tvm
from dsa_tvm.ops import OPS

SPEC = OPS["lightning_indexer"]


def check(arguments):
    (expected,) = SPEC.reference(**arguments)
    actual = dsa_tvm.lightning_indexer(**arguments)
    assert_close(actual, expected, SPEC.tolerance["logits"]["float32"])
    return actual


@pytest.mark.parametrize("variant", SPEC.variants, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("scaled", [False, True])
def test_types(variant, scaled):
    check(indexer_inputs(np.random.default_rng(0), variant, scaled=scaled))


@pytest.mark.parametrize("h_idx", [1, 2, 7, 8, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("d_idx", [32, 64, 128])
def test_sizes(h_idx, d_idx):
    check(indexer_inputs(np.random.default_rng(h_idx), SPEC.variants[0], h_idx=h_idx, d_idx=d_idx, s_kv=77))


@pytest.mark.parametrize("s_kv", [1, 5, 6, 7, 23, 24, 25, 47, 48, 49, 255, 256, 257, 7001])
@pytest.mark.parametrize("s_q", [1, 9])
def test_lengths(s_q, s_kv):
    arguments = indexer_inputs(np.random.default_rng(s_kv), SPEC.variants[0], s_q=s_q, s_kv=s_kv, h_idx=3, d_idx=32)
    arguments["ke"][:] = s_kv
    check(arguments)


def test_ranges():
    rng = np.random.default_rng(0)
    arguments = indexer_inputs(rng, SPEC.variants[0], s_q=60, s_kv=500, h_idx=4, d_idx=32)
    arguments["ks"][:], arguments["ke"][:] = rng.integers(-50, 550, (2, 60))
    arguments["ks"][:3] = -(2**31), 2**31 - 1, 200
    arguments["ke"][:3] = 2**31 - 1, -(2**31), 201
    check(arguments)


def test_unseen_keys_do_not_matter():
    arguments = indexer_inputs(np.random.default_rng(0), SPEC.variants[0], scaled=True)
    arguments["ks"][:], arguments["ke"][:] = 100, 200
    before = dsa_tvm.lightning_indexer(**arguments)
    for part in (slice(None, 100), slice(200, None)):
        arguments["k"][part] = np.nan
        arguments["k_scale"][part] = np.nan
    np.testing.assert_array_equal(dsa_tvm.lightning_indexer(**arguments), before)


@pytest.mark.parametrize("h_idx", [3, 64])
def test_nan_and_infinity_go_where_they_belong(h_idx):
    arguments = indexer_inputs(np.random.default_rng(0), SPEC.variants[0], h_idx=h_idx)
    arguments["q"] = np.abs(arguments["q"])
    arguments["weights"] = np.abs(arguments["weights"])
    arguments["k"][3, 5] = np.nan
    arguments["k"][50, 7] = np.inf
    arguments["k"][51, 7] = -np.inf
    logits = check(arguments)
    assert np.isnan(logits[:, 3]).all() and np.isposinf(logits[:, 50]).all() and (logits[:, 51] == 0).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn"])
def test_every_code_is_read_exactly(name):
    """One head, q = e0, weight 1: the logit is relu of the key's first entry."""
    width = DTYPES[name].itemsize
    codes = np.arange(256**width, dtype=f"uint{8 * width}")
    k = np.zeros((len(codes), 32), DTYPES[name])
    k[:, 0] = codes.view(DTYPES[name])
    for sign in (1, -1):
        q = np.zeros((1, 1, 32), DTYPES[name])
        q[0, 0, 0] = sign
        n = np.array([len(codes)], np.int32)
        logits = dsa_tvm.lightning_indexer(q, k, np.ones((1, 1), np.float32), n * 0, n)
        with np.errstate(invalid="ignore"):  # of signalling NaN
            values = sign * k[:, 0].astype(np.float32)
        np.testing.assert_array_equal(logits[0], np.where(values <= 0, np.float32(0), values))


@pytest.mark.parametrize("variant", SPEC.variants, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("s_q", [1, 5, 70])
def test_fused_selects_what_the_parts_select(variant, s_q):
    arguments = indexer_inputs(np.random.default_rng(s_q), variant, s_q=s_q, s_kv=1000, h_idx=8, d_idx=64, scaled=True)
    logits = dsa_tvm.lightning_indexer(**arguments)
    for topk in (1, 100, 2048):
        expected = dsa_tvm.topk(logits, arguments["ks"], arguments["ke"], topk)
        np.testing.assert_array_equal(dsa_tvm.indexer_topk(**arguments, topk=topk), expected)


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 10), (3, 0), (0, 0)])
def test_empty(s_q, s_kv):
    arguments = indexer_inputs(np.random.default_rng(0), SPEC.variants[0], s_q=s_q, s_kv=s_kv, h_idx=2, d_idx=32)
    assert dsa_tvm.lightning_indexer(**arguments).shape == (s_q, s_kv)
    assert (dsa_tvm.indexer_topk(**arguments, topk=4) == np.full((s_q, 4), -1)).all()
