"""The softmax of two warpgroups that take turns at the tiles of keys, in powers of two."""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import call
from ..online_softmax import SLACK, exp2, max_nan
from .decisions import KEYS
from .products import SCORES, SUMS


def zero_if_none(shift):
    """The shift to subtract. While all scores are -inf that is 0, so that the weights are 0, not NaN."""
    return T.Select(shift == -T.infinity("float32"), T.float32(0), shift)


@T.meta_class
class RowSoftmax:
    """What a thread knows of its two heads. The four threads of a row know the same, but for `sum`.

    Scores are in units of ln 2. `best` is the largest of a tile, `top` of all tiles of this warpgroup, NaN once there
    was one. A weight is ``2 ** (score - shift)``, `sum` that of a tile's in this thread, `total` that of the row's in
    this warpgroup. `shift` is that of both warpgroups, -inf while there are only scores of -inf or NaN.

    Parameters
    ----------
    products : Products
    """

    def __init__(self, products) -> None:
        self.scores, self.sums, self.column = products.scores, products.sums, products.column
        self.best = T.alloc_local((2,), "float32")
        self.top = T.alloc_local((2,), "float32")
        self.shift = T.alloc_local((2,), "float32")
        self.fade = T.alloc_local((2,), "float32")
        self.sum = T.alloc_local((2,), "float32")
        self.total = T.alloc_local((2,), "float32")

    @T.inline
    def clear(self):
        for r in T.unroll(2):
            self.top[r] = -T.infinity("float32")
            self.shift[r] = -T.infinity("float32")
            self.total[r] = T.float32(0)

    @T.inline
    def look(self, counts, slot, scale):
        """Finds the largest scores. Key j of the tile counts where bit ``j % 16`` of ``counts[slot, j // 16]`` is 1."""
        for i in T.unroll(SCORES):
            self.scores[i] = self.scores[i] * scale
        all_count: T.let = counts[slot, 0] & counts[slot, 1] & counts[slot, 2] & counts[slot, 3]
        if all_count != T.uint32(0xFFFF):
            for n in T.unroll(KEYS // 8):
                bits: T.let = counts[slot, n // 2] >> T.Cast("uint32", n % 2 * 8 + self.column)
                for e in T.unroll(4):
                    if (bits >> T.Cast("uint32", e % 2)) & T.uint32(1) == T.uint32(0):
                        self.scores[n * 4 + e] = -T.infinity("float32")
        for r in T.unroll(2):
            self.best[r] = self.scores[r * 2]
            for i in T.unroll(SCORES // 2 - 1):
                self.best[r] = max_nan(self.best[r], self.scores[(i + 1) // 2 * 4 + r * 2 + (i + 1) % 2])
            for x in T.unroll(2):
                self.best[r] = max_nan(self.best[r], call("shuffle_xor", self.best[r], 1 << x, dtype="float32"))
            self.top[r] = max_nan(self.top[r], self.best[r])

    @T.inline
    def move(self, r, shift):
        """Goes over to another shift: what there is of sums is to be multiplied with `fade`."""
        self.fade[r] = T.Select(shift == self.shift[r], T.float32(1), exp2(self.shift[r] - shift))
        self.shift[r] = shift
        self.total[r] = self.total[r] * self.fade[r]

    @T.inline
    def rise(self, r, shift):
        """Goes over to `shift`, or to the largest score where that is far above it."""
        self.move(r, T.Select(self.best[r] > shift + T.float32(SLACK), self.best[r], shift))

    @T.inline
    def weigh(self):
        """Makes weights of the scores."""
        for r in T.unroll(2):
            base: T.let = zero_if_none(self.shift[r])
            self.sum[r] = T.float32(0)
            for i in T.unroll(SCORES // 2):
                at: T.let = i // 2 * 4 + r * 2 + i % 2
                self.scores[at] = exp2(self.scores[at] - base)
                self.sum[r] = self.sum[r] + self.scores[at]

    def heaviest(self, r):
        """The largest weight of the tile."""
        return exp2(self.best[r] - zero_if_none(self.shift[r]))

    @T.inline
    def fade_elements(self, elements, count):
        """Multiplies what is of the last shift."""
        if self.fade[0] != T.float32(1) or self.fade[1] != T.float32(1):
            for n in T.unroll(count // 4):
                for e in T.unroll(4):
                    elements[n * 4 + e] = elements[n * 4 + e] * self.fade[e // 2]

    @T.inline
    def fade_weights(self):
        self.fade_elements(self.scores, SCORES)

    @T.inline
    def fade_sums(self):
        self.fade_elements(self.sums, SUMS)

    @T.inline
    def add_up(self):
        """Adds the tile's weights to `total`."""
        for r in T.unroll(2):
            for x in T.unroll(2):
                self.sum[r] = self.sum[r] + call("shuffle_xor", self.sum[r], 1 << x, dtype="float32")
            self.total[r] = self.total[r] + self.sum[r]
