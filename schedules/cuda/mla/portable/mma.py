"""The two products of the attention with tensor cores, over keys in shared memory.

`MmaTiles` and `fma.FmaTiles` have the same interface. They hold the heads of a query, the slots to which rows of keys
are copied, and the output in registers. ``score`` writes scores to shared memory as `splits` addends, each over a part
of d_qk. ``put`` takes the weights that are made of them. ``accumulate`` adds the weighted values to the output.
``scale`` multiplies the output of each head by a factor. All warps take part in each method, and barriers lie between
them.
"""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import WARP, Place, SharedPool, call, shared


@T.meta_class
class MmaTiles:
    """bf16 or f16, products m16n8k16 with f32 sums.

    Scores: the warps divide heads, keys and d_qk, and each keeps its part of the queries in registers: what is read
    from shared memory is keys, once by each warp that divides the heads. Output: each warp has all heads and some
    units of 16 values.

    Weights have 8 or 11 bits here. If that is too few, a second pass of ``accumulate`` adds what rounding cut off.

    Parameters
    ----------
    pool : Buffer
    places : SharedPool
    tx : expression
        The thread.
    c : Decisions
    d_qk, d_v : int
    dtype : str
        ``bfloat16`` or ``float16``.
    slots : int
        How many slots of keys there are.
    """

    #: Whether the weights are rounded.
    ROUNDS = True

    def __init__(self, pool, places: SharedPool, tx, c, d_qk: int, d_v: int, dtype: str, slots: int) -> None:
        short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
        self.mma, self.pack, self.rest = f"mma_{short}", f"pack_{short}", f"rest_{short}"
        self.lane, self.warp = tx % WARP, tx // WARP
        self.splits = c.score_split
        self.split, within = self.warp // (c.warps // self.splits), self.warp % (c.warps // self.splits)
        across_keys, across_heads = c.score_warps
        self.first_head, self.first_key = within // across_keys, within % across_keys
        self.head_tiles, self.score_heads, self.score_keys = (
            c.heads // 16,
            c.heads // 16 // across_heads,
            c.block_keys // 16 // across_keys,
        )
        self.depth = d_qk // 16
        self.steps = -(-self.depth // self.splits)
        self.even = self.depth % self.splits == 0
        self.key_tiles = c.block_keys // 16
        self.all_units = d_v // 16
        self.units = -(-self.all_units // c.warps)
        self.full = self.all_units % c.warps == 0
        self.keys, self.scores, self.weights = (shared(pool, p) for p in self.arrays(places, c, d_qk, slots))
        self.queries = T.alloc_local((self.score_heads, self.steps, 4), "uint32")
        self.a = T.alloc_local((self.head_tiles, 4), "uint32")
        self.b = T.alloc_local((4,), "uint32")
        self.c = T.alloc_local((self.score_heads, 2, 4), "float32")
        self.sums = T.alloc_local((self.head_tiles, self.units * 2, 4), "float32")

    @staticmethod
    def arrays(places: SharedPool, c, d_qk: int, slots: int) -> tuple[Place, ...]:
        """Queries, slots of keys, scores and weights."""
        # 16 bytes more to a row: the eight rows that ldmatrix reads at a time lie in different banks.
        return (
            places.place((slots, c.block_keys, d_qk + 8), "uint16"),
            places.place((c.score_split, c.heads, c.block_keys + 8), "float32"),
            places.place((2, c.heads, c.block_keys + 8), "uint16"),
        )

    @T.inline
    def load_queries(self, queries, m, first_head, h_q):
        """The warp's part of row `m` of `queries`; heads from `h_q` on are zeros."""
        for i in T.unroll(self.score_heads):
            for s in T.unroll(self.steps):
                for e in T.unroll(4):
                    step: T.let = s * self.splits + self.split
                    within: T.let = (self.first_head * self.score_heads + i) * 16 + e % 2 * 8 + self.lane // 4
                    head: T.let = T.Cast("int64", first_head + within)
                    self.queries[i, s, e] = T.uint32(0)
                    if head < h_q and (self.even or step < self.depth):
                        at: T.let = T.address_of(queries[m, head, step * 16 + e // 2 * 8 + self.lane % 4 * 2])
                        self.queries[i, s, e] = call("get_2x16", at, dtype="uint32")

    @T.inline
    def clear(self):
        for i in T.unroll(self.head_tiles):
            for n in T.unroll(self.units * 2):
                for e in T.unroll(4):
                    self.sums[i, n, e] = T.float32(0)

    @T.inline
    def score(self, slot):
        for n in T.unroll(self.score_keys):
            tile: T.let = (self.first_key * self.score_keys + n) * 16
            for i in T.unroll(self.score_heads):
                for half in T.unroll(2):
                    for e in T.unroll(4):
                        self.c[i, half, e] = T.float32(0)
            for s in T.unroll(self.steps):
                step: T.let = s * self.splits + self.split
                if self.even or step < self.depth:
                    key: T.let = tile + self.lane // 16 * 8 + self.lane % 8
                    at: T.let = T.address_of(self.keys[slot, key, step * 16 + self.lane // 8 % 2 * 8])
                    T.evaluate(call("ldmatrix_x4", T.address_of(self.b[0]), at, dtype="void"))
                    for i in T.unroll(self.score_heads):
                        for half in T.unroll(2):
                            to: T.let = T.address_of(self.c[i, half, 0])
                            query: T.let = T.address_of(self.queries[i, s, 0])
                            T.evaluate(call(self.mma, to, query, T.address_of(self.b[half * 2]), dtype="void"))
            for i in T.unroll(self.score_heads):
                for half in T.unroll(2):
                    for r in T.unroll(2):
                        head: T.let = (self.first_head * self.score_heads + i) * 16 + r * 8 + self.lane // 4
                        key: T.let = tile + half * 8 + self.lane % 4 * 2
                        to: T.let = T.address_of(self.scores[self.split, head, key])
                        T.evaluate(call("put_64", to, self.c[i, half, r * 2], self.c[i, half, r * 2 + 1], dtype="void"))

    @T.inline
    def put(self, head, key, low, high):
        rounded: T.let = call(self.pack, low, high, dtype="uint32")
        rest: T.let = call(self.rest, low, high, rounded, dtype="uint32")
        T.evaluate(call("put_32", T.address_of(self.weights[0, head, key]), rounded, dtype="void"))
        T.evaluate(call("put_32", T.address_of(self.weights[1, head, key]), rest, dtype="void"))

    @T.inline
    def scale(self, factors, always):
        for i in T.unroll(self.head_tiles):
            low: T.let = factors[i * 16 + self.lane // 4]
            high: T.let = factors[i * 16 + 8 + self.lane // 4]
            if always or low != T.float32(1) or high != T.float32(1):
                for n in T.unroll(self.units * 2):
                    for e in T.unroll(2):
                        self.sums[i, n, e] = self.sums[i, n, e] * low
                        self.sums[i, n, e + 2] = self.sums[i, n, e + 2] * high

    @T.inline
    def accumulate(self, slot, passes):
        for p in T.serial(passes):
            for t in T.unroll(self.key_tiles):
                for i in T.unroll(self.head_tiles):
                    at: T.let = T.address_of(self.weights[p, i * 16 + self.lane % 16, t * 16 + self.lane // 16 * 8])
                    T.evaluate(call("ldmatrix_x4", T.address_of(self.a[i, 0]), at, dtype="void"))
                for n in T.unroll(self.units):
                    unit: T.let = self.warp * self.units + n
                    if self.full or unit < self.all_units:
                        key: T.let = t * 16 + self.lane % 16
                        at: T.let = T.address_of(self.keys[slot, key, unit * 16 + self.lane // 16 * 8])
                        T.evaluate(call("ldmatrix_x4_trans", T.address_of(self.b[0]), at, dtype="void"))
                        for i in T.unroll(self.head_tiles):
                            for half in T.unroll(2):
                                to: T.let = T.address_of(self.sums[i, n * 2 + half, 0])
                                values: T.let = T.address_of(self.b[half * 2])
                                T.evaluate(call(self.mma, to, T.address_of(self.a[i, 0]), values, dtype="void"))

    @T.inline
    def each_pair(self, emit):
        """Passes the output to ``emit(head, value, low, high)``, two values at a time."""
        for i in T.unroll(self.head_tiles):
            for n in T.unroll(self.units * 2):
                for r in T.unroll(2):
                    value: T.let = (self.warp * self.units * 2 + n) * 8 + self.lane % 4 * 2
                    if self.full or value < self.all_units * 16:
                        head: T.let = i * 16 + r * 8 + self.lane // 4
                        emit(head, value, self.sums[i, n, r * 2], self.sums[i, n, r * 2 + 1])
