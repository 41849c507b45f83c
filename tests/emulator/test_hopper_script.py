"""A kernel in TensorIR with tensor maps, a ring of stages, a producer and consumers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from emulator import Emulator, KernelError, TensorMap

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source
from dsa_tvm.schedules.cuda.emit import SharedPool, call, shared
from tvm.script import tirx as T

STAGES, ROWS, COLUMNS, STEP = 2, 128, 64, 64


def product(*, full_wait=True, empty_wait=True):
    """The kernel of c [128, 64] = a [128, K] b [64, K]: two warpgroups multiply what a warp of the third brings."""
    STAGE_BYTES = (ROWS + COLUMNS) * STEP * 2

    @T.prim_func(s_tir=True)
    def product(a: T.TensorMap(), b: T.TensorMap(), c: T.handle("float32"), steps: T.int32):
        # Without a number of blocks the assembler ignores setmaxnreg.
        T.func_attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        T.launch_thread("blockIdx.x", steps)
        tx = T.launch_thread("threadIdx.x", 384)
        C = T.decl_buffer((ROWS, COLUMNS), "float32", data=c)
        pool = T.alloc_buffer((0,), "uint8", scope="shared.dyn")
        places = T.meta_var(SharedPool())
        A = shared(pool, places.place((STAGES, ROWS, STEP), "uint16", 1024))
        B = shared(pool, places.place((STAGES, COLUMNS, STEP), "uint16", 1024))
        full = shared(pool, places.place((STAGES,), "uint64", 8))
        empty = shared(pool, places.place((STAGES,), "uint64", 8))
        sums = T.alloc_local((COLUMNS // 2,), "float32")
        # The compiler knows that all threads of a warp are in one group.
        group: T.let = call("shuffle", tx // 128, 0)
        if tx == 0:
            for s in T.unroll(STAGES):
                T.evaluate(call("mbarrier_init", T.address_of(full[s]), 1, dtype="void"))
                T.evaluate(call("mbarrier_init", T.address_of(empty[s]), ROWS // 16, dtype="void"))
            T.evaluate(call("mbarrier_fence", dtype="void"))
        T.tvm_storage_sync("shared")
        if group == 2:
            T.evaluate(call("fewer_registers<40>", dtype="void"))
            if tx == 256:
                for i in T.serial(steps):
                    s: T.let = i % STAGES
                    bar: T.let = T.address_of(full[s])
                    # The first round through the ring finds it empty.
                    if empty_wait:
                        parity: T.let = i // STAGES % 2 ^ 1
                        T.evaluate(call("mbarrier_wait", T.address_of(empty[s]), parity, dtype="void"))
                    T.evaluate(call("mbarrier_expect", bar, STAGE_BYTES, dtype="void"))
                    T.evaluate(call("tma_load_2d", T.address_of(A[s, 0, 0]), a, bar, i * STEP, 0, dtype="void"))
                    T.evaluate(call("tma_load_2d", T.address_of(B[s, 0, 0]), b, bar, i * STEP, 0, dtype="void"))
        else:
            T.evaluate(call("more_registers<232>", dtype="void"))
            for i in T.serial(steps):
                s: T.let = i % STAGES
                if full_wait:
                    T.evaluate(call("mbarrier_wait", T.address_of(full[s]), i // STAGES % 2, dtype="void"))
                at_a: T.let = call("descriptor<128>", T.address_of(A[s, group * 64, 0]), 16, 1024, dtype="uint64")
                at_b: T.let = call("descriptor<128>", T.address_of(B[s, 0, 0]), 16, 1024, dtype="uint64")
                T.evaluate(call("wgmma_fence", dtype="void"))
                for k in T.unroll(STEP // 16):
                    to: T.let = T.Cast("uint64", k * 2)
                    T.evaluate(
                        call(
                            "wgmma_bf16<64, 0>",
                            T.address_of(sums[0]),
                            at_a + to,
                            at_b + to,
                            T.Select(k > 0, 1, i),
                            dtype="void",
                        )
                    )
                T.evaluate(call("wgmma_commit", dtype="void"))
                T.evaluate(call("wgmma_wait<0>", dtype="void"))
                # Each warp waits for its own part of the products.
                if tx % 32 == 0:
                    T.evaluate(call("mbarrier_arrive", T.address_of(empty[s]), dtype="void"))
            T.evaluate(call(f"wgmma_hold<{COLUMNS // 2}>", T.address_of(sums[0]), dtype="void"))
            for j in T.unroll(COLUMNS // 8):
                for e in T.unroll(4):
                    row: T.let = tx // 32 * 16 + tx % 32 // 4 + e // 2 * 8
                    C[row, j * 8 + tx % 4 * 2 + e % 2] = sums[j * 4 + e]

    return product


SHARED_BYTES = STAGES * (ROWS + COLUMNS) * STEP * 2 + STAGES * 16


def launch(emulator, steps, order, eager):
    rng = np.random.default_rng(steps)
    a, b = (rng.integers(-8, 9, (n, steps * STEP)).astype(ml_dtypes.bfloat16) for n in (ROWS, COLUMNS))
    c = np.full((ROWS, COLUMNS), 77, np.float32)
    maps = TensorMap(a, (ROWS, STEP)), TensorMap(b, (COLUMNS, STEP))
    emulator.launch("product", (1,), *maps, c, steps, shared_bytes=SHARED_BYTES, order=order, eager=eager)
    return c, a.astype(np.float32) @ b.astype(np.float32).T


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_product(tmp_path, steps):
    emulator = Emulator(source.cuda_source([("product", product())]), source.DEVICE_HEADERS, tmp_path)
    for order in (0, 1, 5):
        for eager in (False, True):
            np.testing.assert_array_equal(*launch(emulator, steps, order, eager))


@pytest.mark.parametrize("missing", ["full_wait", "empty_wait"])
def test_a_missing_wait_shows(tmp_path, missing):
    emulator = Emulator(source.cuda_source([("product", product(**{missing: False}))]), source.DEVICE_HEADERS, tmp_path)
    for eager in (False, True):
        for order in (0, 1, 5):
            try:
                c, expected = launch(emulator, 7, order, eager)
            except KernelError:
                return
            if not np.array_equal(c, expected):
                return
    pytest.fail("not seen")
