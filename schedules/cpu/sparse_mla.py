"""The CPU sparse attention: online softmax over blocks of gathered keys.

A task takes one query and a range of its heads. Valid keys are gathered a block at a time, once for all heads of the
task; invalid indices are dropped there and cost nothing. Scores are a register tile of keys x heads (keys broadcast,
heads vectorized), the output a register tile of heads x values (weights broadcast, values vectorized). `mla_products`
says in which type they are multiplied. Running maximum and sum are kept per head, vectorized over the heads (Milakov
and Gimelshein, 2018).

No sum is one chain of thousands of additions, because the errors of equal addends, as repetitive text gives them, would
add up. Each block of keys is summed from zero and added to the sum of earlier blocks, and so are the parts of a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from ...spec import DIMS, ELEMENT_BYTES
from ..storage import STORAGE
from .elements import CHAIN, STEP, VECTOR, is_nan
from .exponential import exp_nonpositive
from .mla_products import products_of
from .mla_rows import prefetch_rows, rows_of
from .products import AMX, BF16X2X2, BF16X16

#: The sums of 4096 keys are chains of 4096 / block_keys additions of sums of block_keys: both have to be short.
_LEAST_KEYS = 32


@dataclass(frozen=True)
class Decisions:
    """The decisions of a search.

    Parameters
    ----------
    block_keys : int
        Keys gathered at a time; a multiple of `tile_keys`, and at least 32, so that 4096 keys are at most 128 blocks.
    tile_keys, heads : int
        Register tile of the scores.
    tile_heads, values : int
        Register tile of the output; `tile_heads` divides `heads`, `values` divides 64, of which d_v is a multiple.
    unroll_d : int
        Steps of the product over d_qk in one loop body; divides 32 over the entries that a step takes. Products of
        matrices also need it even.
    task_heads : int
        Heads a task takes; a multiple of `heads`.

    Raises
    ------
    ValueError
        A decision does not divide what it has to divide, or `block_keys` is below 32.
    """

    block_keys: int
    tile_keys: int
    heads: int
    tile_heads: int
    values: int
    unroll_d: int
    task_heads: int

    def __post_init__(self) -> None:
        tiles = self.heads % self.tile_heads or self.block_keys % self.tile_keys or self.task_heads % self.heads
        if tiles or DIMS["d_v"].multiple % self.values or STEP % self.unroll_d:
            raise ValueError(f"sparse_mla: decisions that do not divide: {self}")
        if self.block_keys < _LEAST_KEYS:
            raise ValueError(f"sparse_mla: block_keys: expected at least {_LEAST_KEYS}, got {self.block_keys}")


DEFAULT = {
    "x86-64-v2": Decisions(block_keys=48, tile_keys=4, heads=8, tile_heads=4, values=8, unroll_d=4, task_heads=64),
    "x86-64-v3": Decisions(block_keys=48, tile_keys=6, heads=16, tile_heads=4, values=16, unroll_d=8, task_heads=128),
    "x86-64-v4": Decisions(block_keys=48, tile_keys=12, heads=32, tile_heads=4, values=64, unroll_d=4, task_heads=128),
    # Measured for itself. Tiles of 16 heads are 5 % slower for 128 heads, and 5 % faster for 16.
    "x86-64-v4-bf16": Decisions(
        block_keys=96, tile_keys=8, heads=32, tile_heads=8, values=32, unroll_d=8, task_heads=128
    ),
    # Not measured: two tiles by two, which need as many loads as products.
    "x86-64-v4-amx": Decisions(
        block_keys=96, tile_keys=32, heads=32, tile_heads=32, values=32, unroll_d=1, task_heads=128
    ),
    "aarch64": Decisions(block_keys=48, tile_keys=6, heads=16, tile_heads=4, values=16, unroll_d=4, task_heads=64),
    "aarch64-bf16": Decisions(block_keys=48, tile_keys=4, heads=16, tile_heads=8, values=8, unroll_d=2, task_heads=64),
}


def takes(variant: Mapping[str, str], dots: str) -> bool:
    """Whether these element types have a kernel with the dot products of this name. Packed rows stand for bf16."""
    return dots in (AMX, BF16X16, BF16X2X2) and variant["T"] == "bfloat16"


def check_dots(c: Decisions, dots: str | None) -> None:
    """Raise ValueError for decisions that a kernel with these dot products cannot have; None stands for float32."""
    products_of(dots).check(c)


#: What AMX takes instead of register tiles.
_TILES = {
    "block_keys": (64, 96, 128, 192),
    "tile_keys": (32, 64, 96),
    "heads": (16, 32),
    "tile_heads": (16, 32),
    "values": (16, 32),
}


def choices(target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision that are worth trying on `target`."""
    floats = VECTOR[target]
    return {
        "block_keys": (36, 48, 56, 64, 96, 128),
        "tile_keys": (2, 3, 4, 6, 8, 12, 14) if floats == 16 else (2, 3, 4, 6, 8),
        "heads": tuple(n for n in (8, 16, 32, 64) if floats <= n <= 4 * floats),
        "tile_heads": (2, 4, 8, 16),
        "values": tuple(n for n in (8, 16, 32, 64) if floats <= n <= 4 * floats),
        "unroll_d": (1, 2, 4, 8, 16),
        "task_heads": (16, 32, 64, 128),
    } | (_TILES if target == "x86-64-v4-amx" else {})


@T.meta_class
class _Scores:
    """The scores of tiles of keys."""

    def __init__(self, products, score, sm_scale) -> None:
        self.products, self.score, self.sm_scale = products, score, sm_scale

    @T.inline
    def run(self, acc, hb, t):
        """Those of tile t, for as many heads as `acc` has, from the first one of block hb on."""
        for part in T.serial((self.products.d_qk + CHAIN - 1) // CHAIN):
            self.products.start(acc)
            self.products.add_scores(acc, hb, t * acc.shape[0], part)
            if part == 0:
                for j in T.unroll(acc.shape[0]):
                    for h in T.vectorized(acc.shape[1]):
                        self.score[t * acc.shape[0] + j, h] = self.products.score(acc[j, h], self.sm_scale)
            else:
                for j in T.unroll(acc.shape[0]):
                    for h in T.vectorized(acc.shape[1]):
                        self.score[t * acc.shape[0] + j, h] = self.score[t * acc.shape[0] + j, h] + self.products.score(
                            acc[j, h], self.sm_scale
                        )


@T.meta_class
class _Softmax:
    """The weights of a block of keys from their scores, and what earlier blocks count for beside them."""

    def __init__(self, products, score, running, passing) -> None:
        self.products, self.score = products, score
        self.top, self.total = running
        self.shift, self.fade, self.mass = passing

    @T.inline
    def run(self, hb, keys, heads):
        """Those of the first `heads` heads of block hb."""
        for h in T.vectorized(heads):
            self.fade[h] = self.top[hb, h]
        for j in T.serial(keys):
            for h in T.vectorized(heads):
                # Once the maximum is NaN it stays NaN.
                self.top[hb, h] = T.Select(
                    self.top[hb, h] >= self.score[j, h],
                    self.top[hb, h],
                    T.Select(is_nan(self.top[hb, h]), self.top[hb, h], self.score[j, h]),
                )
        # While every score is -inf, subtract 0: the weights are then 0, not NaN.
        for h in T.vectorized(heads):
            self.shift[h] = T.Select(self.top[hb, h] == -T.infinity("float32"), T.float32(0), self.top[hb, h])
        for h in T.vectorized(heads):
            self.fade[h] = exp_nonpositive(self.fade[h] - self.shift[h])
        for h in T.vectorized(heads):
            self.mass[h] = T.float32(0)
        for j in T.serial(keys):
            for h in T.vectorized(heads):
                self.score[j, h] = exp_nonpositive(self.score[j, h] - self.shift[h])
            for h in T.vectorized(heads):
                self.mass[h] = self.mass[h] + self.score[j, h]
        for h in T.vectorized(heads):
            self.total[hb, h] = self.total[hb, h] * self.fade[h] + self.mass[h]
        self.products.put_weights(self.score, keys, heads)


def tensor_ir(variant: Mapping[str, str], c: Decisions, dots: str | None = None) -> tirx.PrimFunc:
    """The kernel for query m and the heads [h0, h1).

    Parameters
    ----------
    variant : dict
        Element type T of q, kv and out. With K of float8_e4m3fn, kv has packed rows, which stand for bf16 (`mla_rows`).
    c : Decisions
    dots : str, optional
        The dot products to multiply with, which `takes` has to allow.

    Returns
    -------
    PrimFunc
        ``(q, kv, indices, attn_sink, topk_length, out, max_logits, lse, m, h0, h1, index_row, sm_scale, has_sink,
        has_length)``; `index_row` is the row of query m in indices and max_logits, and attn_sink and topk_length are
        read only when their flags are 1.
    """
    dtype = variant["T"]
    Rows = rows_of(variant)
    STORED, ALIGNED = Rows.stored(dtype)
    BK, TK, HV, PH, PV = c.block_keys, c.tile_keys, c.heads, c.tile_heads, c.values
    Products = products_of(dots)
    Products.check(c)
    # The last heads of a model may take half a tile, and the other half of it is not computed. A tile of few keys takes
    # twice as many then: 12 sums hide the latency of an addition.
    NARROW = HV // 2 if HV % (2 * Products.lanes) == 0 else HV
    LONG = 2 * TK if NARROW < HV and TK < 12 and BK % (2 * TK) == 0 else TK
    # Rows that are prefetched with a tile of scores. The others come with the output, which takes longer.
    EARLY = (TK + 2) // 3
    s_q, s_kv, h_q, d_qk, d_v, s_rows, topk, s_sink, s_length, d_packed = (
        tirx.Var(n, "int64")
        for n in ("s_q", "s_kv", "h_q", "d_qk", "d_v", "s_rows", "topk", "s_sink", "s_length", "d_packed")
    )

    @T.prim_func(s_tir=True)
    def sparse_mla(
        q: T.handle,
        kv: T.handle,
        indices: T.handle,
        attn_sink: T.handle,
        topk_length: T.handle,
        out: T.handle,
        max_logits: T.handle,
        lse: T.handle,
        m: T.int64,
        h0: T.int64,
        h1: T.int64,
        index_row: T.int64,
        sm_scale: T.float32,
        has_sink: T.int64,
        has_length: T.int64,
    ):
        T.func_attr({"tirx.noalias": True})
        Q = T.match_buffer(q, (s_q, h_q, d_qk), STORAGE[dtype], align=ELEMENT_BYTES[dtype])
        KV = T.match_buffer(kv, (s_kv, Rows.width(d_qk, d_packed)), STORED, align=ALIGNED)
        INDEX = T.match_buffer(indices, (s_rows, topk), "int32", align=4)
        SINK = T.match_buffer(attn_sink, (s_sink,), "float32", align=4)
        LENGTH = T.match_buffer(topk_length, (s_length,), "int32", align=4)
        OUT = T.match_buffer(out, (s_q, h_q, d_v), STORAGE[dtype], align=ELEMENT_BYTES[dtype])
        MAX = T.match_buffer(max_logits, (s_rows, h_q), "float32", align=4)
        LSE = T.match_buffer(lse, (s_q, h_q), "float32", align=4)
        with T.sblock("task"):
            T.reads()
            T.writes()
            score = T.sblock_alloc_buffer((BK, HV), "float32")
            sums = T.sblock_alloc_buffer(((h1 - h0 + HV - 1) // HV * HV, d_v), "float32")
            top = T.sblock_alloc_buffer(((h1 - h0 + HV - 1) // HV, HV), "float32")
            total = T.sblock_alloc_buffer(((h1 - h0 + HV - 1) // HV, HV), "float32")
            shift = T.sblock_alloc_buffer((HV,), "float32")
            fade = T.sblock_alloc_buffer((HV,), "float32")
            mass = T.sblock_alloc_buffer((HV,), "float32")
            acc = T.sblock_alloc_buffer((TK, HV), "float32", scope="local")
            few = T.sblock_alloc_buffer((LONG, NARROW), "float32", scope="local")
            tile = T.sblock_alloc_buffer((PH, PV), "float32", scope="local")
            at = T.sblock_alloc_buffer((1,), "int64", scope="local")
            length = T.sblock_alloc_buffer((1,), "int64", scope="local")
            got = T.sblock_alloc_buffer((1,), "int64", scope="local")
            seen = T.sblock_alloc_buffer((1,), "int64", scope="local")
            rows = Rows(KV, dtype, d_qk, d_v, dots is not None)
            products = Products(c, dtype, (h0, h1), (d_qk, d_v))
            scores = _Scores(products, score, sm_scale)
            softmax = _Softmax(products, score, (top, total), (shift, fade, mass))
            length[0] = topk
            if has_length == T.int64(1):
                length[0] = T.min(T.max(T.Cast("int64", LENGTH[m]), T.int64(0)), topk)
            prefetch_rows(rows, INDEX, index_row, T.int64(0), BK, length[0])
            products.put_queries(Q, m, sm_scale)
            for hb in T.serial((h1 - h0 + HV - 1) // HV):
                for h in T.vectorized(HV):
                    top[hb, h] = -T.infinity("float32")
                for h in T.vectorized(HV):
                    total[hb, h] = T.float32(0)
            for h, d in T.grid((h1 - h0 + HV - 1) // HV * HV, d_v // STEP):
                for l in T.vectorized(STEP):
                    sums[h, d * STEP + l] = T.float32(0)
            products.begin()
            at[0] = T.int64(0)
            seen[0] = T.int64(0)
            while at[0] < length[0]:
                got[0] = T.int64(0)
                while at[0] < length[0] and got[0] < T.int64(BK):
                    row: T.let = T.Cast("int64", INDEX[index_row, at[0]])
                    if T.int64(0) <= row and row < s_kv:
                        rows.put(row, products.keys, got[0])
                        got[0] = got[0] + T.int64(1)
                    at[0] = at[0] + T.int64(1)
                seen[0] = seen[0] + got[0]
                keys: T.let = got[0]
                # The rows of the next block come while this one is computed, some with each tile, because the CPU has
                # room for a few dozen lines that are on their way.
                late: T.let = (BK - BK // TK * EARLY + d_v // PV - 1) // (d_v // PV)
                for j in T.serial((keys + LONG - 1) // LONG * LONG - keys):
                    products.put_nothing(keys + j)
                products.put_values(keys)
                for hb in T.serial((h1 - h0 + HV - 1) // HV):
                    for t in T.serial((keys + TK - 1) // TK):
                        if hb == 0:
                            prefetch_rows(rows, INDEX, index_row, at[0] + t * EARLY, EARLY, length[0])
                        if NARROW == HV or h0 + hb * HV + NARROW < h1:
                            scores.run(acc, hb, t)
                        elif t % (LONG // TK) == 0:
                            scores.run(few, hb, t // (LONG // TK))
                    if NARROW == HV or h0 + hb * HV + NARROW < h1:
                        softmax.run(hb, keys, HV)
                    else:
                        softmax.run(hb, keys, NARROW)
                    for dv in T.serial(d_v // PV):
                        if hb == 0:
                            prefetch_rows(rows, INDEX, index_row, at[0] + BK // TK * EARLY + dv * late, late, length[0])
                        for g in T.serial(HV // PH):
                            if h0 + hb * HV + g * PH < h1:
                                products.start(tile)
                                products.add_values(tile, score, keys, g * PH, dv * PV)
                                for r in T.unroll(PH):
                                    for l in T.vectorized(PV):
                                        sums[hb * HV + g * PH + r, dv * PV + l] = (
                                            sums[hb * HV + g * PH + r, dv * PV + l] * fade[g * PH + r] + tile[r, l]
                                        )
            products.end()
            for h in T.serial(h1 - h0):
                best: T.let = top[h // HV, h % HV]
                weight: T.let = total[h // HV, h % HV]
                if seen[0] > T.int64(0):
                    shift[0] = weight
                    if has_sink == T.int64(1):
                        shift[0] = weight + T.exp(
                            SINK[h0 + h] - T.Select(best == -T.infinity("float32"), T.float32(0), best)
                        )
                    products.store(OUT, m, h0 + h, sums, h, shift[0])
                    LSE[m, h0 + h] = best + T.log(weight)
                else:
                    for d in T.serial(d_v // STEP):
                        for l in T.vectorized(STEP):
                            OUT[m, h0 + h, d * STEP + l] = T.Cast(STORAGE[dtype], 0)
                    LSE[m, h0 + h] = T.infinity("float32")
                MAX[index_row, h0 + h] = best

    return Products.completed(sparse_mla)
