"""Seeded inputs of realistic scale."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dsa_tvm import pack_mla_rows

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "uint8": np.dtype(np.uint8),
}

#: The scale of int8 numbers. A few of thousands of normally distributed numbers exceed the range.
_INT8_SCALE = 1 / 40


def numbers(rng, shape, dtype):
    """Normally distributed numbers. In int8 they are multiples of a scale and include both ends of the range.

    Bytes (uint8) carry packed rows, so they are uniform.
    """
    if dtype == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    x = rng.standard_normal(shape)
    if dtype == "int8":
        x = np.clip(np.rint(x / _INT8_SCALE), -128, 127)
        x.reshape(-1)[::97], x.reshape(-1)[::101] = -128, 127
    return x.astype(DTYPES[dtype])


def indexer_inputs(rng, variant, *, s_q=5, s_kv=300, h_idx=64, d_idx=128, scaled=False):
    """Arguments of `lightning_indexer`: causal ranges, and weights with the scale that the operator expects."""
    q = numbers(rng, (s_q, h_idx, d_idx), variant["T"])
    k = numbers(rng, (s_kv, d_idx), variant["K"])
    weights = (rng.standard_normal((s_q, h_idx)) * h_idx**-0.5 * d_idx**-0.5).astype(np.float32)
    if variant["T"] == "int8":
        # The weights contain the scale of the queries and, here, also that of the keys.
        weights *= np.float32(_INT8_SCALE**2)
    ks = np.zeros(s_q, np.int32)
    ke = np.arange(s_kv - s_q + 1, s_kv + 1, dtype=np.int32)
    k_scale = rng.uniform(0.5, 2, s_kv).astype(np.float32) if scaled else None
    return {"q": q, "k": k, "weights": weights, "ks": ks, "ke": ke, "k_scale": k_scale}


def attention_inputs(rng, dtype, *, s_q=3, s_kv=300, h_q=16, d_qk=576, topk=64):
    """Arguments of `sparse_mla` with valid indices only."""
    return {
        "q": rng.standard_normal((s_q, h_q, d_qk)).astype(DTYPES[dtype]),
        "kv": rng.standard_normal((s_kv, d_qk)).astype(DTYPES[dtype]),
        "indices": rng.integers(0, max(s_kv, 1), (s_q, topk)).astype(np.int32),
    }


def odd_attention_inputs(*, s_q):
    """Arguments of `sparse_mla` in bf16 with infinities, NaN and large numbers.

    A query has few of them, so that there are outputs of every kind. All scores of the first query are -inf.
    """
    rng = np.random.default_rng(0)
    odd = np.array([np.inf, -np.inf, np.nan, 3e18, -3e18, 0.0, -0.0, 1e30, -1e-30], DTYPES["bfloat16"])
    arguments = attention_inputs(rng, "bfloat16", s_q=s_q, s_kv=400, h_q=5, topk=37)
    for name in ("q", "kv"):
        chosen = rng.random(arguments[name].shape) < 1e-4
        arguments[name][chosen] = rng.choice(odd, int(chosen.sum()))
    arguments["q"][0, :, 575], arguments["kv"][:3, 575], arguments["indices"][0] = 1, -np.inf, 2
    return arguments


def row_inputs(rng, dtype, *, batch=2, capacity=300, s_new=5, d_row=576):
    """Arguments of `write_rows`, with positions before and behind the cache and with repeated ones."""
    positions = rng.integers(-3, capacity + 3, (batch, s_new)).astype(np.int32)
    positions[:, -1] = positions[:, 0]
    shapes = ((batch, capacity, d_row), (batch, s_new, d_row))
    return {n: numbers(rng, shape, dtype) for n, shape in zip(("cache", "rows"), shapes, strict=True)} | {
        "positions": positions
    }


def repeat_rows(array, distinct):
    """Replace row i by row ``i % distinct``, in place, as in repetitive text."""
    array[:] = array[np.arange(len(array)) % distinct]
    return array


def packed_attention_inputs(rng, **sizes):
    """Arguments of `sparse_mla_fp8` with valid indices only; d_v is 512."""
    arguments = attention_inputs(rng, "bfloat16", **sizes)
    return arguments | {"kv": pack_mla_rows(arguments["kv"])}


def flatten(arguments):
    """Arguments of an indexer or an attention whose sums have terms of one sign, most of them equal.

    All numbers of a key are equal, and so are all numbers of a query in all its heads.
    """
    found = dict(arguments)
    for name in ("q", "index_q", "k", "index_k", "kv"):
        if name in found:
            x = np.abs(found[name].astype(np.float32))
            first = x[(slice(None), *[slice(0, 1)] * (x.ndim - 1))]
            found[name] = np.broadcast_to(first, x.shape).astype(found[name].dtype)
    if "weights" in found:
        found["weights"] = np.broadcast_to(np.abs(found["weights"][:, :1]), found["weights"].shape).copy()
    return found
