"""Every element type at every kind of edge case. GPUs and CPU targets have different kernels for each of them."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close, tolerance_of
from devices import run
from samples import DTYPES, attention_inputs, indexer_inputs

from dsa_tvm.ops import OPS

INDEXER, ATTENTION = OPS["lightning_indexer"], OPS["sparse_mla"]
each_variant = pytest.mark.parametrize("variant", INDEXER.variants, ids=lambda v: "-".join(v.values()))
each_type = pytest.mark.parametrize("dtype", [v["T"] for v in ATTENTION.variants])


def check_logits(arguments, device):
    (expected,) = INDEXER.reference(**arguments)
    actual = run("lightning_indexer", device, **arguments)
    assert_close(actual, expected, tolerance_of(INDEXER, "logits", arguments["q"].dtype.name, device))
    return actual


def check_attention(arguments, device):
    expected = ATTENTION.reference(**arguments, sm_scale=576**-0.5, d_v=512)
    actual = run("sparse_mla", device, **arguments, sm_scale=576**-0.5)
    for output, x, y in zip(ATTENTION.outputs, actual, expected, strict=True):
        assert_close(x, y, ATTENTION.tolerance[output.name][arguments["q"].dtype.name])
    return actual


@each_variant
@pytest.mark.parametrize("d_idx", [32, 64, 128])
@pytest.mark.parametrize("h_idx", [1, 7, 8, 33, 63, 64])
def test_heads_of_the_indexer(variant, d_idx, h_idx, device):
    rng = np.random.default_rng(h_idx)
    check_logits(indexer_inputs(rng, variant, s_q=3, s_kv=70, h_idx=h_idx, d_idx=d_idx, scaled=True), device)


@each_variant
@pytest.mark.parametrize("s_kv", [1, 15, 16, 17, 63, 65, 127, 129, 255, 300])
@pytest.mark.parametrize("s_q", [1, 2, 33])
def test_tails_of_the_indexer(variant, s_kv, s_q, device):
    rng = np.random.default_rng(s_kv)
    check_logits(indexer_inputs(rng, variant, s_q=s_q, s_kv=s_kv, h_idx=5, d_idx=64), device)


@each_variant
@pytest.mark.parametrize("s_q", [3, 90])
def test_ranges_of_the_indexer(variant, s_q, device):
    """Ranges may begin after 0, be empty, or go beyond the keys. Keys outside are not read."""
    rng = np.random.default_rng(s_q)
    arguments = indexer_inputs(rng, variant, s_q=s_q, s_kv=400, h_idx=5, d_idx=64, scaled=True)
    arguments["ks"][:], arguments["ke"][:] = rng.integers(40, 460, (2, s_q))
    arguments["ks"][:2], arguments["ke"][:2] = (90, 300), (350, 300)
    arguments["k"][:40] = -128 if variant["K"] == "int8" else np.nan
    arguments["k_scale"][:40] = np.nan
    check_logits(arguments, device)


@each_variant
@pytest.mark.parametrize("topk", [1, 64, 2048])
def test_indexer_topk(variant, topk, device):
    """It selects what `topk` selects from the logits, also with ranges and few keys."""
    rng = np.random.default_rng(topk)
    arguments = indexer_inputs(rng, variant, s_q=40, s_kv=900, h_idx=5, d_idx=64, scaled=True)
    arguments["ks"][:], arguments["ke"][:] = np.sort(rng.integers(-40, 940, (2, 40)), axis=0)
    logits = run("lightning_indexer", device, **arguments)
    (expected,) = OPS["topk"].reference(logits, arguments["ks"], arguments["ke"], topk)
    np.testing.assert_array_equal(run("indexer_topk", device, **arguments, topk=topk), expected)


@each_type
@pytest.mark.parametrize("topk", [1, 15, 16, 17, 63, 65, 129, 700])
@pytest.mark.parametrize("s_q", [1, 40])
def test_tails_of_the_attention(dtype, topk, s_q, device):
    """On a GPU, the keys of one query are cut into parts, those of many queries are not."""
    h_q = 3 if s_q == 40 else 33
    check_attention(attention_inputs(np.random.default_rng(topk), dtype, s_q=s_q, h_q=h_q, topk=topk), device)


@each_type
@pytest.mark.parametrize("s_q", [1, 40])
def test_options_of_the_attention(dtype, s_q, device):
    """Indices out of range, lengths, a sink and unselected rows with NaN, all at once."""
    rng = np.random.default_rng(s_q)
    arguments = attention_inputs(rng, dtype, s_q=s_q, s_kv=600, h_q=7, topk=500)
    indices = rng.integers(-60, 300, (s_q, 500)).astype(np.int32)
    indices[:, 3::17] = rng.integers(600, 2**31, indices[:, 3::17].shape)
    indices[-1, :200] = -1  # a part that has no key at all
    arguments["kv"][300:] = np.nan
    length = rng.integers(-20, 520, s_q).astype(np.int32)
    length[-1] = 480
    sink = rng.standard_normal(7).astype(np.float32)
    arguments |= {"indices": indices, "topk_length": length, "attn_sink": sink}
    assert np.isfinite(check_attention(arguments, device)[0].astype(np.float32)).all()


@each_type
@pytest.mark.parametrize("s_q", [1, 40])
def test_no_key_at_all(dtype, s_q, device):
    arguments = attention_inputs(np.random.default_rng(0), dtype, s_q=s_q, h_q=3, topk=300)
    arguments["indices"][:] = -1
    arguments["attn_sink"] = np.full(3, 2, np.float32)
    out, max_logits, lse = check_attention(arguments, device)
    assert (out == DTYPES[dtype].type(0)).all() and np.isneginf(max_logits).all() and np.isposinf(lse).all()
