"""The CUDA kernels that write new rows to a cache and copy it, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from dsa_tvm.ops import OPS
from emulator import Emulator

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source, write_rows


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    kernels = [("copy_cache", write_rows.copy_ir()), ("write_new", write_rows.tensor_ir())]
    return Emulator(source.cuda_source(kernels), source.DEVICE_HEADERS, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("row_bytes", [1, 16, 656, 1000, 2304])
@pytest.mark.parametrize("last", [None, 3], ids=["anywhere", "the same few"])
def test_rows(emulator, order, row_bytes, last):
    """Blocks in any order, rows of a warp's 512 bytes and more, positions that are equal and out of range."""
    rng = np.random.default_rng(row_bytes)
    batch, capacity, s_new = 3, 40, 70
    cache, rows = (rng.integers(0, 256, (batch, n, row_bytes), np.uint8) for n in (capacity, s_new))
    positions = rng.integers(-3, last or capacity + 3, (batch, s_new)).astype(np.int32)
    positions[0, :2] = -(2**31), 2**31 - 1
    (expected,) = OPS["write_rows"].reference(cache, rows, positions)
    grid = (-(-batch * s_new // write_rows.ROWS),)
    for wide in {0, int(row_bytes % 16 == 0)}:
        out = cache.copy()
        scalars = (batch * s_new, s_new, capacity, row_bytes, wide)
        emulator.launch("write_new", grid, rows, positions, out, *scalars, order=order)
        assert (out == expected).all()


@pytest.mark.parametrize("count", [1, 15, 16, 4096, write_rows.COPY_BYTES, 3 * write_rows.COPY_BYTES + 4112])
def test_copy(emulator, count):
    cache = np.random.default_rng(count).integers(0, 256, count, np.uint8)
    for wide in {0, int(count % 16 == 0)}:
        out = np.zeros_like(cache)
        emulator.launch("copy_cache", (-(-count // write_rows.COPY_BYTES),), cache, out, count, wide)
        assert (out == cache).all()
