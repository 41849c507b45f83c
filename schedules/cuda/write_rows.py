"""Kernels that write new rows into a cache, and that copy a cache: 16 bytes at a time if the addresses allow it."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .emit import WARP, call

THREADS = 128

#: Pieces of 16 bytes that a thread copies, and the bytes of a block that copies a cache.
PIECES = 8
COPY_BYTES = THREADS * PIECES * 16

#: New rows that a block writes: one for each warp.
ROWS = THREADS // WARP


def copy_ir() -> tirx.PrimFunc:
    """The copy. The grid is ``(ceil(count / COPY_BYTES),)``.

    Returns
    -------
    PrimFunc
        ``(source, out, count, wide)``: `count` bytes. `wide` is 1 where both addresses and `count` are multiples of 16.
    """

    @T.prim_func(s_tir=True)
    def copy_cache(source: T.handle("uint8"), out: T.handle("uint8"), count: T.int64, wide: T.int32):
        bx = T.launch_thread("blockIdx.x", (count + (COPY_BYTES - 1)) // COPY_BYTES)
        tx = T.launch_thread("threadIdx.x", THREADS)
        FROM = T.decl_buffer((count,), "uint8", data=source)
        TO = T.decl_buffer((count,), "uint8", data=out)
        start: T.let = T.Cast("int64", bx) * COPY_BYTES
        if wide == 1:
            for i in T.unroll(PIECES):
                at: T.let = start + T.Cast("int64", (i * THREADS + tx) * 16)
                if at < count:
                    T.evaluate(call("move_16", T.address_of(TO[at]), T.address_of(FROM[at]), dtype="void"))
        else:
            for i in T.serial(PIECES * 16):
                at: T.let = start + T.Cast("int64", i * THREADS + tx)
                if at < count:
                    TO[at] = FROM[at]

    return copy_cache


def tensor_ir() -> tirx.PrimFunc:
    """The new rows. The grid is ``(ceil(count / ROWS),)``; a warp has one of the ``count = batch * s_new`` rows.

    Returns
    -------
    PrimFunc
        ``(rows, positions, out, count, s_new, capacity, row_bytes, wide)``. A row is left out where its position is
        outside ``[0, capacity)``, and where a later row of its sequence has the same one: blocks run in any order.
        `wide` is 1 where both addresses and `row_bytes` are multiples of 16.
    """

    @T.prim_func(s_tir=True)
    def write_rows(
        rows: T.handle("uint8"),
        positions: T.handle("int32"),
        out: T.handle("uint8"),
        count: T.int64,
        s_new: T.int64,
        capacity: T.int64,
        row_bytes: T.int64,
        wide: T.int32,
    ):
        bx = T.launch_thread("blockIdx.x", (count + (ROWS - 1)) // ROWS)
        tx = T.launch_thread("threadIdx.x", THREADS)
        NEW = T.decl_buffer((count, row_bytes), "uint8", data=rows)
        POSITION = T.decl_buffer((count,), "int32", data=positions)
        OUT = T.decl_buffer((count // s_new * capacity, row_bytes), "uint8", data=out)
        later = T.local_scalar("int32")
        row: T.let = T.Cast("int64", bx) * ROWS + T.Cast("int64", tx // WARP)
        lane: T.let = T.Cast("int64", tx % WARP)
        if row < count:
            position: T.let = T.Cast("int64", POSITION[row])
            if position >= 0 and position < capacity:
                behind: T.let = s_new - 1 - row % s_new
                later = 0
                for i in T.serial((behind + (WARP - 1)) // WARP):
                    j: T.let = i * WARP + lane
                    if j < behind:
                        if T.Cast("int64", POSITION[row + 1 + j]) == position:
                            later = 1
                if call("ballot", later, dtype="uint32") == T.uint32(0):
                    to: T.let = row // s_new * capacity + position
                    if wide == 1:
                        for i in T.serial((row_bytes // 16 + (WARP - 1)) // WARP):
                            at: T.let = (i * WARP + lane) * 16
                            if at < row_bytes:
                                T.evaluate(
                                    call("move_16", T.address_of(OUT[to, at]), T.address_of(NEW[row, at]), dtype="void")
                                )
                    else:
                        for i in T.serial((row_bytes + (WARP - 1)) // WARP):
                            at: T.let = i * WARP + lane
                            if at < row_bytes:
                                OUT[to, at] = NEW[row, at]

    return write_rows
