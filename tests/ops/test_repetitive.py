"""Repetitive keys: sums of thousands of equal addends, whose rounding errors all have one sign, and ties everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close, tolerance_of
from devices import run
from operator_tensors import SIZES, arrays, check, complete
from samples import attention_inputs, flatten, indexer_inputs

from dsa_tvm import pack_mla_rows
from dsa_tvm.benchmark.workload import repeated_keys
from dsa_tvm.ops import OPS

SM_SCALE = 192**-0.5
each_variant = pytest.mark.parametrize("variant", OPS["lightning_indexer"].variants, ids=lambda v: "-".join(v.values()))
each_type = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "packed"])
each_period = pytest.mark.parametrize("period", [1, 3, 7])
EVERY = [
    pytest.param(op, v, id="-".join([op, *v.values()]))
    for op, spec in OPS.items()
    if "s_kv" in spec.dims
    for v in spec.variants
]


def check_attention(arguments, device, sm_scale=SM_SCALE):
    op = "sparse_mla_fp8" if arguments["kv"].dtype == np.uint8 else "sparse_mla"
    expected = OPS[op].reference(**arguments, sm_scale=sm_scale, d_v=512)
    actual = run(op, device, **arguments, sm_scale=sm_scale)
    for output, x, y in zip(OPS[op].outputs, actual, expected, strict=True):
        assert_close(x, y, OPS[op].tolerance[output.name][arguments["q"].dtype.name])


def check_logits(arguments, device):
    (expected,) = OPS["lightning_indexer"].reference(**arguments)
    actual = run("lightning_indexer", device, **arguments)
    assert_close(actual, expected, tolerance_of(OPS["lightning_indexer"], "logits", arguments["q"].dtype.name, device))


def attention(rng, dtype, **sizes):
    return attention_inputs(rng, "bfloat16" if dtype == "packed" else dtype, **sizes)


def packed(arguments, dtype):
    return arguments | {"kv": pack_mla_rows(arguments["kv"])} if dtype == "packed" else arguments


@each_type
@each_period
@pytest.mark.parametrize("topk", [500, 2048, 4096])
def test_attention(dtype, period, topk, device):
    """Every key is selected many times, as from a repetitive text."""
    rng = np.random.default_rng(topk + period)
    arguments = attention(rng, dtype, s_q=2, s_kv=topk, h_q=5, topk=topk)
    arguments["indices"][:] = np.arange(topk)
    check_attention(packed(repeated_keys(OPS["sparse_mla"], arguments, period), dtype), device)


@each_type
@pytest.mark.parametrize("size", [0.1, 0.3, 0.9])
def test_attention_of_equal_numbers(dtype, size, device):
    """A score is a sum of 576 equal products. Its error changes the ratio of the weights of two keys."""
    rng = np.random.default_rng(0)
    arguments = attention(rng, dtype, s_q=4, s_kv=64, h_q=5, topk=64)
    arguments["indices"][:] = np.arange(64)
    arguments = flatten(arguments)
    kv = np.resize([size, 0.77 * size], (64, 1)) * np.ones(576)
    arguments["kv"] = kv.astype(arguments["kv"].dtype)
    check_attention(packed(arguments, dtype), device)


@each_variant
@each_period
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("h_idx", [1, 64])
def test_logits(variant, period, flat, h_idx, device):
    arguments = indexer_inputs(np.random.default_rng(period), variant, s_q=7, s_kv=200, h_idx=h_idx, scaled=True)
    arguments = repeated_keys(OPS["lightning_indexer"], arguments, period)
    check_logits(flatten(arguments) if flat else arguments, device)


@each_variant
@each_period
def test_equal_logits_are_selected_by_their_index(variant, period, device):
    rng = np.random.default_rng(period)
    arguments = indexer_inputs(rng, variant, s_q=9, s_kv=900, h_idx=5, d_idx=64, scaled=True)
    arguments = repeated_keys(OPS["lightning_indexer"], arguments, period)
    logits = run("lightning_indexer", device, **arguments)
    for key in range(period, 900):
        seen = np.isfinite(logits[:, key])
        np.testing.assert_array_equal(logits[seen, key], logits[seen, key % period])
    for topk in (1, 100, 700):
        (expected,) = OPS["topk"].reference(logits, arguments["ks"], arguments["ke"], topk)
        np.testing.assert_array_equal(run("topk", device, logits, arguments["ks"], arguments["ke"], topk), expected)
        np.testing.assert_array_equal(run("indexer_topk", device, **arguments, topk=topk), expected)


@pytest.mark.parametrize(("op", "variant"), EVERY)
@pytest.mark.parametrize("size", SIZES)
@each_period
def test_every_operator(op, variant, size, period, device):
    """Every operator, with all options at once."""
    arguments = complete(op, arrays(op, size, variant, period=period))
    outputs = run(op, device, **arguments)
    check(op, outputs if isinstance(outputs, tuple) else (outputs,), arguments, device)
