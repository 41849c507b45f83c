"""The CPU indexer: a matrix product in register tiles of keys x heads, which are reduced over the heads in registers.

The queries of a task are packed to [head block, d, head], so that one vector load brings `heads` heads. The keys are
widened to f32 a block at a time, and broadcast. A tile of `tile_keys` x `heads` accumulators then runs at the rate of a
GEMM micro-kernel. relu and the weighted sum over the heads happen in registers, and one number per key is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from ...spec import ELEMENT_BYTES
from ..storage import STORAGE
from .elements import STEP, VECTOR
from .products import EXACT, FloatProducts, products_of


@dataclass(frozen=True)
class Decisions:
    """The decisions of a search.

    Parameters
    ----------
    tile_keys, heads : int
        Register tile: keys by heads (accumulators). For products of matrices both are even.
    block_keys : int
        Keys that are widened at a time, a multiple of `tile_keys`. The block should stay in the second-level cache.
    in_place : int
        1: keys of the type that is multiplied (float32; bfloat16 for bf16 dot products) are read where they are. This
        saves a copy that does not pay for few queries. 0: all keys are copied.
    unroll_d : int
        Steps of the product over d_idx in one loop body. It divides 32 over the entries that a step takes.
    rows : int
        Queries of a task. Each block of keys is widened once for all of them.
    task_keys : int
        The most keys of a task.
    min_keys : int
        The fewest keys of a task, for any number of threads, because each task packs its queries again.
    tasks_per_thread : int
        How many tasks a call is cut into for each thread, so that tasks of different lengths balance out.

    Raises
    ------
    ValueError
        A decision does not divide what it has to divide.
    """

    tile_keys: int
    heads: int
    block_keys: int
    in_place: int
    unroll_d: int
    rows: int
    task_keys: int
    min_keys: int
    tasks_per_thread: int

    def __post_init__(self) -> None:
        if self.in_place not in (0, 1):
            raise ValueError(f"lightning_indexer: in_place: expected 0 or 1, got {self.in_place}")
        if self.heads % FloatProducts.lanes or self.block_keys % self.tile_keys or STEP % self.unroll_d:
            raise ValueError(f"lightning_indexer: decisions that do not divide: {self}")


_COMMON = {"rows": 8, "task_keys": 6144, "min_keys": 256, "tasks_per_thread": 4}
DEFAULT = {
    "x86-64-v2": Decisions(tile_keys=4, heads=8, block_keys=48, in_place=0, unroll_d=4, **_COMMON),
    "x86-64-v3": Decisions(tile_keys=6, heads=16, block_keys=48, in_place=0, unroll_d=8, **_COMMON),
    "x86-64-v3-vnni": Decisions(tile_keys=6, heads=16, block_keys=48, in_place=0, unroll_d=4, **_COMMON),
    "x86-64-v4": Decisions(tile_keys=12, heads=32, block_keys=24, in_place=0, unroll_d=4, **_COMMON),
    # Measured for themselves. Tiles of 8 x 32 stay in registers (`dsa_tvm.build.registers`) and are 5 to 10 % faster
    # than those of 12 x 32. bf16 keys are read in place.
    "x86-64-v4-vnni": Decisions(tile_keys=8, heads=32, block_keys=48, in_place=0, unroll_d=8, **_COMMON),
    "x86-64-v4-bf16": Decisions(tile_keys=8, heads=32, block_keys=48, in_place=1, unroll_d=4, **_COMMON),
    # Not measured: two tiles by two, which need as many loads as products, and blocks that are read in place.
    "x86-64-v4-amx": Decisions(tile_keys=32, heads=32, block_keys=32, in_place=1, unroll_d=1, **_COMMON),
    "aarch64": Decisions(tile_keys=6, heads=16, block_keys=48, in_place=0, unroll_d=4, **_COMMON),
    "aarch64-dotprod": Decisions(tile_keys=6, heads=16, block_keys=48, in_place=0, unroll_d=4, **_COMMON),
    # 24 of the 32 registers hold sums, 3 keys, and the queries come one at a time. With more steps, some are spilled.
    "aarch64-i8mm": Decisions(tile_keys=6, heads=16, block_keys=48, in_place=0, unroll_d=1, **_COMMON),
    "aarch64-bf16": Decisions(tile_keys=6, heads=16, block_keys=48, in_place=0, unroll_d=1, **_COMMON),
}


def takes(variant: Mapping[str, str], dots: str) -> bool:
    """Whether these element types have a kernel with the dot products of this name (`products.EXACT`)."""
    return variant["T"] in EXACT[dots] and variant["K"] in EXACT[dots]


def check_dots(c: Decisions, dots: str | None) -> None:
    """Raise ValueError for decisions that a kernel with these dot products cannot have; None stands for float32."""
    Products = products_of(dots)
    if c.heads % Products.lanes or STEP // Products.entries % c.unroll_d or not Products.check(c):
        raise ValueError(f"lightning_indexer: decisions that do not divide for {dots} dot products: {c}")


#: What AMX takes instead of register tiles.
_TILES = {"tile_keys": (16, 32, 48, 64, 96), "heads": (16, 32, 48), "block_keys": (32, 64, 96, 192, 384)}


def choices(target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision that are worth trying on `target`."""
    floats = VECTOR[target]
    return {
        # There are 16 vector registers, or 32 with AVX-512 and NEON. The tile has to leave room for operands.
        "tile_keys": (2, 3, 4, 6, 8, 12, 14) if floats == 16 else (2, 3, 4, 6, 8),
        "heads": tuple(n for n in (8, 16, 32, 64) if floats <= n <= 4 * floats),
        "block_keys": (12, 24, 48, 56, 84, 96, 192),
        "in_place": (0, 1),
        "unroll_d": (1, 2, 4, 8, 16),
        "rows": (1, 2, 4, 8, 16, 32),
        "task_keys": (1536, 3072, 6144, 12288, 49152),
        "min_keys": (64, 256, 1024, 4096),
        "tasks_per_thread": (1, 2, 4, 8),
    } | (_TILES if target == "x86-64-v4-amx" else {})


@T.meta_class
class _Tiles:
    """Register tiles: the scores of some keys for some heads, relu, and the sum over the heads in `lanes`.

    Head h is added to lane ``h % lanes``, in the order of the heads. So a sum does not depend on how heads are tiled.
    """

    def __init__(self, products, in_place, copied, queries, weights, long, lanes, h_idx) -> None:
        self.products, self.in_place, self.copied, self.queries = products, in_place, copied, queries
        self.weights, self.long, self.lanes, self.h_idx = weights, long, lanes, h_idx

    @T.inline
    def run(self, acc, t, start, in_place, i, hb, h0):
        """Tile t of the keys from `start` on, for as many heads as `acc` has, from h0 of head block hb on."""
        for part in T.serial(self.products.parts(self.products.d_idx)):
            if part > 0:
                for j in T.unroll(acc.shape[0]):
                    for h in T.vectorized(acc.shape[1]):
                        self.long[j, h] = T.if_then_else(part == 1, acc[j, h], self.long[j, h] + acc[j, h])
            self.products.start(acc, i, hb, h0)
            if t < in_place:
                self.products.add(acc, self.in_place, start + t * acc.shape[0], self.queries, i, hb, h0, part)
            else:
                self.products.add(acc, self.copied, t * acc.shape[0], self.queries, i, hb, h0, part)
        if self.products.parts(self.products.d_idx) > 1:
            for j in T.unroll(acc.shape[0]):
                for h in T.vectorized(acc.shape[1]):
                    acc[j, h] = acc[j, h] + self.long[j, h]
        # Leave heads past h_idx out of the sum: with an infinite key they are NaN.
        for j in T.unroll(acc.shape[0]):
            if hb == 0 and h0 == 0:
                for h in T.vectorized(self.lanes.shape[1]):
                    self.lanes[t * acc.shape[0] + j, h] = T.float32(0)
            for p in T.unroll(acc.shape[1] // self.lanes.shape[1]):
                for h in T.vectorized(self.lanes.shape[1]):
                    self.lanes[t * acc.shape[0] + j, h] = self.lanes[t * acc.shape[0] + j, h] + T.Select(
                        hb * self.weights.shape[2] + h0 + p * self.lanes.shape[1] + h < self.h_idx,
                        self.products.score(acc[j, p * self.lanes.shape[1] + h])
                        * self.weights[i, hb, h0 + p * self.lanes.shape[1] + h],
                        T.float32(0),
                    )


def tensor_ir(variant: Mapping[str, str], c: Decisions, dots: str | None = None) -> tirx.PrimFunc:
    """Make the kernel for the queries [m0, m1) and the keys [n0, n1).

    Parameters
    ----------
    variant : dict
        Element types T of q and K of k.
    c : Decisions
    dots : str, optional
        The dot products to multiply with, a key of `products.EXACT`. `takes` tells whether that is possible.

    Returns
    -------
    PrimFunc
        Its parameters are ``(q, k, weights, ks, ke, k_scale, logits, m0, m1, n0, n1, row0, scaled)``. Query m writes
        row ``m - m0 + row0`` of logits. k_scale is read only if `scaled` is 1. Keys outside [ks, ke) get -inf.
    """
    q_type, k_type = variant["T"], variant["K"]
    TK, HV, BK, UD = c.tile_keys, c.heads, c.block_keys, c.unroll_d
    s_q, s_kv, h_idx, d_idx, s_out, s_scale = (
        tirx.Var(n, "int64") for n in ("s_q", "s_kv", "h_idx", "d_idx", "s_out", "s_scale")
    )
    blocks = (h_idx + HV - 1) // HV
    Products = products_of(dots, q_type)
    LANES = Products.lanes
    # A model may have fewer heads than a tile. They take a tile of half the width, and smaller ones of a vector.
    NARROW = 16 if HV > 16 and HV % 16 == 0 else LANES
    HALF = HV // 2 if HV % (2 * NARROW) == 0 and HV > 2 * NARROW else NARROW
    IN_PLACE = c.in_place == 1 and Products.reads_in_place(k_type)
    check_dots(c, dots)

    @T.prim_func(s_tir=True)
    def lightning_indexer(
        q: T.handle,
        k: T.handle,
        weights: T.handle,
        ks: T.handle,
        ke: T.handle,
        k_scale: T.handle,
        logits: T.handle,
        m0: T.int64,
        m1: T.int64,
        n0: T.int64,
        n1: T.int64,
        row0: T.int64,
        scaled: T.int64,
    ):
        T.func_attr({"tirx.noalias": True})
        Q = T.match_buffer(q, (s_q, h_idx, d_idx), STORAGE[q_type], align=ELEMENT_BYTES[q_type])
        K = T.match_buffer(k, (s_kv, d_idx), STORAGE[k_type], align=ELEMENT_BYTES[k_type])
        W = T.match_buffer(weights, (s_q, h_idx), "float32", align=4)
        KS = T.match_buffer(ks, (s_q,), "int32", align=4)
        KE = T.match_buffer(ke, (s_q,), "int32", align=4)
        SCALE = T.match_buffer(k_scale, (s_scale,), "float32", align=4)
        OUT = T.match_buffer(logits, (s_out, s_kv), "float32", align=4)
        with T.sblock("task"):
            T.reads()
            T.writes()
            qp = T.sblock_alloc_buffer(Products.query_shape(m1 - m0, blocks, d_idx, HV), Products.packed)
            wp = T.sblock_alloc_buffer((m1 - m0, blocks, HV), "float32")
            kp = T.sblock_alloc_buffer(Products.key_shape(BK, d_idx), Products.packed)
            lanes = T.sblock_alloc_buffer((BK, LANES), "float32")
            acc = T.sblock_alloc_buffer((TK, HV), Products.sums, scope="local")
            fewer = T.sblock_alloc_buffer((TK, HALF), Products.sums, scope="local")
            few = T.sblock_alloc_buffer((TK, NARROW), Products.sums, scope="local")
            # The sum of the earlier parts of products over many entries.
            long = T.sblock_alloc_buffer((TK, HV), Products.sums)
            span = T.sblock_alloc_buffer((2,), "int64", scope="local")
            products = Products(Q, K, (q_type, k_type), (TK, HV, UD), d_idx, (m1 - m0, blocks))
            tiles = _Tiles(products, K if IN_PLACE else kp, kp, qp, wp, long, lanes, h_idx)
            products.put_queries(qp, m0, m1 - m0, blocks, h_idx)
            for i, hb, h in T.grid(m1 - m0, blocks, HV):
                if hb * HV + h < h_idx:
                    wp[i, hb, h] = W[m0 + i, hb * HV + h]
                else:
                    wp[i, hb, h] = T.float32(0)
            # The keys that any query of the task can see. Blocks outside are filled, not computed.
            span[0] = n1
            span[1] = n0
            for i in T.serial(m1 - m0):
                if KS[m0 + i] < KE[m0 + i]:
                    span[0] = T.min(span[0], T.Cast("int64", KS[m0 + i]))
                    span[1] = T.max(span[1], T.Cast("int64", KE[m0 + i]))
            products.begin()
            for b in T.serial((n1 - n0 + BK - 1) // BK):
                start: T.let = n0 + b * BK
                stop: T.let = T.min(start + BK, n1)
                # Tiles whose keys need no copy. A last tile that reaches past the keys needs one.
                in_place: T.let = (stop - start) // TK if IN_PLACE else T.int64(0)
                if start < span[1] and span[0] < stop:
                    for j in T.serial(in_place * TK, stop - start):
                        products.put_key(start + j, kp, j)
                    # The rest of the last tile: any finite value will do, its results are not stored.
                    for j in T.serial((stop - start + TK - 1) // TK * TK - (stop - start)):
                        products.put_nothing(kp, stop - start + j)
                for i in T.serial(m1 - m0):
                    low: T.let = T.Cast("int64", KS[m0 + i])
                    high: T.let = T.Cast("int64", KE[m0 + i])
                    if start < high and low < stop and low < high:
                        for hb in T.serial(blocks):
                            for t in T.serial((stop - start + TK - 1) // TK):
                                left: T.let = T.min(h_idx - hb * HV, T.int64(HV))
                                if NARROW == HV or left > HV - NARROW:
                                    tiles.run(acc, t, start, in_place, i, hb, 0)
                                else:
                                    first: T.let = (
                                        T.Select(left > HALF - NARROW, T.int64(HALF), T.int64(0))
                                        if HALF > NARROW
                                        else T.int64(0)
                                    )
                                    if HALF > NARROW:  # known here already, unlike `first`
                                        if first > 0:
                                            tiles.run(fewer, t, start, in_place, i, hb, 0)
                                    for g in T.serial((left - first + NARROW - 1) // NARROW):
                                        tiles.run(few, t, start, in_place, i, hb, first + g * NARROW)
                        for j in T.serial(stop - start):
                            half = T.sblock_alloc_buffer((LANES,), "float32", scope="local")
                            for h in T.vectorized(LANES):
                                half[h] = lanes[j, h]
                            if LANES > 8:
                                for h in T.vectorized(8):
                                    half[h] = half[h] + half[h + 8]
                            if LANES > 4:
                                for h in T.vectorized(4):
                                    half[h] = half[h] + half[h + 4]
                            OUT[row0 + i, start + j] = T.if_then_else(
                                low <= start + j and start + j < high,
                                (half[0] + half[1]) + (half[2] + half[3]),
                                -T.infinity("float32"),
                            )
                        if scaled == T.int64(1):
                            for j in T.serial(stop - start):
                                OUT[row0 + i, start + j] = T.if_then_else(
                                    low <= start + j and start + j < high,
                                    OUT[row0 + i, start + j] * SCALE[start + j],
                                    -T.infinity("float32"),
                                )
                    else:
                        for j in T.serial(stop - start):
                            OUT[row0 + i, start + j] = -T.infinity("float32")
            products.end()

    return Products.completed(lightning_indexer)
