"""The two products of the attention by a warpgroup, over swizzled tiles in shared memory.

For a pair of tiles of keys, warpgroup w computes the scores of tile w, and it holds half w of the values of the output.
The first half of a slot has the values that its own warpgroup adds up, with weights in registers. The other warpgroup
adds up the values of the second half, with weights from shared memory.
"""

from __future__ import annotations

from tvm.script import tirx as T

from ...emit import WARP, SharedPool, call, shared
from .decisions import ATOM, D_V, HEADS, KEYS, WARPGROUP, tiles

#: Bytes of a tile of [64, ATOM] and of its rows that repeat the swizzle.
TILE = 2 * KEYS * ATOM
ROWS = 1024

#: Elements of the sums of a product, and of one operand in registers, that a thread has.
SCORES = KEYS // 2
SUMS = D_V // 4
WEIGHTS = KEYS // 4


def half_atoms(d_qk: int, half: int) -> int:
    """How many columns of tiles a half has. The other warpgroup's has what is key only."""
    return D_V // ATOM // 2 + (half * (d_qk - D_V)) // ATOM


def half_atom(slot, half, i):
    """The i-th column of tiles of half 0, slot's own, or 1 of that slot."""
    first = (half + slot) % 2 * (D_V // ATOM // 2)
    # Behind the first half of slot 1 comes the second, and then what is key only.
    return first + i + i // 4 * 4 * slot


@T.meta_class
class Products:
    """What a thread of a multiplying warpgroup has of scores, weights and output.

    Of ``scores`` and ``sums`` element ``4 n + e`` is head ``row + e // 2 * 8``, column ``8 n + column + e % 2``.

    Parameters
    ----------
    pool : Buffer
    places : SharedPool
    tx : expression
        The thread.
    d_qk : int
    dtype : str
        ``bfloat16`` or ``float16``.
    """

    def __init__(self, pool, places: SharedPool, tx, d_qk: int, dtype: str) -> None:
        short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
        self.pack, self.rest = f"pack_{short}", f"rest_{short}"
        self.score_product, self.value_product = f"wgmma_{short}<{KEYS}, 0>", f"wgmma_{short}<{D_V // 2}, 1>"
        self.d_qk = d_qk
        self.queries, self.keys, self.weights = (shared(pool, place) for place in tiles(places, d_qk))
        self.thread = T.alloc_local((1,), "uint32")
        thread = T.Cast("int32", self.thread[0])
        self.lane = thread % WARP
        self.row = thread % WARPGROUP // WARP * 16 + self.lane // 4
        self.column = self.lane % 4 * 2
        self.scores = T.alloc_local((SCORES,), "float32")
        self.sums = T.alloc_local((SUMS,), "float32")
        self.packed = T.alloc_local((WEIGHTS,), "uint32")

    @T.inline
    def fetch_queries(self, tx, threads, source, m, first_head, h_q):
        """Starts to copy the queries, zeros behind the last head."""
        chunks: T.let = self.d_qk // 8
        for i in T.serial(HEADS * self.d_qk // 8 // threads):
            row: T.let = (i * threads + tx) // chunks
            chunk: T.let = (i * threads + tx) % chunks
            head: T.let = T.Cast("int64", first_head + row)
            at: T.let = T.address_of(source[m, T.min(head, h_q - 1), chunk * 8])
            to: T.let = T.address_of(self.queries[chunk // 8, row, (chunk % 8 ^ row % 8) * 8])
            T.evaluate(call("cp_async_16", to, at, head < h_q, dtype="void"))

    @T.inline
    def start(self, tx):
        """Before all others."""
        self.thread[0] = T.Cast("uint32", tx)

    @T.inline
    def forget(self):
        """What follows from the thread's number is computed anew: registers are too few to hold it over a loop."""
        T.evaluate(call("wgmma_hold<1>", T.address_of(self.thread[0]), dtype="void"))

    @T.inline
    def clear(self):
        for i in T.unroll(SUMS):
            self.sums[i] = T.float32(0)

    @T.inline
    def start_scores(self, slot, half):
        """Starts to add to the scores of slot's tile what a half of it gives; half 0 comes first."""
        if half == 0:
            T.evaluate(call(f"wgmma_hold<{SCORES}>", T.address_of(self.scores[0]), dtype="void"))
        T.evaluate(call("wgmma_fence", dtype="void"))
        for i in T.unroll(half_atoms(self.d_qk, half)):
            query: T.let = call(
                "descriptor<128>", T.address_of(self.queries[half_atom(slot, half, i), 0, 0]), 16, ROWS, dtype="uint64"
            )
            key: T.let = call(
                "descriptor<128>",
                T.address_of(self.keys[slot, half_atom(slot, half, i), 0, 0]),
                16,
                ROWS,
                dtype="uint64",
            )
            for k in T.unroll(ATOM // 16):
                more: T.let = T.Cast("int32", half + i + k > 0)
                step: T.let = T.Cast("uint64", k * 2)
                to: T.let = T.address_of(self.scores[0])
                T.evaluate(call(self.score_product, to, query + step, key + step, more, dtype="void"))
        T.evaluate(call("wgmma_commit", dtype="void"))

    @T.inline
    def pack_weights(self):
        for i in T.unroll(WEIGHTS):
            self.packed[i] = self.weight_pair(i)

    @T.inline
    def pack_rests(self):
        """What packing cuts off of the weights, packed."""
        for i in T.unroll(WEIGHTS):
            self.packed[i] = self.rests(i)

    def weight_pair(self, i):
        """Two neighbouring weights, rounded."""
        return call(self.pack, self.scores[i * 2], self.scores[i * 2 + 1], dtype="uint32")

    def rests(self, i):
        """What rounding cuts off of them."""
        return call(self.rest, self.scores[i * 2], self.scores[i * 2 + 1], self.weight_pair(i), dtype="uint32")

    @T.inline
    def put(self, slot, pair):
        """Gives the words ``pair(i)``, of weights of slot's tile, to the other warpgroup."""
        for n in T.unroll(KEYS // 8):
            for r in T.unroll(2):
                # One register leads to all of them.
                at: T.let = (self.row * ATOM + self.row % 8 * 8 + self.column) * 2 ^ (n * 16)
                rows: T.let = T.address_of(self.weights[slot, 0, r * 8, 0])
                T.evaluate(call("put_32_behind", rows, at, pair(n * 2 + r), dtype="void"))
        T.evaluate(call("fence_async", dtype="void"))

    @T.inline
    def start_own(self, slot):
        """Starts to add slot's values with the weights in registers, which are to stay until they are added."""
        T.evaluate(call(f"wgmma_hold<{SUMS}>", T.address_of(self.sums[0]), dtype="void"))
        T.evaluate(call(f"wgmma_hold<{WEIGHTS}>", T.address_of(self.packed[0]), dtype="void"))
        T.evaluate(call("wgmma_fence", dtype="void"))
        value_at: T.let = T.address_of(self.keys[slot, half_atom(slot, 0, 0), 0, 0])
        value: T.let = call("descriptor<128>", value_at, TILE, ROWS, dtype="uint64")
        for k in T.unroll(KEYS // 16):
            to: T.let = T.address_of(self.sums[0])
            step: T.let = T.Cast("uint64", k * (2 * ROWS // 16))
            T.evaluate(call(self.value_product, to, T.address_of(self.packed[k * 4]), value + step, 1, dtype="void"))
        T.evaluate(call("wgmma_commit", dtype="void"))

    @T.inline
    def start_other(self, slot, again):
        """Starts to add the values of the other warpgroup's slot, with the weights that it has put.

        `again` says that the sums are being added to already.
        """
        if not again:
            T.evaluate(call(f"wgmma_hold<{SUMS}>", T.address_of(self.sums[0]), dtype="void"))
        T.evaluate(call("wgmma_fence", dtype="void"))
        value_at: T.let = T.address_of(self.keys[slot, half_atom(slot, 1, 0), 0, 0])
        value: T.let = call("descriptor<128>", value_at, TILE, ROWS, dtype="uint64")
        weight: T.let = call("descriptor<128>", T.address_of(self.weights[slot, 0, 0, 0]), 16, ROWS, dtype="uint64")
        for k in T.unroll(KEYS // 16):
            to: T.let = T.address_of(self.sums[0])
            step: T.let = T.Cast("uint64", k * (2 * ROWS // 16))
            T.evaluate(call(self.value_product, to, weight + T.Cast("uint64", k * 2), value + step, 1, dtype="void"))
        T.evaluate(call("wgmma_commit", dtype="void"))

    @T.inline
    def wait_scores(self):
        T.evaluate(call("wgmma_wait<0>", dtype="void"))
        T.evaluate(call(f"wgmma_hold<{SCORES}>", T.address_of(self.scores[0]), dtype="void"))

    @T.inline
    def wait_sums(self):
        T.evaluate(call("wgmma_wait<0>", dtype="void"))
        T.evaluate(call(f"wgmma_hold<{SUMS}>", T.address_of(self.sums[0]), dtype="void"))
