"""Copy the rows that indices name into a ring of slots in shared memory.

`RowGather` and `packed_gather.PackedGather` have the same interface, for two kinds of rows. Each step of the attention
has two barriers. Weights are made between them, and products after the second one. ``start`` brings slot 0 and starts
to copy more. ``await_next`` comes before the first barrier. ``settle_next``, between the barriers, makes the slot of
the next step ready for the products. ``go_on``, after the second barrier, starts to copy the furthest slot, because all
threads have then finished with the slot before this one.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from ..emit import WARP, Place, SharedPool, call, shared

#: Indices that a thread loads at a time before it looks at the first, so that it waits only once for all of them.
SCANNED = 8


@T.inline
def find_last(last, found, index, m, start, end, s_kv, thread, threads):
    """Makes ``last[0]`` the position behind the last valid index in [start, end) of this thread's, `start` for none.

    Parameters
    ----------
    last, found : Buffer
        Local, int32 [1] and [SCANNED].
    index : Buffer
    m : expression
        Row of `index`.
    start, end, s_kv, thread, threads : expression
    """
    last[0] = start
    for i in T.serial((T.max(end - start, 0) + (threads * SCANNED - 1)) // (threads * SCANNED)):
        first: T.let = start + i * (threads * SCANNED) + thread
        for a in T.unroll(SCANNED):
            at: T.let = first + a * threads
            found[a] = T.if_then_else(at < end, index[m, T.Cast("int64", at)], -1)
        for a in T.unroll(SCANNED):
            if found[a] >= 0 and T.Cast("int64", found[a]) < s_kv:
                last[0] = first + a * threads + 1


@T.meta_class
class Gather:
    """Which rows are due.

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
        ``[slots_of(c), block_keys, at least a row]`` in shared memory.
    d_qk, d_v : int
    """

    def __init__(self, pool, places: SharedPool, tx, c, index, m, rows, s_kv, slots, d_qk: int, d_v: int) -> None:
        self.tx, self.lane, self.warp = tx, tx % WARP, tx // WARP
        self.warps, self.threads = c.warps, c.threads
        self.keys, self.stages = c.block_keys, c.stages
        self.own = c.block_keys // c.warps
        self.index, self.m, self.rows, self.s_kv, self.slots = index, m, rows, s_kv, slots
        # All rows begin alike, where a row is a multiple of 16 bytes.
        self.aligned: T.let = call("aligned_16", T.address_of(rows[T.int64(0), 0]))
        valid, last, *self.more = (shared(pool, place) for place in self.arrays(places, c, d_qk, d_v))
        #: ``valid[s % stages, j]``: whether key j of step s counts.
        self.valid = valid
        self.last = last
        self.start_at = T.local_scalar("int32")
        self.stop = T.local_scalar("int32")
        self.own_stop = T.alloc_local((1,), "int32")
        self.found = T.alloc_local((SCANNED,), "int32")
        self.row = T.alloc_local((self.own,), "int32")

    @staticmethod
    def arrays(places: SharedPool, c, d_qk: int, d_v: int) -> tuple[Place, ...]:
        """Which keys count, and a number of each warp."""
        return places.place((c.stages, c.block_keys), "int32"), places.place((c.warps,), "int32")

    @T.inline
    def begin(self, start, end):
        """Sets out at position `start`, to `stop`: before `end`, and behind it no index is valid."""
        self.start_at = start
        find_last(self.own_stop, self.found, self.index, self.m, start, end, self.s_kv, self.tx, self.threads)
        self.stop = self.own_stop[0]
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
            at: T.let = self.start_at + step * self.keys + r * self.warps + self.warp
            self.row[r] = T.if_then_else(at < self.stop, self.index[self.m, T.Cast("int64", at)], -1)

    def counts(self, r):
        """Whether the r-th row that was looked up is one."""
        row = T.Cast("int64", self.row[r])
        return T.Cast("int32", tirx.all(row >= T.int64(0), row < self.s_kv))


@T.meta_class
class RowGather(Gather):
    """Copies rows a slot at a time; each warp copies whole rows. An index out of bounds is a row of zeros, not read."""

    def __init__(self, pool, places: SharedPool, tx, c, index, m, rows, s_kv, slots, d_qk: int, d_v: int) -> None:
        super().__init__(pool, places, tx, c, index, m, rows, s_kv, slots, d_qk, d_v)
        self.width = 4 if rows.dtype == "float32" else 2
        self.elements = 16 // self.width
        self.length = d_qk
        self.copies = -(-self.length // (self.elements * WARP))

    @staticmethod
    def slots_of(c) -> int:
        """How many slots there are."""
        return c.stages

    def slot(self, step):
        return step % self.stages

    @T.inline
    def start(self, steps):
        for s in T.serial(self.stages - 1):
            if s < steps:
                self.fetch(s)
            T.evaluate(call("cp_async_commit", dtype="void"))
            self.look_up(s + 1)
        T.evaluate(call("cp_async_wait", self.stages - 2, dtype="void"))

    @T.inline
    def await_next(self):
        pass

    @T.inline
    def settle_next(self, step, steps):
        T.evaluate(call("cp_async_wait", self.stages - 3, dtype="void"))

    @T.inline
    def go_on(self, step, steps):
        if step + (self.stages - 1) < steps:
            self.fetch(step + (self.stages - 1))
        T.evaluate(call("cp_async_commit", dtype="void"))
        self.look_up(step + self.stages)

    @T.inline
    def fetch(self, step):
        """Starts to copy the rows that were looked up to slot ``step % stages``."""
        for r in T.unroll(self.own):
            key: T.let = r * self.warps + self.warp
            counts: T.let = self.counts(r)
            if self.lane == 0:
                self.valid[step % self.stages, key] = counts
            source: T.let = T.Select(counts == 1, T.Cast("int64", self.row[r]), T.int64(0))
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
