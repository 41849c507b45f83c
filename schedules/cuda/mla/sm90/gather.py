"""The warpgroup that copies the rows that indices name into swizzled tiles of shared memory.

`RowGather` and `packed.PackedGather` have the same interface, for two kinds of rows.
"""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import WARP, call
from .decisions import KEYS, WARPGROUP
from .products import half_atom, half_atoms

#: Rows that a warp copies at a time, eight threads each, and of a tile in all.
AT_A_TIME = WARP // 8
OF_A_WARP = KEYS // (WARPGROUP // WARP)


@T.meta_class
class Gather:
    """Which rows are due: tile s of a pair goes to slot s.

    Parameters
    ----------
    tx : expression
        The thread, from 0 in this warpgroup.
    index : Buffer
        The indices, int32.
    m : expression
        The row of `index`.
    rows : Buffer
        Where they lead, a row of 16 byte boundaries each.
    s_kv : expression
        Its length.
    slots, counts : Buffer
        The slots, and which keys of them count.
    """

    def __init__(self, tx, index, m, rows, s_kv, slots, counts, d_qk: int) -> None:
        self.lane, self.warp = tx % WARP, tx // WARP
        self.index, self.m, self.rows, self.s_kv, self.slots, self.counts = index, m, rows, s_kv, slots, counts
        self.d_qk = d_qk
        self.ahead = T.alloc_local((2,), "int32")
        self.told = T.alloc_local((2,), "uint32")
        self.due = T.alloc_local((2,), "int32")

    @T.inline
    def look_up(self, at, stop):
        """Asks for the indices of a pair, long before it: positions from `at` on and before `stop`."""
        for s in T.unroll(2):
            place: T.let = at + s * KEYS + self.warp * OF_A_WARP + self.lane % OF_A_WARP
            self.ahead[s] = T.if_then_else(place < stop, self.index[self.m, T.Cast("int64", place)], -1)

    @T.inline
    def settle(self):
        """Makes of what was looked up the pair that is copied next."""
        for s in T.unroll(2):
            valid: T.let = self.ahead[s] >= 0 and T.Cast("int64", self.ahead[s]) < self.s_kv
            self.told[s] = call("ballot", T.Cast("int32", valid), dtype="uint32") & T.uint32((1 << OF_A_WARP) - 1)
            self.due[s] = T.Select(valid, self.ahead[s], -1)

    def row(self, slot, i):
        """The row at time i, -1 for none. Of a warp's rows each lane knows one: the whole warp asks."""
        return call("shuffle", self.due[slot], i * AT_A_TIME + self.lane // 8)

    @T.inline
    def tell(self, slot):
        """Says which keys of the slot count."""
        if self.lane == 0:
            self.counts[slot, self.warp] = self.told[slot]

    def key(self, i):
        """The key of a tile whose row this thread takes part in at time i."""
        return self.warp * OF_A_WARP + i * AT_A_TIME + self.lane // 8


@T.meta_class
class RowGather(Gather):
    """Copies rows as they are. An index out of bounds is a row of zeros, not read."""

    @T.inline
    def expect(self):
        """Do nothing: asynchronous copies run ahead by themselves."""
        pass

    @staticmethod
    def arrivals(half: int, d_qk: int) -> int:
        """Arrivals that fill a half of a slot: of each thread's copies, and of each warp that told which keys count."""
        return WARPGROUP + (1 - half) * WARPGROUP // WARP

    @T.inline
    def fill(self, slot, half, ready, free, parity):
        """Copies one half of a tile once it is `free`; `ready` is the barrier that awaits it."""
        T.evaluate(call("mbarrier_wait", free, parity, dtype="void"))
        if half == 0:
            self.tell(slot)
            if self.lane == 0:
                T.evaluate(call("mbarrier_arrive", ready, dtype="void"))
        for i in T.unroll(OF_A_WARP // AT_A_TIME):
            row: T.let = self.row(slot, i)
            source: T.let = T.Cast("int64", T.max(row, 0))
            for n in T.unroll(half_atoms(self.d_qk, half)):
                atom: T.let = half_atom(slot, half, n)
                at: T.let = T.address_of(self.rows[source, atom * 64 + self.lane % 8 * 8])
                to: T.let = T.address_of(self.slots[slot, atom, self.key(i), (self.lane % 8 ^ self.key(i) % 8) * 8])
                T.evaluate(call("cp_async_16", to, at, row >= 0, dtype="void"))
        T.evaluate(call("cp_async_arrive", ready, dtype="void"))
