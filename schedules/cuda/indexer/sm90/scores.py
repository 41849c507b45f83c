"""The work of a consumer warpgroup of the sm_90a indexer on a tile of keys."""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import WARP, call
from .decisions import Decisions
from .ring import Ring


@T.meta_class
class Scores:
    """A consumer's products, and their sums over the heads.

    The product of a part has a row for each of the warpgroup's 64 keys, and a column for each head of each of the
    part's queries. A thread, with g = lane / 4 and t = lane % 4, has rows g and g + 8 of its warp's 16 and columns
    2 t and 2 t + 1 of every 8, so 2 sums for each query, of a quarter of the heads. Threads of equal g then exchange:
    with each step they keep half of the sums, if they have several, and add the other half of their neighbour.

    Parameters
    ----------
    ring : Ring
    c : Decisions
    variant : dict
    heads : int
        Columns of a query.
    group, tx : expression
        The warpgroup and the thread.
    """

    def __init__(self, ring: Ring, c: Decisions, variant: dict[str, str], heads: int, group, tx) -> None:
        self.ring = ring
        short = {"bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "e4m3"}[variant["K"]]
        # An infinite key times the zeros behind the last head is NaN; e4m3 has no infinity.
        self.infinite = short != "e4m3"
        self.product = f"wgmma_{short}<{c.columns}, 0>" if self.infinite else f"wgmma_e4m3<{c.columns}>"
        self.hold = f"wgmma_hold<{c.columns // 2}>"
        self.parts, self.columns, self.heads = c.parts, c.columns, heads
        self.queries = c.columns // heads
        self.half, self.quarter = self.queries, self.queries // 2
        self.kept = max(self.quarter, 1)
        # With one query to a part, the second half of the threads ends with the same sums as the first.
        self.other_half = tx % 4 // 2 if self.quarter == 0 else 0
        self.kept_queries, self.kept_rows = max(self.kept // 2, 1), min(self.kept, 2)
        self.group, self.lane, self.warp = group, tx % WARP, tx // WARP
        self.c = T.alloc_local((c.parts, c.columns // 2), "float32")
        self.weight = T.alloc_local((c.parts, c.columns // 4), "float32")
        self.part = T.alloc_local((2 * self.queries,), "float32")
        # Of the queries whose sums this thread ends with: which keys of the run they see and which they store, and
        # where their logits of the run begin; then the places of this thread's keys in the run.
        self.low = T.alloc_local((c.parts, self.kept_queries), "int32")
        self.high = T.alloc_local((c.parts, self.kept_queries), "int32")
        self.limit = T.alloc_local((c.parts, self.kept_queries), "int32")
        self.to = T.alloc_local((c.parts, self.kept_queries), "int64")
        self.at = T.alloc_local((self.kept_rows,), "int32")
        self.scale = T.alloc_local((self.kept_rows,), "float32")

    def sum_index(self, v):
        """Which of a part's sums, two to a query, this thread ends with as its number `v`."""
        return self.lane % 2 * self.half + self.lane // 2 % 2 * self.quarter + v

    def query(self, p, v):
        """The block's query that this thread's sum number `v` of part `p` is of."""
        return p * self.queries + self.sum_index(v) // 2

    def key(self, v):
        """The key of the tile that it is of."""
        return self.warp * 16 + self.lane // 4 + self.sum_index(v) % 2 * 8

    @T.inline
    def take_queries(self, W, KS, KE, first, count, h_idx, base, length):
        """Weights, and what the queries see of the run, which is `length` keys from `base` on."""
        for p in T.unroll(self.parts):
            for j in T.unroll(self.columns // 8):
                for e in T.unroll(2):
                    i: T.let = p * self.queries + j * 8 // self.heads
                    head: T.let = j * 8 % self.heads + self.lane % 4 * 2 + e
                    self.weight[p, j * 2 + e] = T.float32(0)
                    if i < count and head < h_idx:
                        self.weight[p, j * 2 + e] = W[first + i, head]
            for v in T.unroll(self.kept_queries):
                i: T.let = self.query(p, v * 2)
                self.low[p, v] = 0
                self.high[p, v] = 0
                if i < count:
                    # In two steps: simplified to max(ks - base, 0), the difference would overflow.
                    self.low[p, v] = T.max(KS[first + i], base)
                    self.high[p, v] = T.max(KE[first + i], base)
                    self.low[p, v] = self.low[p, v] - base
                    self.high[p, v] = T.min(self.high[p, v] - base, length)

    @T.inline
    def take_places(self, origin, s_kv, count, at, length, fill):
        """Where logits go: the first tile is `at` in the run, the first query's logits of which are at `origin`."""
        for p in T.unroll(self.parts):
            for v in T.unroll(self.kept_queries):
                i: T.let = self.query(p, v * 2)
                self.limit[p, v] = 0
                if i < count and fill == 1 and self.other_half == 0:
                    self.limit[p, v] = length
                if self.other_half == 1:
                    self.high[p, v] = 0
                self.to[p, v] = origin + T.Cast("int64", i) * s_kv
        T.evaluate(call(f"hold_64<{self.parts * self.kept_queries}>", T.address_of(self.to[0, 0]), dtype="void"))
        for r in T.unroll(self.kept_rows):
            self.at[r] = at + self.key(r)

    @T.inline
    def go_on(self):
        """To the next tile."""
        for r in T.unroll(self.kept_rows):
            self.at[r] = self.at[r] + self.ring.keys

    @T.inline
    def take_scales(self, SCALE, base, length, scaled):
        """Of this thread's keys of the tile."""
        for r in T.unroll(self.kept_rows):
            self.scale[r] = T.float32(1)
            if scaled == 1:
                if self.at[r] < length:
                    self.scale[r] = SCALE[base + self.at[r]]

    @T.inline
    def multiply(self, t, p):
        """Starts on a part of the run's tile number `t`, which has come."""
        T.evaluate(call("wgmma_fence", dtype="void"))
        for b in T.unroll(self.ring.blocks):
            tile: T.let = T.address_of(self.ring.tiles[t % self.ring.stages, b, self.group * 64, 0])
            queries: T.let = T.address_of(self.ring.queries[p, b, 0, 0])
            keys_at: T.let = call(self.ring.descriptor, tile, 16, 8 * self.ring.span, dtype="uint64")
            queries_at: T.let = call(self.ring.descriptor, queries, 16, 8 * self.ring.span, dtype="uint64")
            for s in T.unroll(self.ring.span // 32):
                further: T.let = T.Cast("uint64", s * 2)
                to: T.let = T.address_of(self.c[p, 0])
                add: T.let = T.Select(b + s > 0, 1, 0)
                T.evaluate(call(self.product, to, keys_at + further, queries_at + further, add, dtype="void"))
        T.evaluate(call("wgmma_commit", dtype="void"))

    @T.inline
    def wait(self, p, behind):
        """For part `p`, behind which `behind` others were started."""
        T.evaluate(call(f"wgmma_wait<{behind}>", dtype="void"))
        T.evaluate(call(self.hold, T.address_of(self.c[p, 0]), dtype="void"))

    @T.inline
    def sum_up(self, p, h_idx):
        """Leaves the sums over the heads of part `p` in `part`."""
        for r in T.unroll(2 * self.queries):
            self.part[r] = T.float32(0)
        if self.infinite:
            if h_idx < self.heads:
                self.weigh(p, h_idx, True)
            else:
                self.weigh(p, h_idx, False)
        else:
            self.weigh(p, h_idx, False)
        for i in T.unroll(self.half):
            upper: T.let = self.lane % 2 == 1
            mine: T.let = T.Select(upper, self.part[self.half + i], self.part[i])
            other: T.let = T.Select(upper, self.part[i], self.part[self.half + i])
            self.part[i] = mine + call("shuffle_xor", other, 1, dtype="float32")
        if self.quarter > 0:
            for i in T.unroll(self.quarter):
                upper: T.let = self.lane // 2 % 2 == 1
                mine: T.let = T.Select(upper, self.part[self.quarter + i], self.part[i])
                other: T.let = T.Select(upper, self.part[i], self.part[self.quarter + i])
                self.part[i] = mine + call("shuffle_xor", other, 2, dtype="float32")
        else:
            self.part[0] = self.part[0] + call("shuffle_xor", self.part[0], 2, dtype="float32")

    @T.inline
    def weigh(self, p, h_idx, guarded):
        for j in T.unroll(self.columns // 8):
            for e in T.unroll(4):
                # max(x, 0), but NaN stays NaN.
                x: T.let = call("max_nan", self.c[p, j * 4 + e], T.float32(0), dtype="float32")
                to: T.let = j * 8 // self.heads * 2 + e // 2
                head: T.let = j * 8 % self.heads + self.lane % 4 * 2 + e % 2
                if guarded:
                    y: T.let = T.Select(head < h_idx, x, T.float32(0))
                    self.part[to] = self.part[to] + self.weight[p, j * 2 + e % 2] * y
                else:
                    self.part[to] = self.part[to] + self.weight[p, j * 2 + e % 2] * x

    @T.inline
    def store(self, OUT, p):
        """The logits of part `p`."""
        for v in T.unroll(self.kept):
            i: T.let = v // 2
            at: T.let = self.at[v % self.kept_rows]
            seen: T.let = self.low[p, i] <= at and at < self.high[p, i]
            x: T.let = self.part[v] * self.scale[v % self.kept_rows]
            if seen or at < self.limit[p, i]:
                OUT[self.to[p, i] + T.Cast("int64", at)] = T.Select(seen, x, -T.infinity("float32"))
