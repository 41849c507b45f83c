"""The turns of the two multiplying warpgroups, and the barriers that order them.

For each pair of tiles warpgroup 0 goes first. It computes a shift from the last one and its scores, and warpgroup 1
computes the shift of the pair from that and its own scores. Then each adds up its own weighted values, and those of the
other once it has their weights. A half of a slot is free as soon as its values are added, and the next rows are copied
there.

If a tile has large weights, both warpgroups also multiply the remainders that rounding cut off. Each does so for its
own values before their half is free, and for those of the other when all weights have been used, because the remainders
take their place.
"""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import call
from .decisions import WARPGROUP

#: Barriers between the warpgroups: the shift of 0 or 1, the weights of 0 or 1, both. One of warpgroup 0 alone.
SHIFT, WEIGHTS, BOTH, ALONE = (1, 2), (3, 4), 5, 6


def ready(bars, slot, half):
    """The barrier that awaits keys in a half of a slot."""
    return T.address_of(bars[slot * 2 + half])


def free(bars, slot, half):
    """The barrier that awaits that nothing reads a half of a slot any more."""
    return T.address_of(bars[4 + slot * 2 + half])


@T.meta_class
class Turns:
    """The work of warpgroup 0 and of warpgroup 1.

    Parameters
    ----------
    products : Products
    softmax : RowSoftmax
    votes : Votes
    bars : Buffer
        See `ready` and `free`.
    counts : Buffer
        Which keys count.
    shifts : Buffer
        Shared memory for the shifts, f32 [2, heads].
    scale : expression
        What makes scores of products, in units of ln 2.
    tiles : expression
        How many there are. Of the last pair there may be one.
    """

    def __init__(self, products, softmax, votes, bars, counts, shifts, scale, tiles) -> None:
        self.products, self.softmax, self.votes = products, softmax, votes
        self.bars, self.counts = bars, counts
        self.shifts, self.scale, self.tiles = shifts, scale, tiles

    @T.inline
    def meet(self, barrier):
        T.evaluate(call("barrier", barrier, 2 * WARPGROUP, dtype="void"))

    @T.inline
    def arrive(self, barrier):
        T.evaluate(call("barrier_arrive", barrier, 2 * WARPGROUP, dtype="void"))

    @T.inline
    def release(self, slot, half):
        if self.products.lane == 0:
            T.evaluate(call("mbarrier_arrive", free(self.bars, slot, half), dtype="void"))

    @T.inline
    def take(self, slot, half, parity):
        T.evaluate(call("mbarrier_wait", ready(self.bars, slot, half), parity, dtype="void"))
        # What cp.async wrote, the queries too, is not yet there for the products.
        T.evaluate(call("fence_async", dtype="void"))
        self.products.start_scores(slot, half)

    @T.inline
    def find_scores(self, slot, parity):
        self.take(slot, 0, parity)
        self.take(slot, 1, parity)
        self.products.wait_scores()
        self.softmax.look(self.counts, slot, self.scale)

    @T.inline
    def put_shift(self, slot):
        if self.products.column == 0:
            for r in T.unroll(2):
                self.shifts[slot, self.products.row + r * 8] = self.softmax.shift[r]
        self.arrive(SHIFT[slot])

    @T.inline
    def add_own_rests(self, slot):
        """Multiplies once more; the weights remain packed no longer, but their rests."""
        self.products.pack_rests()
        self.products.start_own(slot)
        self.products.wait_sums()

    @T.inline
    def exchange_rests(self, slot):
        """Gives the rests of slot's tile, and takes those of the other one, where they are due."""
        self.meet(BOTH)
        if self.votes.large[slot] != T.uint32(0):
            self.products.put(slot, self.products.rests)
        self.meet(BOTH)
        if self.votes.large[1 - slot] != T.uint32(0):
            self.products.start_other(1 - slot, False)
            self.products.wait_sums()

    @T.inline
    def go_first(self, pairs):
        """The work of warpgroup 0."""
        for j in T.serial(pairs):
            self.products.forget()
            second: T.let = j * 2 + 1 < self.tiles
            self.find_scores(0, j % 2)
            for r in T.unroll(2):
                self.softmax.rise(r, self.softmax.shift[r])
            self.put_shift(0)
            self.softmax.weigh()
            self.products.pack_weights()
            self.softmax.fade_sums()
            self.products.start_own(0)
            self.votes.put(0, j % 2)
            T.evaluate(call("barrier", ALONE, WARPGROUP, dtype="void"))
            self.votes.get(0)
            self.votes.large[1] = T.uint32(0)
            self.products.wait_sums()
            if self.votes.large[0] != T.uint32(0):
                self.add_own_rests(0)
            self.release(0, 0)
            if second:
                self.meet(SHIFT[1])
                for r in T.unroll(2):
                    self.softmax.move(r, self.shifts[1, self.products.row + r * 8])
                self.softmax.fade_weights()
            # They take the place of keys, of which all warps have made scores when they have voted.
            self.products.put(0, self.products.weight_pair)
            self.votes.put_total(0, j % 2)
            self.arrive(WEIGHTS[0])
            if second:
                self.softmax.fade_sums()
                self.meet(WEIGHTS[1])
                self.votes.get(1)
                self.products.start_other(1, False)
                self.products.wait_sums()
            if self.votes.large[0] | self.votes.large[1] != T.uint32(0):
                self.exchange_rests(0)
            if second:
                self.release(1, 1)

    @T.inline
    def go_second(self, pairs):
        """The work of warpgroup 1."""
        for j in T.serial(pairs):
            self.products.forget()
            if j * 2 + 1 < self.tiles:
                self.find_scores(1, j % 2)
                self.meet(SHIFT[0])
                for r in T.unroll(2):
                    self.softmax.rise(r, self.shifts[0, self.products.row + r * 8])
                self.put_shift(1)
                self.softmax.weigh()
                self.votes.put(1, j % 2)
                self.products.pack_weights()
                self.softmax.fade_sums()
                self.products.start_own(1)
                self.products.put(1, self.products.weight_pair)
                self.votes.put_total(1, j % 2)
                self.arrive(WEIGHTS[1])
                self.meet(WEIGHTS[0])
                self.votes.get(0)
                self.votes.get(1)
                self.products.start_other(0, True)
                T.evaluate(call("wgmma_wait<1>", dtype="void"))
                if self.votes.large[1] == T.uint32(0):
                    self.release(1, 0)
                self.products.wait_sums()
                if self.votes.large[1] != T.uint32(0):
                    self.add_own_rests(1)
                    self.release(1, 0)
            else:
                self.meet(SHIFT[0])
                for r in T.unroll(2):
                    self.softmax.move(r, self.shifts[0, self.products.row + r * 8])
                self.softmax.fade_sums()
                self.meet(WEIGHTS[0])
                self.votes.get(0)
                self.votes.large[1] = T.uint32(0)
                self.products.start_other(0, False)
                self.products.wait_sums()
            if self.votes.large[0] | self.votes.large[1] != T.uint32(0):
                self.exchange_rests(1)
            self.release(0, 1)
