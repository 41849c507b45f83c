"""The softmax of scores that come a block at a time (Milakov and Gimelshein, 2018), in powers of two."""

from __future__ import annotations

from tvm.script import tirx as T

from ..emit import Place, SharedPool, call, shared

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

#: Weights may grow to 2 to this power before the sums are scaled down. Few blocks do that, and no f16 overflows.
SLACK = 8.0

#: A weight with at least this share of the sum is too large to be rounded to 8 or 11 bits. With smaller shares, the
#: errors of all weights together stay below a quarter of the tolerance for values near 1.
LARGE = 1 / 16


def max_nan(x, y):
    """The larger one, NaN if either is."""
    return call("max_nan", x, y, dtype="float32")


def exp2(x):
    return call("exp2", x, dtype="float32")


@T.meta_class
class OnlineSoftmax:
    """Some neighbouring threads of a warp have one head, and of a block of keys some pairs each.

    Scores are in units of ln 2. `top` is the largest one so far, NaN once there was one; a weight is
    ``2 ** (score - shift)`` and `total` the sum of them. `shift` is 0 while all scores are -inf, which gives the
    weights 0 that are due, not NaN. `large` tells whether a weight of the last block was a large one.

    Parameters
    ----------
    pool : Buffer
    places : SharedPool
    tx : expression
        The thread.
    c : Decisions
    """

    def __init__(self, pool, places: SharedPool, tx, c) -> None:
        self.group = c.softmax_threads
        self.head, self.lane = tx // self.group, tx % self.group
        # The other threads, whole warps, have nothing to do.
        self.all_threads = c.heads * self.group == c.threads
        self.works = tx < c.heads * self.group
        self.pairs = c.block_keys // 2 // self.group
        self.rounds = self.group.bit_length() - 1
        #: What the sums of each head are to be multiplied with, for all threads.
        self.factor = shared(pool, self.array(places, c))
        self.x = T.alloc_local((self.pairs * 2,), "float32")
        self.addend = T.alloc_local((2,), "float32")
        self.top = T.local_scalar("float32")
        self.best = T.local_scalar("float32")
        self.shift = T.local_scalar("float32")
        self.fade = T.local_scalar("float32")
        self.sum = T.local_scalar("float32")
        self.total = T.local_scalar("float32")
        self.heaviest = T.local_scalar("float32")
        self.large = T.local_scalar("int32")

    @staticmethod
    def array(places: SharedPool, c) -> Place:
        """Where the factors are."""
        return places.place((c.heads,), "float32")

    @T.inline
    def clear(self):
        self.top = -T.infinity("float32")
        self.shift = T.float32(0)
        self.total = T.float32(0)

    @T.inline
    def update(self, tiles, valid, slot, scale):
        """Makes weights of the scores in `tiles`. Key j of the slot counts where ``valid[slot, j]`` is not 0."""
        self.large = 0
        if self.all_threads or self.works:
            self.best = self.top
            for i in T.unroll(self.pairs):
                key: T.let = (i * self.group + self.lane) * 2
                first: T.let = T.address_of(tiles.scores[0, self.head, key])
                T.evaluate(call("get_64", T.address_of(self.x[i * 2]), first, dtype="void"))
                for s in T.unroll(tiles.splits - 1):
                    other: T.let = T.address_of(tiles.scores[s + 1, self.head, key])
                    T.evaluate(call("get_64", T.address_of(self.addend[0]), other, dtype="void"))
                    for e in T.unroll(2):
                        self.x[i * 2 + e] = self.x[i * 2 + e] + self.addend[e]
                for e in T.unroll(2):
                    self.x[i * 2 + e] = self.x[i * 2 + e] * scale
                    if valid[slot, key + e] == 0:
                        self.x[i * 2 + e] = -T.infinity("float32")
                    self.best = max_nan(self.best, self.x[i * 2 + e])
            for r in T.unroll(self.rounds):
                self.best = max_nan(self.best, call("shuffle_xor", self.best, 1 << r, dtype="float32"))
            self.fade = T.float32(1)
            if self.top == -T.infinity("float32"):
                # Until now every weight was 0.
                if self.best > -T.infinity("float32"):
                    self.shift = self.best
            elif self.best > self.shift + T.float32(SLACK):
                self.fade = exp2(self.shift - self.best)
                self.shift = self.best
            self.top = self.best
            self.sum = T.float32(0)
            self.heaviest = T.float32(0)
            for i in T.unroll(self.pairs):
                for e in T.unroll(2):
                    self.x[i * 2 + e] = exp2(self.x[i * 2 + e] - self.shift)
                    self.sum = self.sum + self.x[i * 2 + e]
                    self.heaviest = T.max(self.heaviest, self.x[i * 2 + e])
                tiles.put(self.head, (i * self.group + self.lane) * 2, self.x[i * 2], self.x[i * 2 + 1])
            for r in T.unroll(self.rounds):
                self.sum = self.sum + call("shuffle_xor", self.sum, 1 << r, dtype="float32")
            self.total = self.total * self.fade + self.sum
            self.large = T.Cast("int32", self.heaviest > self.total * T.float32(LARGE))
            if self.lane == 0:
                self.factor[self.head] = self.fade
