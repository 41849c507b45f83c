"""Tell both multiplying warpgroups whether a tile has weights that are too large to be rounded."""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import WARP, call
from ..online_softmax import LARGE
from .decisions import WARPGROUP


@T.meta_class
class Votes:
    """The votes of the warps of each warpgroup about its tile, and the totals that they need for them.

    Parameters
    ----------
    products : Products
    softmax : RowSoftmax
    totals : Buffer
        Shared memory for the sums of the rows' weights in each warpgroup, up to the last pair of either parity, f32
        [2, 2, heads].
    said : Buffer
        Shared memory for the votes, uint32 [2, warps].
    """

    def __init__(self, products, softmax, totals, said) -> None:
        self.products, self.softmax, self.totals, self.said = products, softmax, totals, said
        #: Not 0 where the tile of this slot has large weights; the same in all threads of both warpgroups.
        self.large = T.alloc_local((2,), "uint32")

    @T.inline
    def clear(self, warpgroup):
        """Before the first pair, and before a barrier of both."""
        if self.products.column == 0:
            for r in T.unroll(2):
                self.totals[1, warpgroup, self.products.row + r * 8] = T.float32(0)

    @T.inline
    def put(self, slot, parity):
        """Votes on slot's tile, this warpgroup's, and adds its weights to the totals."""
        self.softmax.add_up()
        self.large[slot] = T.uint32(0)
        for r in T.unroll(2):
            # The others' share of the tiles before this pair, which was relative to the last shift.
            other: T.let = self.totals[1 - parity, 1 - slot, self.products.row + r * 8] * self.softmax.fade[r]
            if self.softmax.heaviest(r) > (self.softmax.total[r] + other) * T.float32(LARGE):
                self.large[slot] = T.uint32(1)
        self.large[slot] = call("ballot", T.Cast("int32", self.large[slot]), dtype="uint32")
        if self.products.lane == 0:
            self.said[slot, self.products.row // 16] = self.large[slot]

    @T.inline
    def put_total(self, slot, parity):
        """Tells the other warpgroup the totals, relative to the shift that both have at the end of the pair."""
        if self.products.column == 0:
            for r in T.unroll(2):
                self.totals[parity, slot, self.products.row + r * 8] = self.softmax.total[r]

    @T.inline
    def get(self, slot):
        """Learns what was voted, behind a barrier of those who voted."""
        vote: T.let = self.said[slot, self.products.lane % (WARPGROUP // WARP)]
        self.large[slot] = call("ballot", T.Cast("int32", vote != T.uint32(0)), dtype="uint32")
