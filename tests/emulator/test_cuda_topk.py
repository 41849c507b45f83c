"""The CUDA token selector on the CPU is exact and deterministic for every kind of row and order of threads."""

from __future__ import annotations

import numpy as np
import pytest
from test_topk import DATA

from dsa_tvm.ops import OPS
from emulator import Emulator

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source
from dsa_tvm.schedules.cuda.topk import kernel as topk

DECISIONS = {
    "default": topk.DEFAULT["cuda"],
    # A list so short and a sample so small that guesses fail.
    "tight": topk.Decisions(threads=256, sample=64, list_factor=1, list_min=64, list_max=4096),
    "wide": topk.Decisions(threads=1024, sample=1024, list_factor=2, list_min=4096, list_max=8192),
}


@pytest.fixture(scope="module", params=DECISIONS)
def select(request, tmp_path_factory):
    """A function that selects with one set of decisions."""
    c = DECISIONS[request.param]
    text = source.cuda_source([(f"topk_{stage}", topk.tensor_ir({}, c, stage)) for stage in topk.STAGES])
    emulator = Emulator(text, source.DEVICE_HEADERS, tmp_path_factory.mktemp("topk"))

    def run(logits, ks, ke, k, parts=1, order=0):
        rows, s_kv = logits.shape
        out = np.full((rows, k), -7, np.int32)
        size = {"shared_bytes": c.shared_bytes(k), "order": order}
        capacity = c.capacity(k)
        if parts == 1:
            scalars = (s_kv, k, capacity, rows, 1)
            emulator.launch("topk_rows", (rows, 1), logits, ks, ke, None, None, out, *scalars, **size)
            return out
        values = np.full((rows, parts * k), np.inf, np.float32)
        positions = np.full((rows, parts * k), -7, np.int32)
        scalars = (s_kv, k, capacity, rows, parts)
        emulator.launch("topk_parts", (rows, parts), logits, ks, ke, None, values, positions, *scalars, **size)
        scalars = (parts * k, k, capacity, rows, 1)
        emulator.launch("topk_merge", (rows, 1), values, None, None, positions, None, out, *scalars, **size)
        return out

    return run


def check(select, logits, k, ks=None, ke=None, **options):
    rows, s_kv = logits.shape
    ks = np.zeros(rows, np.int32) if ks is None else np.asarray(ks, np.int32)
    ke = np.full(rows, s_kv, np.int32) if ke is None else np.asarray(ke, np.int32)
    (expected,) = OPS["topk"].reference(logits, ks, ke, k)
    np.testing.assert_array_equal(select(logits, ks, ke, k, **options), expected)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("s_kv", [1, 15, 64, 65, 1000, 4097, 20000])
def test_every_kind_of_row(select, data, s_kv):
    logits = DATA[data](np.random.default_rng(s_kv), (2, s_kv))
    for order, k in enumerate((1, 7, 64, 512, 2048, 4096)):
        check(select, logits, k, order=order)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("parts", [2, 5, 32])
def test_rows_in_parts(select, data, parts):
    logits = DATA[data](np.random.default_rng(parts), (2, 9001))
    for order, k in enumerate((1, 64, 2048)):
        check(select, logits, k, parts=parts, order=order)


@pytest.mark.parametrize("s_kv", [9000, 20000, 70000])
def test_a_sample_that_misleads(select, s_kv):
    """Large values are only where a sample of 4096 looks, or only elsewhere."""
    rng = np.random.default_rng(s_kv)
    looks = np.zeros(s_kv, bool)
    looks[(np.arange(1024) * (s_kv // 4) // 1024 * 4)[:, None] + np.arange(4)] = True
    logits = rng.standard_normal((2, s_kv)).astype(np.float32)
    logits[0, looks] += 100
    logits[1, ~looks] += 100
    for order, k in enumerate((64, 2048)):
        check(select, logits, k, order=order)


@pytest.mark.parametrize("parts", [1, 3])
def test_ranges(select, parts):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((60, 700)).astype(np.float32)
    ks, ke = rng.integers(-50, 750, (2, 60))
    ks[:6] = -(2**31), 2**31 - 1, -(2**31), 0, 700, 350
    ke[:6] = 2**31 - 1, -(2**31), -(2**31), 0, 700, 351
    for order in range(3):
        check(select, logits, 100, ks, ke, parts=parts, order=order)


@pytest.mark.parametrize("parts", [1, 2])
def test_no_keys(select, parts):
    check(select, np.zeros((3, 0), np.float32), 5, parts=parts)


@pytest.mark.parametrize("parts", [1, 8])
def test_long_row(select, parts):
    rng = np.random.default_rng(0)
    for data in ("normal", "ascending", "ties"):
        check(select, DATA[data](rng, (1, 300000)), 2048, parts=parts)
