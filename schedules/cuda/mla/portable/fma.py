"""The two products of the attention in f32. The module `mma` describes the methods."""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import WARP, Place, SharedPool, call, shared


@T.meta_class
class FmaTiles:
    """f32 without tensor cores. With tf32, a factor would be split into parts, and an infinity would become NaN.

    Scores: each warp has a part of d_qk. Output: 8 heads x 4 values are an item; the threads divide the items.
    """

    #: Weights are f32 like everything else.
    ROUNDS = False

    def __init__(self, pool, places: SharedPool, tx, c, d_qk: int, d_v: int, dtype: str, slots: int) -> None:
        self.tx, self.lane, self.warp = tx, tx % WARP, tx // WARP
        self.threads, self.splits = c.threads, c.warps
        self.score_heads, self.score_keys = c.heads // 4, c.block_keys // 8
        self.heads, self.block_keys = c.heads, c.block_keys
        self.chunks = d_qk // 4
        self.steps = d_qk // 4 // c.warps
        self.quads = d_v // 4
        self.all_items = c.heads // 8 * self.quads
        self.items = -(-self.all_items // c.threads)
        self.full = self.all_items % c.threads == 0
        places_of = self.arrays(places, c, d_qk, slots)
        self.queries, self.keys, self.scores, self.weights = (shared(pool, place) for place in places_of)
        self.a = T.alloc_local((4,), "float32")
        self.b = T.alloc_local((self.score_keys, 4), "float32")
        self.c = T.alloc_local((self.score_heads, self.score_keys), "float32")
        self.weight = T.alloc_local((8,), "float32")
        self.value = T.alloc_local((4,), "float32")
        self.sums = T.alloc_local((self.items, 8, 4), "float32")
        self.block = T.alloc_local((8, 4), "float32")

    @staticmethod
    def arrays(places: SharedPool, c, d_qk: int, slots: int) -> tuple[Place, ...]:
        """Queries, slots of keys, scores and weights."""
        return (
            places.place((c.heads, d_qk + 4), "float32"),
            places.place((slots, c.block_keys, d_qk + 4), "float32"),
            places.place((c.warps, c.heads, c.block_keys + 4), "float32"),
            places.place((c.block_keys, c.heads + 4), "float32"),
        )

    @T.inline
    def clear(self):
        for n in T.unroll(self.items):
            for h in T.unroll(8):
                for e in T.unroll(4):
                    self.sums[n, h, e] = T.float32(0)

    @T.inline
    def load_queries(self, queries, m, first_head, h_q):
        """Starts to copy row `m` of `queries` to shared memory; heads from `h_q` on are zeros."""
        for i in T.serial((self.heads * self.chunks + self.threads - 1) // self.threads):
            chunk: T.let = i * self.threads + self.tx
            if chunk < self.heads * self.chunks:
                head: T.let = T.Cast("int64", first_head + chunk // self.chunks)
                at: T.let = T.address_of(queries[m, T.min(head, h_q - 1), chunk % self.chunks * 4])
                to: T.let = T.address_of(self.queries[chunk // self.chunks, chunk % self.chunks * 4])
                T.evaluate(call("copy_or_clear_16", to, at, 4, head < h_q, dtype="void"))

    @T.inline
    def score(self, slot):
        for i in T.unroll(self.score_heads):
            for j in T.unroll(self.score_keys):
                self.c[i, j] = T.float32(0)
        for s in T.serial(self.steps):
            d: T.let = (s * self.splits + self.warp) * 4
            for j in T.unroll(self.score_keys):
                at: T.let = T.address_of(self.keys[slot, self.lane % 8 + j * 8, d])
                T.evaluate(call("get_128", T.address_of(self.b[j, 0]), at, dtype="void"))
            for i in T.unroll(self.score_heads):
                at: T.let = T.address_of(self.queries[self.lane // 8 + i * 4, d])
                T.evaluate(call("get_128", T.address_of(self.a[0]), at, dtype="void"))
                for e in T.unroll(4):
                    for j in T.unroll(self.score_keys):
                        self.c[i, j] = self.c[i, j] + self.a[e] * self.b[j, e]
        for i in T.unroll(self.score_heads):
            for j in T.unroll(self.score_keys):
                self.scores[self.warp, self.lane // 8 + i * 4, self.lane % 8 + j * 8] = self.c[i, j]

    @T.inline
    def put(self, head, key, low, high):
        self.weights[key, head] = low
        self.weights[key + 1, head] = high

    @T.inline
    def scale(self, factors, always):
        for n in T.unroll(self.items):
            item: T.let = n * self.threads + self.tx
            if self.full or item < self.all_items:
                for h in T.unroll(8):
                    factor: T.let = factors[item // self.quads * 8 + h]
                    for e in T.unroll(4):
                        self.sums[n, h, e] = self.sums[n, h, e] * factor

    @T.inline
    def accumulate(self, slot, passes):
        for n in T.unroll(self.items):
            item: T.let = n * self.threads + self.tx
            if self.full or item < self.all_items:
                # A block is summed from zero: thousands of additions to one sum would exceed the tolerance of f32.
                for h in T.unroll(8):
                    for e in T.unroll(4):
                        self.block[h, e] = T.float32(0)
                for j in T.unroll(self.block_keys):
                    for half in T.unroll(2):
                        at: T.let = T.address_of(self.weights[j, item // self.quads * 8 + half * 4])
                        T.evaluate(call("get_128", T.address_of(self.weight[half * 4]), at, dtype="void"))
                    values: T.let = T.address_of(self.keys[slot, j, item % self.quads * 4])
                    T.evaluate(call("get_128", T.address_of(self.value[0]), values, dtype="void"))
                    for h in T.unroll(8):
                        for e in T.unroll(4):
                            self.block[h, e] = self.block[h, e] + self.weight[h] * self.value[e]
                for h in T.unroll(8):
                    for e in T.unroll(4):
                        self.sums[n, h, e] = self.sums[n, h, e] + self.block[h, e]

    @T.inline
    def each_pair(self, emit):
        """Passes the output to ``emit(head, value, low, high)``, two values at a time."""
        for n in T.unroll(self.items):
            item: T.let = n * self.threads + self.tx
            if self.full or item < self.all_items:
                for h in T.unroll(8):
                    for e in T.unroll(2):
                        head: T.let = item // self.quads * 8 + h
                        value: T.let = item % self.quads * 4 + e * 2
                        emit(head, value, self.sums[n, h, e * 2], self.sums[n, h, e * 2 + 1])
