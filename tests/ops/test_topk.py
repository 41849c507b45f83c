"""The token selector is exact and deterministic for every input."""

from __future__ import annotations

import numpy as np
import pytest
from devices import run

from dsa_tvm.ops import OPS


def check(logits, topk, device, ks=None, ke=None):
    s_q, s_kv = logits.shape
    ks = np.zeros(s_q, np.int32) if ks is None else np.asarray(ks, np.int32)
    ke = np.full(s_q, s_kv, np.int32) if ke is None else np.asarray(ke, np.int32)
    (expected,) = OPS["topk"].reference(logits, ks, ke, topk)
    np.testing.assert_array_equal(run("topk", device, logits, ks, ke, topk), expected)


def ties(rng, shape):
    x = np.round(rng.standard_normal(shape) * 2).astype(np.float32)
    x[x == 0] *= rng.choice([-1, 1], (x == 0).sum())  # +0 and -0 tie
    return x


def lowest_bits(rng, shape):
    """Values that differ in the lowest ten bits only."""
    return (np.float32(1).view(np.int32) + rng.integers(0, 1024, shape, dtype=np.int32)).view(np.float32)


def half_nan(rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    x[rng.random(shape) < 0.5] = np.nan
    return x


def mostly_minus_inf(rng, shape):
    x = np.full(shape, -np.inf, np.float32)
    x[rng.random(shape) < 0.01] = 3
    return x


DATA = {
    "normal": lambda rng, shape: rng.standard_normal(shape).astype(np.float32),
    "equal": lambda rng, shape: np.full(shape, 1.5, np.float32),
    "nan": lambda rng, shape: np.full(shape, np.nan, np.float32),
    "minus inf": lambda rng, shape: np.full(shape, -np.inf, np.float32),
    "plus inf": lambda rng, shape: np.full(shape, np.inf, np.float32),
    "ascending": lambda rng, shape: np.sort(rng.standard_normal(shape).astype(np.float32), axis=1),
    "descending": lambda rng, shape: -np.sort(rng.standard_normal(shape).astype(np.float32), axis=1),
    "subnormal": lambda rng, shape: rng.integers(-9, 9, shape).astype(np.float32) * np.float32(1e-45),
    "bit patterns": lambda rng, shape: rng.integers(-(2**31), 2**31, shape).astype(np.int32).view(np.float32),
    "ties": ties,
    "lowest bits": lowest_bits,
    "half nan": half_nan,
    "mostly minus inf": mostly_minus_inf,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("s_kv", [1, 15, 64, 65, 1000, 2049, 4097, 20000])
def test_every_kind_of_row(data, s_kv, device):
    rng = np.random.default_rng(s_kv)
    logits = DATA[data](rng, (2, s_kv))
    for topk in (1, 7, 64, 512, 2048, 4096):
        check(logits, topk, device)


@pytest.mark.parametrize("rows", [1, 32, 300])
def test_many_rows(rows, device):
    check(DATA["ties"](np.random.default_rng(rows), (rows, 5000)), 512, device)


def test_long_row(device):
    rng = np.random.default_rng(0)
    for data in ("normal", "ascending", "ties"):
        check(DATA[data](rng, (1, 300000)), 2048, device)


def test_ranges(device):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((200, 700)).astype(np.float32)
    ks, ke = rng.integers(-50, 750, (2, 200))
    ks[:6] = -(2**31), 2**31 - 1, -(2**31), 0, 700, 350
    ke[:6] = 2**31 - 1, -(2**31), -(2**31), 0, 700, 351
    check(logits, 100, device, ks, ke)


def test_values_outside_the_range_are_not_seen(device):
    logits = np.full((1, 100), np.inf, np.float32)
    logits[0, 40:60] = -np.inf
    ks, ke = np.array([[40], [60]], np.int32)
    assert run("topk", device, logits, ks, ke, 4).tolist() == [[40, 41, 42, 43]]


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 10), (3, 0), (0, 0)])
def test_empty(s_q, s_kv, device):
    indices = run("topk", device, np.zeros((s_q, s_kv), np.float32), *np.zeros((2, s_q), np.int32), 5)
    assert indices.shape == (s_q, 5) and (indices == -1).all()
