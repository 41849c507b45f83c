"""Exact selection of the largest keys by a block: a radix select and an ordered compaction.

The keys come from the sources in `keys`. Atomic additions fill the histogram of the radix select, but only their sums
are used, and the compaction keeps the order of the keys. So the result is the same on every run.
"""

from __future__ import annotations

from tvm.script import tirx as T

from ..emit import WARP, Place, SharedPool, call, shared

BINS = 2048


def _shift(d):
    """Digits are 11 bits from 21, 10 and 0 on. The last two share a bit."""
    return T.Cast("uint32", T.max(21 - 11 * d, 0))


def _agree(key, bound, d):
    """Whether `key` has the digits of `bound` before digit `d`."""
    return ((key ^ bound) >> T.uint32(1)) >> T.Cast("uint32", 31 - 11 * d) == T.uint32(0)


def _places(pool: SharedPool) -> tuple[Place, ...]:
    return pool.place((BINS,), "int32"), pool.place((2, WARP), "int32"), pool.place((4,), "int32")


def selector_bytes() -> int:
    """Shared memory that a `Selector` takes."""
    pool = SharedPool()
    _places(pool)
    return pool.bytes


@T.meta_class
class Selector:
    """What is selected: the keys above `bound` and, of those that equal it, the first `ties`.

    Parameters
    ----------
    pool : Buffer
        The kernel's shared memory.
    places : SharedPool
        Where the selector takes its part of it.
    tx : expression
        The thread.
    threads : int
        Threads of the block: 256, 512 or 1024.
    """

    def __init__(self, pool, places: SharedPool, tx, threads: int) -> None:
        self.tx = tx
        self.lane = tx % WARP
        self.warp = tx // WARP
        self.threads = threads
        self.warps = threads // WARP
        # As many quads to a thread as make one sum of a warp and quad for every lane of a warp.
        self.quads = WARP // self.warps
        self.tile = threads * self.quads * 4
        self.share = BINS // threads
        self.hist, self.sums, self.found = (shared(pool, place) for place in _places(places))
        self.key = T.alloc_local((self.quads * 4,), "uint32")
        self.over = T.alloc_local((self.quads * 4,), "uint32")
        self.equal = T.alloc_local((self.quads * 4,), "uint32")
        self.bound = T.local_scalar("uint32")
        self.ties = T.local_scalar("int32")
        self.more = T.local_scalar("int32")
        self.scan = T.local_scalar("int32")
        self.rank = T.local_scalar("int32")
        self.tie_rank = T.local_scalar("int32")
        self.passed = T.local_scalar("int32")
        self.passed_ties = T.local_scalar("int32")
        self.t = T.local_scalar("int32")

    def tiles(self, n):
        """Tiles that hold `n` keys."""
        return (n + (self.tile - 1)) // self.tile

    @T.inline
    def scan_warp(self):
        """`scan` becomes the sum of it over all lanes up to this one."""
        for step in T.unroll(5):
            lower: T.let = call("shuffle_up", self.scan, 1 << step)
            if self.lane >= 1 << step:
                self.scan = self.scan + lower

    @T.inline
    def select(self, source, tiles, k):
        """Finds the bound and the ties of the `k` largest keys, all of them where there are no more."""
        self.bound = T.uint32(0)
        self.ties = k
        self.more = 1
        for d in T.serial(3):
            if self.more == 1:
                for j in T.unroll(self.share):
                    self.hist[self.tx + j * self.threads] = 0
                T.tvm_storage_sync("shared")
                source.fetch(0)
                for t in T.serial(tiles):
                    source.take(t, self.key)
                    source.fetch(t + 1)
                    for i in T.unroll(self.quads * 4):
                        if self.key[i] != T.uint32(0) and _agree(self.key[i], self.bound, d):
                            bin_: T.let = T.Cast("int32", (self.key[i] >> _shift(d)) & T.uint32(BINS - 1))
                            T.evaluate(call("atomic_add", T.address_of(self.hist[bin_]), 1))
                T.tvm_storage_sync("shared")
                # Every thread owns some bins, the first one the highest.
                self.scan = 0
                for j in T.unroll(self.share):
                    self.scan = self.scan + self.hist[BINS - 1 - (self.tx * self.share + j)]
                own: T.let = self.scan
                self.scan_warp()
                self.rank = self.scan - own
                if self.lane == WARP - 1:
                    self.sums[0, self.warp] = self.scan
                T.tvm_storage_sync("shared")
                self.scan = 0
                if self.lane < self.warps:
                    self.scan = self.sums[0, self.lane]
                self.scan_warp()
                all_keys: T.let = call("shuffle", self.scan, WARP - 1)
                higher_warps: T.let = call("shuffle", self.scan, T.max(self.warp - 1, 0))
                if self.warp > 0:
                    self.rank = self.rank + higher_warps
                if self.rank < self.ties and self.ties <= self.rank + own:
                    for j in T.unroll(self.share):
                        here: T.let = self.hist[BINS - 1 - (self.tx * self.share + j)]
                        if self.rank < self.ties and self.ties <= self.rank + here:
                            self.found[0] = BINS - 1 - (self.tx * self.share + j)
                            self.found[1] = self.ties - self.rank
                        self.rank = self.rank + here
                T.tvm_storage_sync("shared")
                if all_keys <= self.ties:
                    # All of them: a whole bin or, at the first digit, all there are. The lowest key of a bin is not 0,
                    # which is no number's.
                    self.bound = T.max(self.bound, T.uint32(1)) - T.uint32(1)
                    self.ties = 0
                    self.more = 0
                else:
                    self.bound = self.bound | (T.Cast("uint32", self.found[0]) << _shift(d))
                    self.ties = self.found[1]

    @T.inline
    def compact(self, source, tiles, limit, write):
        """Passes what is selected to ``write(place, key, at)``, in order, until it was `limit`.

        `place` counts the selected and `at` all keys. `passed` is how many were selected.
        """
        self.passed = 0
        self.passed_ties = 0
        self.t = 0
        source.fetch(0)
        while self.t < tiles and self.passed + T.min(self.passed_ties, self.ties) < limit:
            t: T.let = self.t
            source.take(t, self.key)
            source.fetch(t + 1)
            for i in T.unroll(self.quads * 4):
                self.over[i] = call("ballot", self.key[i] > self.bound, dtype="uint32")
                self.equal[i] = call("ballot", self.key[i] == self.bound and self.ties > 0, dtype="uint32")
            # Both counts in one number: a tile has no more than 4096 keys.
            for u in T.unroll(self.quads):
                self.scan = 0
                for e in T.unroll(4):
                    self.scan = self.scan + call("count_bits", self.over[u * 4 + e])
                    self.scan = self.scan + (call("count_bits", self.equal[u * 4 + e]) << 16)
                if self.lane == 0:
                    self.sums[t % 2, u * self.warps + self.warp] = self.scan
            # The next tile has the other row of sums: one barrier is enough.
            T.tvm_storage_sync("shared")
            own: T.let = self.sums[t % 2, self.lane]
            self.scan = own
            self.scan_warp()
            below: T.let = (T.uint32(1) << T.Cast("uint32", self.lane)) - T.uint32(1)
            for u in T.unroll(self.quads):
                before: T.let = call("shuffle", self.scan - own, u * self.warps + self.warp)
                self.rank = self.passed + (before & 0xFFFF)
                self.tie_rank = self.passed_ties + (before >> 16)
                for e in T.unroll(4):
                    self.rank = self.rank + call("count_bits", self.over[u * 4 + e] & below)
                    self.tie_rank = self.tie_rank + call("count_bits", self.equal[u * 4 + e] & below)
                for e in T.unroll(4):
                    key: T.let = self.key[u * 4 + e]
                    at: T.let = t * self.tile + (u * self.threads + self.tx) * 4 + e
                    if key > self.bound or (key == self.bound and self.tie_rank < self.ties):
                        write(self.rank + T.min(self.tie_rank, self.ties), key, at)
                    if key > self.bound:
                        self.rank = self.rank + 1
                    if key == self.bound:
                        self.tie_rank = self.tie_rank + 1
            in_tile: T.let = call("shuffle", self.scan, WARP - 1)
            self.passed = self.passed + (in_tile & 0xFFFF)
            self.passed_ties = self.passed_ties + (in_tile >> 16)
            self.t = self.t + 1
        self.passed = self.passed + T.min(self.passed_ties, self.ties)
