"""Sum the scores of a tile of keys over the heads, in registers. `tiles` makes the scores."""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import WARP, call


@T.meta_class
class HeadSum:
    """The sum of ``weight * relu(score)`` over the heads, for this lane's keys and heads and then for all heads.

    Parameters
    ----------
    c : Decisions
    weights : Buffer [queries, rows], float32
        In shared memory. Rows after the last head are 0.
    h_idx : expression
    guarded : bool
        Whether keys can be infinite. Their products with the rows after the last head, which are 0, are NaN.
    tx : expression
    """

    def __init__(self, c, weights, h_idx, guarded: bool, tx) -> None:
        self.weights, self.h_idx, self.guarded = weights, h_idx, guarded
        self.tx, self.lane, self.threads = tx, tx % WARP, c.warps * WARP
        self.key_tiles, self.head_tiles = c.key_tiles, c.head_tiles
        self.quads = max(c.key_tiles // 2, 1)
        self.part = T.alloc_local((self.quads * 4,), "float32")
        self.weight = T.alloc_local((c.head_tiles * 2,), "float32")

    @T.inline
    def take_weights(self, weights, row, query):
        """The block's query `query` has the weights in `row` of `weights`, which are there after a barrier."""
        rows: T.let = self.weights.shape[1]
        for e in T.serial((rows + (self.threads - 1)) // self.threads):
            head: T.let = e * self.threads + self.tx
            if head < rows:
                value: T.let = T.if_then_else(head < self.h_idx, weights[row, head], T.float32(0))
                self.weights[query, head] = value

    @T.inline
    def clear(self):
        for r in T.unroll(self.quads * 4):
            self.part[r] = T.float32(0)

    @T.inline
    def add(self, scores, query, first):
        """Adds the heads from `first` on, whose scores `scores` has."""
        for n in T.unroll(self.head_tiles):
            at: T.let = T.address_of(self.weights[query, first + n * 8 + self.lane % 4 * 2])
            T.evaluate(call("get_64", T.address_of(self.weight[n * 2]), at, dtype="void"))
        if self.guarded:
            if first + self.head_tiles * 8 <= self.h_idx:
                self._add(scores, first, False)
            else:
                self._add(scores, first, True)
        else:
            self._add(scores, first, False)

    @T.inline
    def _add(self, scores, first, some):
        for n in T.unroll(self.head_tiles * 2):
            for r in T.unroll(self.key_tiles * 2):
                score: T.let = scores.value(r // 2, n // 2, r % 2 * 2 + n % 2)
                x: T.let = call("max_nan", score, T.float32(0), dtype="float32")
                if some:
                    head: T.let = first + n // 2 * 8 + self.lane % 4 * 2 + n % 2
                    self.part[r] = self.part[r] + self.weight[n] * T.Select(head < self.h_idx, x, T.float32(0))
                else:
                    self.part[r] = self.part[r] + self.weight[n] * x

    @T.inline
    def finish(self):
        """``part[4 q]`` becomes the whole sum of the key ``4 q + lane % 4``: of two, a lane gives one away."""
        for q in T.unroll(self.quads):
            for j in T.unroll(2):
                upper: T.let = self.lane % 4 >= 2
                gone: T.let = T.Select(upper, self.part[q * 4 + j], self.part[q * 4 + j + 2])
                kept: T.let = T.Select(upper, self.part[q * 4 + j + 2], self.part[q * 4 + j])
                self.part[q * 4 + j] = kept + call("shuffle_xor", gone, 2, dtype="float32")
            odd: T.let = self.lane % 2 == 1
            gone: T.let = T.Select(odd, self.part[q * 4], self.part[q * 4 + 1])
            kept: T.let = T.Select(odd, self.part[q * 4 + 1], self.part[q * 4])
            self.part[q * 4] = kept + call("shuffle_xor", gone, 1, dtype="float32")
