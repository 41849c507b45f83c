"""Copies packed rows into tiles of bf16.

A packed row has 512 e4m3, four f32 that each scale 128 of them, and for d_qk 576 also 64 bf16 that are part of the key
only.
"""

from __future__ import annotations

from tvm.script import tirx as T

from .....ops.packed_rows import row_bytes
from ...emit import call
from .decisions import D_V, WARPGROUP
from .gather import AT_A_TIME, OF_A_WARP, Gather
from .products import half_atom

#: Where the parts of a row begin.
SCALES = 512
KEY_ONLY = 528

TIMES = OF_A_WARP // AT_A_TIME

#: Loads of 16 bytes with which eight threads have half a row.
LOADS = D_V // 2 // 16 // 8

#: Bytes that are fetched together from memory.
LINE = 128


@T.meta_class
class PackedGather(Gather):
    """Copies packed rows as bf16. An index out of bounds is a row of zeros, not read."""

    def __init__(self, tx, index, m, rows, s_kv, slots, counts, d_qk: int) -> None:
        super().__init__(tx, index, m, rows, s_kv, slots, counts, d_qk)
        self.has_key_only = d_qk > D_V
        self.width = row_bytes(d_qk, D_V)
        self.line_pairs = -(-self.width // (2 * LINE))
        self.raw = T.alloc_local((TIMES, LOADS, 4), "uint32")
        self.scale = T.alloc_local((LOADS,), "float32")

    @staticmethod
    def arrivals(half: int, d_qk: int) -> int:
        """Arrivals that fill a half of a slot: of each thread, and in half 1 of each thread's copies, if there are."""
        return WARPGROUP * (1 + half * (d_qk > D_V))

    @T.inline
    def expect(self):
        """Asks for the rows of the pair after this one: what a half waits for is then no more than the cache.

        Loads to registers, which there are too few of, cannot run ahead as asynchronous copies do.
        """
        for s in T.unroll(2):
            if self.ahead[s] >= 0 and T.Cast("int64", self.ahead[s]) < self.s_kv:
                for n in T.unroll(self.line_pairs):
                    # Two lanes know the same row.
                    line: T.let = n * 2 + self.lane // OF_A_WARP
                    at: T.let = T.min(line * LINE, self.width - 1)
                    row: T.let = T.address_of(self.rows[T.Cast("int64", self.ahead[s]), at])
                    T.evaluate(call("prefetch", row, dtype="void"))

    @T.inline
    def fill(self, slot, half, ready, free, parity):
        """Brings one half of a tile, loaded before it is `free`; `ready` is the barrier that awaits it."""
        # 16 elements of each 128 to a thread: a load takes 128 bytes of a row, all of them with one scale.
        first: T.let = half_atom(slot, half, 0) * 64
        for n in T.unroll(LOADS):
            self.scale[n] = T.float32(0)
            if self.due[slot] >= 0:
                scale: T.let = T.address_of(self.rows[T.Cast("int64", self.due[slot]), SCALES + (first // 128 + n) * 4])
                self.scale[n] = call("load_f32", scale, dtype="float32")
        for i in T.unroll(TIMES):
            row: T.let = self.row(slot, i)
            for n in T.unroll(LOADS):
                for e in T.unroll(4):
                    self.raw[i, n, e] = T.uint32(0)
                if row >= 0:
                    at: T.let = T.address_of(self.rows[T.Cast("int64", row), first + n * 128 + self.lane % 8 * 16])
                    T.evaluate(call("load_128", T.address_of(self.raw[i, n, 0]), at, dtype="void"))
        T.evaluate(call("mbarrier_wait", free, parity, dtype="void"))
        if half == 0:
            self.tell(slot)
        elif self.has_key_only:
            for i in T.unroll(TIMES):
                row: T.let = self.row(slot, i)
                source: T.let = T.Cast("int64", T.max(row, 0))
                place: T.let = (self.lane % 8 ^ self.key(i) % 8) * 8
                at: T.let = T.address_of(self.rows[source, KEY_ONLY + self.lane % 8 * 16])
                to: T.let = T.address_of(self.slots[slot, D_V // 64, self.key(i), place])
                T.evaluate(call("cp_async_16", to, at, row >= 0, dtype="void"))
            T.evaluate(call("cp_async_arrive", ready, dtype="void"))
        # Eight threads have a row of two tiles. Four of them store their upper half first, so that all banks are busy.
        upper: T.let = self.lane // 4 % 2
        for i in T.unroll(TIMES):
            swizzle: T.let = self.key(i) % 8
            for n in T.unroll(LOADS):
                scale: T.let = call("shuffle", self.scale[n], i * AT_A_TIME + self.lane // 8, dtype="float32")
                atom: T.let = half_atom(slot, half, 0) + n * 2 + upper
                first_place: T.let = (self.lane % 4 * 2 + upper) ^ swizzle
                first_at: T.let = T.address_of(self.slots[slot, atom, self.key(i), first_place * 8])
                second_at: T.let = T.address_of(self.slots[slot, atom, self.key(i), (first_place ^ 1) * 8])
                raw: T.let = T.address_of(self.raw[i, n, 0])
                T.evaluate(call("put_e4m3_as_bf16", first_at, second_at, raw, scale, upper, dtype="void"))
        T.evaluate(call("fence_async", dtype="void"))
        T.evaluate(call("mbarrier_arrive", ready, dtype="void"))
