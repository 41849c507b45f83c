"""The indexer against float64, and `indexer_topk` against its two parts."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close, tolerance_of
from devices import dots_of_8_bits, dots_of_bf16, run
from samples import DTYPES, indexer_inputs

from dsa_tvm.ops import OPS

SPEC = OPS["lightning_indexer"]


def check(arguments, device):
    (expected,) = SPEC.reference(**arguments)
    actual = run("lightning_indexer", device, **arguments)
    assert_close(actual, expected, tolerance_of(SPEC, "logits", arguments["q"].dtype.name, device))
    return actual


@pytest.mark.parametrize("variant", SPEC.variants, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("scaled", [False, True])
def test_types(variant, scaled, device):
    check(indexer_inputs(np.random.default_rng(0), variant, scaled=scaled), device)


@pytest.mark.parametrize("h_idx", [1, 2, 7, 8, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("d_idx", [32, 64, 128])
def test_sizes(h_idx, d_idx, device):
    check(indexer_inputs(np.random.default_rng(h_idx), SPEC.variants[0], h_idx=h_idx, d_idx=d_idx, s_kv=77), device)


@pytest.mark.parametrize("variant", SPEC.variants, ids=lambda v: "-".join(v.values()))
def test_any_number_of_heads(variant, device):
    """Tiles of several widths share them out, and change no bit."""
    for h_idx in range(1, 65):
        for s_q, s_kv in ((1, 30), (3, 77)):
            check(indexer_inputs(np.random.default_rng(h_idx), variant, h_idx=h_idx, s_q=s_q, s_kv=s_kv), device)
    arguments = indexer_inputs(np.random.default_rng(0), variant, h_idx=64, s_kv=77)
    for h_idx in range(1, 65):
        fewer = arguments | {n: np.ascontiguousarray(arguments[n][:, :h_idx]) for n in ("q", "weights")}
        padded = arguments | {"weights": np.where(np.arange(64) < h_idx, arguments["weights"], np.float32(0))}
        both = [run("lightning_indexer", device, **x) for x in (fewer, padded)]
        if device == "cpu":  # the order of the sum is that of the heads, however they are tiled
            np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("s_kv", [1, 5, 6, 7, 23, 24, 25, 47, 48, 49, 255, 256, 257, 7001])
@pytest.mark.parametrize("s_q", [1, 9])
def test_lengths(s_q, s_kv, device):
    arguments = indexer_inputs(np.random.default_rng(s_kv), SPEC.variants[0], s_q=s_q, s_kv=s_kv, h_idx=3, d_idx=32)
    arguments["ke"][:] = s_kv
    check(arguments, device)


def test_ranges(device):
    rng = np.random.default_rng(0)
    arguments = indexer_inputs(rng, SPEC.variants[0], s_q=60, s_kv=500, h_idx=4, d_idx=32)
    arguments["ks"][:], arguments["ke"][:] = rng.integers(-50, 550, (2, 60))
    arguments["ks"][:3] = -(2**31), 2**31 - 1, 200
    arguments["ke"][:3] = 2**31 - 1, -(2**31), 201
    check(arguments, device)


def test_unseen_keys_do_not_matter(device):
    arguments = indexer_inputs(np.random.default_rng(0), SPEC.variants[0], scaled=True)
    arguments["ks"][:], arguments["ke"][:] = 100, 200
    before = run("lightning_indexer", device, **arguments)
    for part in (slice(None, 100), slice(200, None)):
        arguments["k"][part] = np.nan
        arguments["k_scale"][part] = np.nan
    np.testing.assert_array_equal(run("lightning_indexer", device, **arguments), before)


@pytest.mark.parametrize("h_idx", [3, 64])
def test_nan_and_infinity_go_where_they_belong(h_idx, device):
    arguments = indexer_inputs(np.random.default_rng(0), SPEC.variants[0], h_idx=h_idx)
    arguments["q"] = np.abs(arguments["q"])
    arguments["weights"] = np.abs(arguments["weights"])
    arguments["k"][3, 5] = np.nan
    arguments["k"][50, 7] = np.inf
    arguments["k"][51, 7] = -np.inf
    logits = check(arguments, device)
    assert np.isnan(logits[:, 3]).all() and np.isposinf(logits[:, 50]).all() and (logits[:, 51] == 0).all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8"])
def test_types_of_8_bits_are_multiplied_as_precisely_as_float32(name, scaled):
    """On a CPU; a GPU may sum them in another precision. Kernels with dot products add up in another order."""
    given = indexer_inputs(np.random.default_rng(0), dict.fromkeys("TK", name), scaled=scaled)
    wide = given | {n: given[n].astype(np.float32) for n in ("q", "k")}
    logits = run("lightning_indexer", "cpu", **given)
    if dots_of_8_bits(name):
        assert_close(logits, SPEC.reference(**wide)[0], SPEC.tolerance["logits"]["float32"])
    else:
        np.testing.assert_array_equal(logits, run("lightning_indexer", "cpu", **wide))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "int8"])
def test_every_code_is_read_exactly(name, device):
    """One head, q = e0, weight 1: the logit is relu of the key's first entry."""
    width = DTYPES[name].itemsize
    codes = np.arange(256**width, dtype=f"uint{8 * width}")
    k = np.zeros((len(codes), 32), DTYPES[name])
    k[:, 0] = codes.view(DTYPES[name])
    for sign in (1, -1):
        q = np.zeros((1, 1, 32), DTYPES[name])
        q[0, 0, 0] = sign
        n = np.array([len(codes)], np.int32)
        logits = run("lightning_indexer", device, q, k, np.ones((1, 1), np.float32), n * 0, n)
        with np.errstate(invalid="ignore"):  # of signalling NaN
            values = sign * k[:, 0].astype(np.float32)
        if dots_of_bf16(device) and name == "bfloat16":
            values = np.where(np.abs(values) < 2.0**-126, np.float32(0), values)
        np.testing.assert_array_equal(logits[0], np.where(values <= 0, np.float32(0), values))


@pytest.mark.parametrize("variant", SPEC.variants, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("s_q", [1, 5, 70])
def test_fused_selects_what_the_parts_select(variant, s_q, device):
    arguments = indexer_inputs(np.random.default_rng(s_q), variant, s_q=s_q, s_kv=1000, h_idx=8, d_idx=64, scaled=True)
    logits = run("lightning_indexer", device, **arguments)
    for topk in (1, 100, 2048):
        expected = run("topk", device, logits, arguments["ks"], arguments["ke"], topk)
        np.testing.assert_array_equal(run("indexer_topk", device, **arguments, topk=topk), expected)


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 10), (3, 0), (0, 0)])
def test_empty(s_q, s_kv, device):
    arguments = indexer_inputs(np.random.default_rng(0), SPEC.variants[0], s_q=s_q, s_kv=s_kv, h_idx=2, d_idx=32)
    assert run("lightning_indexer", device, **arguments).shape == (s_q, s_kv)
    assert (run("indexer_topk", device, **arguments, topk=4) == np.full((s_q, 4), -1)).all()
