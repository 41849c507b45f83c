"""The CPU indexer: a matrix product over register tiles of keys x heads, reduced over the heads before it leaves them.

The queries of a task are packed to [head block, d, head] so that one vector load brings `heads` heads; the keys are
widened to f32 a block at a time and broadcast. A tile of `tile_keys` x `heads` accumulators then runs at the rate of a
GEMM micro-kernel, relu and the weighted head sum happen in registers, and one number a key is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from .elements import STEP, STORAGE, WIDTH, widen


@dataclass(frozen=True)
class Decisions:
    """What a search may choose.

    Parameters
    ----------
    tile_keys, heads : int
        Register tile: keys by heads (f32 accumulators).
    block_keys : int
        Keys widened at a time; a multiple of `tile_keys`. The block should stay in the second-level cache.
    unroll_d : int
        Steps of the product over d_idx in one loop body; divides 32.
    rows : int
        Queries a task takes: each block of keys is widened once for all of them.
    task_keys : int
        Keys a task takes.
    """

    tile_keys: int
    heads: int
    block_keys: int
    unroll_d: int
    rows: int
    task_keys: int


DEFAULT = {
    "x86-64-v2": Decisions(tile_keys=4, heads=8, block_keys=48, unroll_d=4, rows=8, task_keys=6144),
    "x86-64-v3": Decisions(tile_keys=6, heads=16, block_keys=48, unroll_d=8, rows=8, task_keys=6144),
    "x86-64-v4": Decisions(tile_keys=12, heads=32, block_keys=24, unroll_d=4, rows=8, task_keys=6144),
    "aarch64": Decisions(tile_keys=6, heads=16, block_keys=48, unroll_d=4, rows=8, task_keys=6144),
}


def relu(x):
    """max(x, 0) that lets a NaN through."""
    return T.Select(x <= T.float32(0), T.float32(0), x)


def tensor_ir(variant: dict[str, str], c: Decisions) -> tirx.PrimFunc:
    """The kernel for the queries [m0, m1) and the keys [n0, n1).

    Parameters
    ----------
    variant : dict
        Element types T of q and K of k.
    c : Decisions

    Returns
    -------
    PrimFunc
        ``(q, k, weights, ks, ke, k_scale, logits, m0, m1, n0, n1, row0, scaled)``; query m writes row ``m - m0 + row0``
        of logits, and k_scale is read only when `scaled` is 1. Keys outside a query's [ks, ke) get -inf.

    Raises
    ------
    ValueError
        Decisions that do not divide what they must.
    """
    if c.heads % 8 or c.block_keys % c.tile_keys or STEP % c.unroll_d:
        raise ValueError(f"lightning_indexer: decisions that do not divide: {c}")
    q_type, k_type = variant["T"], variant["K"]
    TK, HV, BK, UD = c.tile_keys, c.heads, c.block_keys, c.unroll_d
    LANES = 8
    s_q, s_kv, h_idx, d_idx, s_out, s_scale = (
        tirx.Var(n, "int64") for n in ("s_q", "s_kv", "h_idx", "d_idx", "s_out", "s_scale")
    )
    blocks = (h_idx + HV - 1) // HV

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
        Q = T.match_buffer(q, (s_q, h_idx, d_idx), STORAGE[q_type], align=WIDTH[q_type])
        K = T.match_buffer(k, (s_kv, d_idx), STORAGE[k_type], align=WIDTH[k_type])
        W = T.match_buffer(weights, (s_q, h_idx), "float32", align=4)
        KS = T.match_buffer(ks, (s_q,), "int32", align=4)
        KE = T.match_buffer(ke, (s_q,), "int32", align=4)
        SCALE = T.match_buffer(k_scale, (s_scale,), "float32", align=4)
        OUT = T.match_buffer(logits, (s_out, s_kv), "float32", align=4)
        with T.sblock("task"):
            T.reads()
            T.writes()
            qp = T.sblock_alloc_buffer((m1 - m0, blocks, d_idx, HV), "float32")
            wp = T.sblock_alloc_buffer((m1 - m0, blocks, HV), "float32")
            kp = T.sblock_alloc_buffer((BK, d_idx), "float32")
            lanes = T.sblock_alloc_buffer((BK, LANES), "float32")
            acc = T.sblock_alloc_buffer((TK, HV), "float32", scope="local")
            span = T.sblock_alloc_buffer((2,), "int64", scope="local")
            # Heads past h_idx are zero, so that any head count runs the same tiles. Their products are left out of the
            # sum all the same: with an infinite key they are NaN.
            for i, hb, d, h in T.grid(m1 - m0, blocks, d_idx, HV):
                if hb * HV + h < h_idx:
                    qp[i, hb, d, h] = widen(Q[m0 + i, hb * HV + h, d], q_type)
                else:
                    qp[i, hb, d, h] = T.float32(0)
            for i, hb, h in T.grid(m1 - m0, blocks, HV):
                if hb * HV + h < h_idx:
                    wp[i, hb, h] = W[m0 + i, hb * HV + h]
                else:
                    wp[i, hb, h] = T.float32(0)
            # The keys any query of the task can see; a block outside is filled, not computed.
            span[0] = n1
            span[1] = n0
            for i in T.serial(m1 - m0):
                if KS[m0 + i] < KE[m0 + i]:
                    span[0] = T.min(span[0], T.Cast("int64", KS[m0 + i]))
                    span[1] = T.max(span[1], T.Cast("int64", KE[m0 + i]))
            for b in T.serial((n1 - n0 + BK - 1) // BK):
                start: T.let = n0 + b * BK
                stop: T.let = T.min(start + BK, n1)
                if start < span[1] and span[0] < stop:
                    for j in T.serial(stop - start):
                        for d in T.serial(d_idx // STEP):
                            for l in T.vectorized(STEP):
                                kp[j, d * STEP + l] = widen(K[start + j, d * STEP + l], k_type)
                    # The rest of the last tile: any finite value will do, its results are not stored.
                    for j in T.serial((stop - start + TK - 1) // TK * TK - (stop - start)):
                        for d in T.serial(d_idx // STEP):
                            for l in T.vectorized(STEP):
                                kp[stop - start + j, d * STEP + l] = T.float32(0)
                for i in T.serial(m1 - m0):
                    low: T.let = T.Cast("int64", KS[m0 + i])
                    high: T.let = T.Cast("int64", KE[m0 + i])
                    if start < high and low < stop and low < high:
                        for hb in T.serial(blocks):
                            for t in T.serial((stop - start + TK - 1) // TK):
                                for j in T.unroll(TK):
                                    for h in T.vectorized(HV):
                                        acc[j, h] = T.float32(0)
                                for d in T.serial(d_idx // UD):
                                    for u in T.unroll(UD):
                                        for j in T.unroll(TK):
                                            for h in T.vectorized(HV):
                                                acc[j, h] = (
                                                    acc[j, h] + kp[t * TK + j, d * UD + u] * qp[i, hb, d * UD + u, h]
                                                )
                                for j in T.unroll(TK):
                                    if hb == 0:
                                        for h in T.vectorized(LANES):
                                            lanes[t * TK + j, h] = T.float32(0)
                                    for p in T.unroll(HV // LANES):
                                        for h in T.vectorized(LANES):
                                            lanes[t * TK + j, h] = lanes[t * TK + j, h] + T.Select(
                                                hb * HV + p * LANES + h < h_idx,
                                                relu(acc[j, p * LANES + h]) * wp[i, hb, p * LANES + h],
                                                T.float32(0),
                                            )
                        for j in T.serial(stop - start):
                            half = T.sblock_alloc_buffer((LANES,), "float32", scope="local")
                            for h in T.vectorized(LANES):
                                half[h] = lanes[j, h]
                            for h in T.vectorized(LANES // 2):
                                half[h] = half[h] + half[h + LANES // 2]
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

    return lightning_indexer
