"""Sparse attention against float64, and `dsa_attention` against its parts."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close
from devices import dots_of_bf16, run
from samples import DTYPES, attention_inputs, indexer_inputs

from dsa_tvm.ops import OPS

SPEC = OPS["sparse_mla"]


def check(arguments, device, sm_scale=576**-0.5):
    expected = SPEC.reference(**arguments, sm_scale=sm_scale, d_v=512)
    actual = run("sparse_mla", device, **arguments, sm_scale=sm_scale)
    dtype = arguments["q"].dtype.name
    for output, x, y in zip(SPEC.outputs, actual, expected, strict=True):
        assert_close(x, y, SPEC.tolerance[output.name][dtype])
    return actual


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize("h_q", [1, 5, 16, 33, 64, 100, 128])
def test_types_and_sizes(dtype, d_qk, h_q, device):
    check(attention_inputs(np.random.default_rng(h_q), dtype, d_qk=d_qk, h_q=h_q), device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topk", [1, 8, 23, 97])
def test_any_number_of_heads(dtype, topk, device):
    """The last ones may have a smaller tile. No head's bits depend on how many there are."""
    every = attention_inputs(np.random.default_rng(topk), dtype, s_q=2, h_q=50, topk=topk)
    expected = run("sparse_mla", device, **every, sm_scale=0.1)
    for h_q in range(1, 50):
        arguments = every | {"q": np.ascontiguousarray(every["q"][:, :h_q])}
        check(arguments, device)
        if device == "cpu":  # a GPU has a kernel of its own for few heads
            for fewer, whole in zip(run("sparse_mla", device, **arguments, sm_scale=0.1), expected, strict=True):
                np.testing.assert_array_equal(fewer, whole[:, :h_q])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topk", [1, 2, 11, 12, 13, 47, 48, 49, 95, 96, 97, 500])
def test_lengths(dtype, topk, device):
    check(attention_inputs(np.random.default_rng(topk), dtype, topk=topk), device)


@pytest.mark.parametrize(("s_kv", "topk"), [(128, 128), (1521, 512), (95, 128), (153, 256), (114, 384), (1, 4096)])
def test_shapes_that_others_test(s_kv, topk, device):
    rng = np.random.default_rng(topk)
    arguments = attention_inputs(rng, "bfloat16", s_q=2, s_kv=s_kv, topk=topk)
    arguments["indices"] = rng.integers(-5, s_kv + 40, (2, topk)).astype(np.int32)
    check(arguments, device)


def test_invalid_indices_are_skipped(device):
    rng = np.random.default_rng(0)
    arguments = attention_inputs(rng, "float32", s_q=4, topk=100)
    indices = arguments["indices"]
    indices[0] = -1
    indices[1, ::2] = 300
    indices[2, :] = [-(2**31), 2**31 - 1] * 50
    indices[3, 1:] = -1
    out, max_logits, lse = check(arguments, device)
    for row in (0, 2):
        assert (out[row] == 0).all() and np.isneginf(max_logits[row]).all() and np.isposinf(lse[row]).all()


def test_duplicates_count_twice(device):
    arguments = attention_inputs(np.random.default_rng(0), "float32", topk=6)
    arguments["indices"][:] = [3, 3, 3, 9, 9, 3]
    check(arguments, device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_of_an_unselected_row_never_shows(dtype, device):
    arguments = attention_inputs(np.random.default_rng(0), dtype, s_kv=300, topk=64)
    arguments["indices"] %= 150
    arguments["indices"][:, ::7] = -1
    arguments["indices"][:, ::11] = 300
    arguments["kv"][150:] = np.nan
    assert np.isfinite(check(arguments, device)[0].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_and_infinity_of_a_selected_row_show(dtype, device):
    arguments = attention_inputs(np.random.default_rng(0), dtype, s_q=3, topk=100)
    arguments["indices"][:] = np.arange(100)
    arguments["indices"][0, 60] = 200
    arguments["indices"][1, 3] = 201
    arguments["kv"][200, 4] = np.nan
    arguments["kv"][201, 570] = np.inf  # in the part that is key only
    check(arguments, device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_scores_minus_infinity(dtype, device):
    arguments = attention_inputs(np.random.default_rng(0), dtype, s_q=1, topk=70)
    arguments["q"] = np.abs(arguments["q"])
    arguments["kv"][:, 575] = -np.inf
    check(arguments, device)


@pytest.mark.parametrize("sm_scale", [1.0, -1.0, 0.0])
def test_large_scores_do_not_overflow(sm_scale, device):
    """The exponential of scores near 100 exceeds f32. Their f32 error shows in out, so the bound is wider."""
    arguments = attention_inputs(np.random.default_rng(0), "float32", topk=100)
    expected = SPEC.reference(**arguments, sm_scale=sm_scale, d_v=512)
    for x, y in zip(run("sparse_mla", device, **arguments, sm_scale=sm_scale), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0, np.inf, -np.inf, 30.0])
def test_attn_sink_changes_out_only(value, device):
    arguments = attention_inputs(np.random.default_rng(0), "float32", h_q=4)
    arguments["indices"][0] = -1
    plain = run("sparse_mla", device, **arguments, sm_scale=576**-0.5)
    sunk = check(arguments | {"attn_sink": np.full(4, value, np.float32)}, device)
    np.testing.assert_array_equal(sunk[1], plain[1])
    np.testing.assert_array_equal(sunk[2], plain[2])


def test_topk_length(device):
    arguments = attention_inputs(np.random.default_rng(0), "float32", s_q=6, topk=50)
    check(arguments | {"topk_length": np.array([0, 1, 49, 50, 2**31 - 1, -(2**31)], np.int32)}, device)


def normal(x):
    """Numbers as on a processor that treats subnormal float32 as 0."""
    return np.where(np.abs(x) < 2.0**-126, 0, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_out_is_rounded_to_nearest_even(dtype, device):
    """Two keys of equal weight: out is their mean, halfway between two codes for every other pair."""
    codes = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    values = codes[np.isfinite(codes.astype(np.float32)) & (np.abs(codes.astype(np.float32)) < 1e30)]
    values = np.sort(values.astype(np.float32)).astype(DTYPES[dtype])
    values = values[: len(values) // 512 * 512].reshape(-1, 512)
    kv = np.zeros((2 * len(values), 576), DTYPES[dtype])
    kv[0::2, :512] = values
    kv[1::2, :512] = np.roll(values, 1, axis=1)
    q = np.zeros((len(values), 1, 576), DTYPES[dtype])
    indices = np.arange(2 * len(values), dtype=np.int32).reshape(-1, 2)
    out, _, lse = run("sparse_mla", device, q, kv, indices, sm_scale=1)
    addends = kv[0::2, :512].astype(np.float64), kv[1::2, :512].astype(np.float64)
    if dtype == "bfloat16" and dots_of_bf16(device):
        total = normal(normal(addends[0]) + normal(addends[1]))
    else:
        total = sum(addends)
    mean = total / 2
    expected = mean.astype(np.float32).astype(DTYPES[dtype])
    np.testing.assert_array_equal(out[:, 0].view(np.uint16) & 0x7FFF, expected.view(np.uint16) & 0x7FFF)
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("variant", OPS["dsa_attention"].variants, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("s_q", [1, 70])
def test_dsa_attention_is_its_parts(variant, s_q, device):
    rng = np.random.default_rng(s_q)
    index = indexer_inputs(rng, variant, s_q=s_q, s_kv=500, h_idx=8, d_idx=64, scaled=True)
    attention = attention_inputs(rng, variant["T"], s_q=s_q, s_kv=500, h_q=20)
    sink = rng.standard_normal(20).astype(np.float32)
    indices = run("indexer_topk", device, **index, topk=100)
    expected = run("sparse_mla", device, attention["q"], attention["kv"], indices, sink, sm_scale=0.07)
    k_scale = index.pop("k_scale")
    rest = (attention["q"], attention["kv"], k_scale, sink)
    out, lse = run("dsa_attention", device, *index.values(), *rest, topk=100, sm_scale=0.07)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[2])


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 10), (3, 0), (0, 0)])
def test_empty(s_q, s_kv, device):
    check(attention_inputs(np.random.default_rng(0), "float32", s_q=s_q, s_kv=s_kv), device)
