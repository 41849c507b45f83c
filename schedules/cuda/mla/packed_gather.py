"""Copy the packed rows that indices name, and unpack them into slots of bf16 in shared memory.

A row has d_v e4m3, an f32 for each 128 of them, and d_qk - d_v bf16 that are part of the key only. It is copied
asynchronously and unchanged into a separate ring. While the scores of the step before become weights, it is unpacked to
bf16 in one of two slots: e4m3 times scale, rounded, as on every backend.
"""

from __future__ import annotations

from tvm.script import tirx as T

from ....ops.packed_rows import GROUP, row_bytes
from ..emit import WARP, Place, SharedPool, call
from .gather import Gather


@T.meta_class
class PackedGather(Gather):
    """Each warp copies whole rows and makes bf16 of them. An index out of bounds is a row of zeros, not read.

    In the ring, scales come behind what is key only, so that all else is at multiples of 16 bytes.
    """

    def __init__(self, pool, places: SharedPool, tx, c, index, m, rows, s_kv, slots, d_qk: int, d_v: int) -> None:
        super().__init__(pool, places, tx, c, index, m, rows, s_kv, slots, d_qk, d_v)
        (self.raw,) = self.more
        self.ring = c.stages - 1
        #: Pieces of 16 bytes: of e4m3, and of all but the scales.
        self.narrow, self.pieces = d_v // 16, d_v // 16 + (d_qk - d_v) // 8
        self.copies = -(-self.pieces // WARP)
        self.scales, self.in_row, self.in_ring = d_v // GROUP, d_v, self.pieces * 16
        # Where scales are no multiple of 16 bytes, what is behind them is at none.
        self.aligned: T.let = self.aligned * int(self.scales % 4 == 0)

    @staticmethod
    def arrays(places: SharedPool, c, d_qk: int, d_v: int) -> tuple[Place, ...]:
        """Which keys count, a number of each warp, and the ring."""
        padded = -(-row_bytes(d_qk, d_v) // 16) * 16
        ring = places.place((c.stages - 1, c.block_keys, padded), "uint8")
        return *Gather.arrays(places, c, d_qk, d_v), ring

    @staticmethod
    def slots_of(c) -> int:
        """How many slots of bf16 there are."""
        return 2

    def slot(self, step):
        return step % 2

    @T.inline
    def start(self, steps):
        for s in T.serial(self.ring):
            if s < steps:
                self.fetch(s)
            T.evaluate(call("cp_async_commit", dtype="void"))
            self.look_up(s + 1)
        T.evaluate(call("cp_async_wait", self.ring - 1, dtype="void"))
        T.tvm_storage_sync("shared")
        self.widen(0)
        T.tvm_storage_sync("shared")
        self.go_on(-1, steps)

    @T.inline
    def await_next(self):
        T.evaluate(call("cp_async_wait", self.ring - 1, dtype="void"))

    @T.inline
    def settle_next(self, step, steps):
        if step + 1 < steps:
            self.widen(step + 1)

    @T.inline
    def go_on(self, step, steps):
        if step + (1 + self.ring) < steps:
            self.fetch(step + (1 + self.ring))
        T.evaluate(call("cp_async_commit", dtype="void"))
        self.look_up(step + (2 + self.ring))

    @T.inline
    def fetch(self, step):
        """Starts to copy the rows that were looked up."""
        for r in T.unroll(self.own):
            key: T.let = r * self.warps + self.warp
            counts: T.let = self.counts(r)
            if self.lane == 0:
                self.valid[step % self.stages, key] = counts
            source: T.let = T.Select(counts == 1, T.Cast("int64", self.row[r]), T.int64(0))
            scale_at: T.let = T.address_of(self.rows[source, self.in_row + self.lane * 4])
            scale_to: T.let = T.address_of(self.raw[step % self.ring, key, self.in_ring + self.lane * 4])
            if self.aligned == 1:
                for i in T.unroll(self.copies):
                    piece: T.let = i * WARP + self.lane
                    if piece < self.pieces:
                        behind: T.let = T.Select(piece < self.narrow, 0, self.scales * 4)
                        to: T.let = T.address_of(self.raw[step % self.ring, key, piece * 16])
                        at: T.let = T.address_of(self.rows[source, piece * 16 + behind])
                        T.evaluate(call("cp_async_16", to, at, counts, dtype="void"))
                if self.lane < self.scales:
                    T.evaluate(call("cp_async_4", scale_to, scale_at, counts, dtype="void"))
            else:
                for i in T.serial(self.copies):
                    piece: T.let = i * WARP + self.lane
                    if piece < self.pieces:
                        behind: T.let = T.Select(piece < self.narrow, 0, self.scales * 4)
                        to: T.let = T.address_of(self.raw[step % self.ring, key, piece * 16])
                        at: T.let = T.address_of(self.rows[source, piece * 16 + behind])
                        T.evaluate(call("copy_elements", to, at, 1, counts, dtype="void"))
                if self.lane < self.scales:
                    T.evaluate(call("copy_4_bytes", scale_to, scale_at, counts, dtype="void"))

    @T.inline
    def widen(self, step):
        """Makes bf16 of a step's rows."""
        # Four of eight neighbours store their upper half first, so that all banks are busy.
        upper: T.let = self.lane // 4 % 2
        for r in T.unroll(self.own):
            key: T.let = r * self.warps + self.warp
            for i in T.unroll(self.copies):
                piece: T.let = i * WARP + self.lane
                raw: T.let = T.address_of(self.raw[step % self.ring, key, piece * 16])
                if piece < self.narrow:
                    at: T.let = T.address_of(self.raw[step % self.ring, key, self.in_ring + piece // 8 * 4])
                    first: T.let = T.address_of(self.slots[step % 2, key, piece * 16 + upper * 8])
                    second: T.let = T.address_of(self.slots[step % 2, key, piece * 16 + 8 - upper * 8])
                    scale: T.let = call("load_f32", at, dtype="float32")
                    T.evaluate(call("widen_e4m3_16", first, second, raw, scale, upper, dtype="void"))
                elif piece < self.pieces:
                    to: T.let = T.address_of(self.slots[step % 2, key, (piece + self.narrow) * 8])
                    T.evaluate(call("move_16", to, raw, dtype="void"))
