"""Rows that indices name, on their way into a ring of slots in shared memory."""

from __future__ import annotations

from tvm.script import tirx as T

from .device import WARP, Place, SharedPool, call, shared


@T.meta_class
class Gather:
    """Copies rows a slot at a time; each warp copies whole rows. An index out of bounds is a row of zeros, not read.

    Parameters
    ----------
    pool : Buffer
    places : SharedPool
    tx : expression
        The thread.
    c : Decisions
    index : Buffer
        The indices, int32.
    m : expression
        The row of `index`.
    rows : Buffer
        Where they lead.
    s_kv : expression
        Its length.
    slots : Buffer
        ``[stages, block_keys, at least a row]`` in shared memory.
    """

    def __init__(self, pool, places: SharedPool, tx, c, index, m, rows, s_kv, slots) -> None:
        self.tx, self.lane, self.warp = tx, tx % WARP, tx // WARP
        self.warps, self.threads = c.warps, c.threads
        self.keys, self.stages = c.block_keys, c.stages
        self.own = c.block_keys // c.warps
        self.index, self.m, self.rows, self.s_kv, self.slots = index, m, rows, s_kv, slots
        self.width = 4 if rows.dtype == "float32" else 2
        self.elements = 16 // self.width
        self.length = int(rows.shape[1])
        self.copies = -(-self.length // (self.elements * WARP))
        # All rows begin alike: a row is a multiple of 16 bytes.
        self.aligned: T.let = call("aligned_16", T.address_of(rows[T.int64(0), 0]))
        valid, last = self.arrays(places, c)
        #: Whether key j of a slot counts.
        self.valid = shared(pool, valid)
        self.last = shared(pool, last)
        self.start = T.local_scalar("int32")
        self.stop = T.local_scalar("int32")
        self.row = T.alloc_local((self.own,), "int32")

    @staticmethod
    def arrays(places: SharedPool, c) -> tuple[Place, ...]:
        """Which keys count, and a number of each warp."""
        return places.place((c.stages, c.block_keys), "int32"), places.place((c.warps,), "int32")

    @T.inline
    def begin(self, start, end):
        """Sets out at position `start`, to `stop`: before `end`, and behind it no index is valid."""
        self.start = start
        self.stop = start
        for i in T.serial(T.max(end - start, 0) // self.threads + 1):
            at: T.let = start + i * self.threads + self.tx
            if at < end:
                index: T.let = self.index[self.m, T.Cast("int64", at)]
                if index >= 0 and T.Cast("int64", index) < self.s_kv:
                    self.stop = at + 1
        for r in T.unroll(5):
            self.stop = T.max(self.stop, call("shuffle_xor", self.stop, 1 << r))
        if self.lane == 0:
            self.last[self.warp] = self.stop
        T.tvm_storage_sync("shared")
        for w in T.unroll(self.warps):
            self.stop = T.max(self.stop, self.last[w])

    @T.inline
    def look_up(self, step):
        """Asks for the indices that ``fetch(step)`` needs, long before it."""
        for r in T.unroll(self.own):
            at: T.let = self.start + step * self.keys + r * self.warps + self.warp
            self.row[r] = T.if_then_else(at < self.stop, self.index[self.m, T.Cast("int64", at)], -1)

    @T.inline
    def fetch(self, step):
        """Starts to copy the rows that were looked up to slot ``step % stages``."""
        for r in T.unroll(self.own):
            key: T.let = r * self.warps + self.warp
            row: T.let = T.Cast("int64", self.row[r])
            counts: T.let = T.Cast("int32", row >= T.int64(0) and row < self.s_kv)
            if self.lane == 0:
                self.valid[step % self.stages, key] = counts
            source: T.let = T.Select(counts == 1, row, T.int64(0))
            if self.aligned == 1:
                for i in T.unroll(self.copies):
                    element: T.let = (i * WARP + self.lane) * self.elements
                    if element < self.length:
                        to: T.let = T.address_of(self.slots[step % self.stages, key, element])
                        at: T.let = T.address_of(self.rows[source, element])
                        T.evaluate(call("cp_async_16", to, at, counts, dtype="void"))
            else:
                for i in T.serial(self.copies):
                    element: T.let = (i * WARP + self.lane) * self.elements
                    if element < self.length:
                        to: T.let = T.address_of(self.slots[step % self.stages, key, element])
                        at: T.let = T.address_of(self.rows[source, element])
                        T.evaluate(call("copy_elements", to, at, self.width, counts, dtype="void"))
