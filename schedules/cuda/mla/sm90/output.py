"""The results of the multiplying warpgroups: the output, or the sums of a part and their shift."""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import call
from ..online_softmax import LN_2, LOG2_E, exp2, max_nan
from ..portable.kernel import EMPTY
from .decisions import D_V, WARPGROUP
from .softmax import zero_if_none
from .turns import BOTH


@T.meta_class
class Output:
    """A thread's half rows of two heads.

    Parameters
    ----------
    products : Products
    softmax : RowSoftmax
    warpgroup : expression
        0 or 1.
    ends : Buffer
        Shared memory for what the warpgroups tell each other, f32 [2, 2, heads].
    m, first_head, h_q : expression
        The query, its first head here and how many heads there are.
    """

    def __init__(self, products, softmax, warpgroup, ends, m, first_head, h_q) -> None:
        self.products, self.softmax, self.warpgroup, self.ends = products, softmax, warpgroup, ends
        self.m, self.first_head, self.h_q = T.Cast("int64", m), first_head, h_q
        self.top = T.alloc_local((2,), "float32")
        self.factor = T.alloc_local((2,), "float32")
        self.word = T.alloc_local((4,), "uint32")

    def head(self, r):
        """The head of the thread's row r."""
        return T.Cast("int64", self.first_head + self.products.row + r * 8)

    @T.inline
    def add_up(self):
        """Makes of both warpgroups' totals and largest scores one."""
        for r in T.unroll(2):
            if self.products.column == 0:
                self.ends[self.warpgroup, 0, self.products.row + r * 8] = self.softmax.top[r]
                self.ends[self.warpgroup, 1, self.products.row + r * 8] = self.softmax.total[r]
        T.evaluate(call("barrier", BOTH, 2 * WARPGROUP, dtype="void"))
        for r in T.unroll(2):
            row: T.let = self.products.row + r * 8
            self.top[r] = max_nan(self.ends[0, 0, row], self.ends[1, 0, row])
            self.softmax.total[r] = self.ends[0, 1, row] + self.ends[1, 1, row]

    @T.inline
    def put_stats(self, stats, part, empty):
        """As `sparse_mla` leaves them; `empty` is whether there was no key."""
        for r in T.unroll(2):
            if self.warpgroup == 0 and self.products.column == 0 and self.head(r) < self.h_q:
                stats[self.m, self.head(r), part, 0] = self.top[r]
                stats[self.m, self.head(r), part, 1] = self.softmax.shift[r]
                stats[self.m, self.head(r), part, 2] = T.Select(empty, T.float32(EMPTY), self.softmax.total[r])

    @T.inline
    def put_ends(self, max_logits, lse, attn_sink, has_sink, empty):
        """max_logits and lse, and what the sums are to be multiplied with."""
        for r in T.unroll(2):
            base: T.let = zero_if_none(self.softmax.shift[r])
            if self.warpgroup == 0 and self.products.column == 0 and self.head(r) < self.h_q:
                max_logits[self.m, self.head(r)] = self.top[r] * T.float32(LN_2)
                lse[self.m, self.head(r)] = T.if_then_else(
                    empty, T.infinity("float32"), base * T.float32(LN_2) + T.log(self.softmax.total[r])
                )
            if has_sink == 1 and self.head(r) < self.h_q:
                sink: T.let = attn_sink[self.head(r)] * T.float32(LOG2_E)
                self.softmax.total[r] = self.softmax.total[r] + exp2(sink - base)
            self.factor[r] = T.if_then_else(empty, T.float32(1), T.float32(1) / self.softmax.total[r])

    @T.inline
    def put_sums(self, sums, part):
        for r in T.unroll(2):
            if self.head(r) < self.h_q:
                for n in T.unroll(D_V // 16):
                    value: T.let = self.warpgroup * (D_V // 2) + n * 8 + self.products.column
                    to: T.let = T.address_of(sums[self.m, self.head(r), part, value])
                    low: T.let = self.products.sums[n * 4 + r * 2]
                    T.evaluate(call("put_64", to, low, self.products.sums[n * 4 + r * 2 + 1], dtype="void"))

    @T.inline
    def put_out(self, out):
        """Four threads have two values each of 8 neighbours. They exchange until each has all of every fourth 8."""
        for r in T.unroll(2):
            for n in T.unroll(D_V // 64):
                for i in T.unroll(4):
                    at: T.let = (n * 4 + i) * 4 + r * 2
                    low: T.let = self.products.sums[at] * self.factor[r]
                    high: T.let = self.products.sums[at + 1] * self.factor[r]
                    self.word[i] = call(self.products.pack, low, high, dtype="uint32")
                T.evaluate(call("transpose_quad", T.address_of(self.word[0]), dtype="void"))
                if self.head(r) < self.h_q:
                    value: T.let = self.warpgroup * (D_V // 2) + n * 32 + self.products.lane % 4 * 8
                    to: T.let = T.address_of(out[self.m, self.head(r), value])
                    T.evaluate(call("put_8x16", to, T.address_of(self.word[0]), dtype="void"))
