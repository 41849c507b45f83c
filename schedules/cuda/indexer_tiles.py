"""The scores of a tile of keys for some heads: with tensor cores, and in f32.

Both classes have the same interface. Each warp takes 16 * `key_tiles` keys of a block's tile: ``take_keys`` readies
them, ``score`` leaves the scores of 8 * `head_tiles` heads in ``c[i, n, e]``. With g = lane / 4 and t = lane % 4 that
is key ``16 i + 8 (e / 2) + g`` of the warp and head ``8 n + 2 t + e % 2``, as ``mma.m16n8`` has it: a lane has a few
keys and every fourth pair of heads, so the sum over the heads ends in two shuffles.
"""

from __future__ import annotations

from tvm.script import tirx as T

from .device import WARP, SharedPool, call, shared
from .indexer_decisions import planes, product, row_stride


@T.meta_class
class Rows:
    """Rows in shared memory, so laid out that the same 16 bytes of 8 rows lie in different banks.

    Where rows fill whole lines of 128 bytes, the low bits of the row are added to the chunk's number, else rows are
    padded.

    Parameters
    ----------
    pool : Buffer
    places : SharedPool
    rows : int or expression
    row_bytes : int
    """

    def __init__(self, pool, places: SharedPool, rows, row_bytes: int) -> None:
        stride = row_stride(row_bytes)
        self.mask = 7 if stride == row_bytes else 0
        self.bytes = shared(pool, places.place((rows, stride), "uint8", 128))

    def chunk(self, row, chunk, phase):
        """The address of 16 bytes of a row; `phase` is ``row % 8``."""
        return T.address_of(self.bytes[row, (chunk ^ (phase & self.mask)) * 16])


@T.meta_class
class MmaScores:
    """Products m16n8k16 with f32 sums. The keys are kept in registers, for all heads of all queries.

    Keys of e4m3 are widened on their way there. Of 16 neighbours, thread t then has 4 t to 4 t + 3 where the
    instruction wants 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; the queries lie in shared memory in that order, too.

    Parameters
    ----------
    c : Decisions
    variant : dict
    d_idx : int
    keys, queries : Rows
    tx : expression
        The thread.
    """

    HELD = True

    def __init__(self, c, variant: dict[str, str], d_idx: int, keys: Rows, queries: Rows, tx) -> None:
        short = {"bfloat16": "bf16", "float16": "f16"}[product(variant)]
        self.mma = f"mma_{short}"
        self.narrow = variant["K"] == "float8_e4m3fn"
        self.widen = f"e4m3x2_to_{short}x2"
        self.keys, self.queries = keys, queries
        self.lane, self.warp = tx % WARP, tx // WARP
        self.key_tiles, self.head_tiles, self.planes = c.key_tiles, c.head_tiles, planes(variant)
        self.steps = d_idx // 16
        self.a = T.alloc_local((c.key_tiles, self.steps, 4), "uint32")
        self.raw = T.alloc_local((4,), "uint32")
        self.b = T.alloc_local((4,), "uint32")
        self.c = T.alloc_local((c.key_tiles, c.head_tiles, 4), "float32")

    @T.inline
    def take_keys(self, first):
        """The keys are the rows from `first` on."""
        for i in T.unroll(self.key_tiles):
            row: T.let = first + (self.warp * self.key_tiles + i) * 16 + self.lane % 16
            if self.narrow:
                for s in T.unroll(self.steps // 2):
                    at: T.let = self.keys.chunk(row, s * 2 + self.lane // 16, self.lane % 8)
                    T.evaluate(call("ldmatrix_x4", T.address_of(self.raw[0]), at, dtype="void"))
                    for r in T.unroll(4):
                        low: T.let = call(self.widen, self.raw[r], dtype="uint32")
                        high: T.let = call(self.widen, self.raw[r] >> T.uint32(16), dtype="uint32")
                        self.a[i, s * 2 + r // 2, r % 2] = low
                        self.a[i, s * 2 + r // 2, r % 2 + 2] = high
            else:
                for s in T.unroll(self.steps):
                    at: T.let = self.keys.chunk(row, s * 2 + self.lane // 16, self.lane % 8)
                    T.evaluate(call("ldmatrix_x4", T.address_of(self.a[i, s, 0]), at, dtype="void"))

    @T.inline
    def score(self, first, distance):
        """The heads are the rows from `first` on, a multiple of 8; planes are `distance` rows apart."""
        for i in T.unroll(self.key_tiles):
            for n in T.unroll(self.head_tiles):
                for e in T.unroll(4):
                    self.c[i, n, e] = T.float32(0)
        for p in T.unroll(self.planes):
            for s in T.unroll(self.steps):
                for n in T.unroll(self.head_tiles // 2):
                    row: T.let = first + p * distance + (n * 2 + self.lane // 16) * 8 + self.lane % 8
                    at: T.let = self.queries.chunk(row, s * 2 + self.lane // 8 % 2, self.lane % 8)
                    T.evaluate(call("ldmatrix_x4", T.address_of(self.b[0]), at, dtype="void"))
                    for half in T.unroll(2):
                        for i in T.unroll(self.key_tiles):
                            to: T.let = T.address_of(self.c[i, n * 2 + half, 0])
                            key: T.let = T.address_of(self.a[i, s, 0])
                            T.evaluate(call(self.mma, to, key, T.address_of(self.b[half * 2]), dtype="void"))


@T.meta_class
class FmaScores:
    """f32 without tensor cores: the parts that these would need of both factors make NaN of an infinity."""

    HELD = False

    def __init__(self, c, variant: dict[str, str], d_idx: int, keys: Rows, queries: Rows, tx) -> None:
        self.keys, self.queries = keys, queries
        self.lane, self.warp = tx % WARP, tx // WARP
        self.key_tiles, self.head_tiles = c.key_tiles, c.head_tiles
        self.chunks = d_idx // 4
        self.first = T.local_scalar("int32")
        self.a = T.alloc_local((c.key_tiles * 2, 4), "float32")
        self.b = T.alloc_local((4,), "float32")
        self.c = T.alloc_local((c.key_tiles, c.head_tiles, 4), "float32")

    @T.inline
    def take_keys(self, first):
        self.first = first + self.warp * self.key_tiles * 16

    @T.inline
    def score(self, first, distance):
        for i in T.unroll(self.key_tiles):
            for n in T.unroll(self.head_tiles):
                for e in T.unroll(4):
                    self.c[i, n, e] = T.float32(0)
        for s in T.serial(self.chunks // 2):
            for u in T.unroll(2):
                for i in T.unroll(self.key_tiles * 2):
                    at: T.let = self.keys.chunk(self.first + i * 8 + self.lane // 4, s * 2 + u, self.lane // 4)
                    T.evaluate(call("get_128", T.address_of(self.a[i, 0]), at, dtype="void"))
                for n in T.unroll(self.head_tiles):
                    for j in T.unroll(2):
                        head: T.let = self.lane % 4 * 2 + j
                        at: T.let = self.queries.chunk(first + n * 8 + head, s * 2 + u, head)
                        T.evaluate(call("get_128", T.address_of(self.b[0]), at, dtype="void"))
                        for d in T.unroll(4):
                            for i in T.unroll(self.key_tiles * 2):
                                self.c[i // 2, n, i % 2 * 2 + j] = (
                                    self.c[i // 2, n, i % 2 * 2 + j] + self.a[i, d] * self.b[d]
                                )


@T.meta_class
class HeadSum:
    """The sum of ``weight * relu(score)`` over the heads, for this lane's keys and heads and then for all heads.

    Parameters
    ----------
    c : Decisions
    weights : Buffer [queries, rows], float32
        In shared memory, 0 behind the last head.
    h_idx : expression
    guarded : bool
        Whether keys can be infinite. Then the products of the rows behind the last head, which are 0, are NaN.
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
        """Adds the heads from `first` on, whose scores are `scores`."""
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
                score: T.let = scores[r // 2, n // 2, r % 2 * 2 + n % 2]
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
