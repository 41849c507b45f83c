"""Add up, in order, the parts into which the attention cut the keys."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from ...storage import STORAGE
from ..emit import WARP, call
from .online_softmax import LN_2, LOG2_E, exp2, max_nan
from .portable.kernel import EMPTY, STATS

THREADS = 128

#: Parts whose sums are loaded at a time.
AHEAD = 4


def tensor_ir(variant: dict[str, str], d_v: int) -> tirx.PrimFunc:
    """The kernel; a block has one head of one query. The grid is (rows,).

    Parameters
    ----------
    variant : dict
        Element type T of out.
    d_v : int

    Returns
    -------
    PrimFunc
        ``(sums, stats, attn_sink, out, max_logits, lse, rows, h_q, parts, has_sink)`` with ``rows = s_q * h_q``; the
        first two are those of `sparse_mla`, and attn_sink is read only when its flag is 1.
    """
    dtype = variant["T"]
    STORE = STORAGE[dtype]
    QUADS = d_v // 4
    OWN = -(-QUADS // THREADS)
    pack = "pack_f16" if dtype == "float16" else "pack_bf16"

    @T.prim_func(s_tir=True)
    def combine(
        sums: T.handle("float32"),
        stats: T.handle("float32"),
        attn_sink: T.handle("float32"),
        out: T.handle(STORE),
        max_logits: T.handle("float32"),
        lse: T.handle("float32"),
        rows: T.int64,
        h_q: T.int64,
        parts: T.int64,
        has_sink: T.int32,
    ):
        row = T.launch_thread("blockIdx.x", rows)
        tx = T.launch_thread("threadIdx.x", THREADS)
        SUMS = T.decl_buffer((rows, parts, d_v), "float32", data=sums)
        STAT = T.decl_buffer((rows, parts, STATS), "float32", data=stats)
        SINK = T.decl_buffer((h_q,), "float32", data=attn_sink)
        OUT = T.decl_buffer((rows, d_v), STORE, data=out)
        MAX = T.decl_buffer((rows,), "float32", data=max_logits)
        LSE = T.decl_buffer((rows,), "float32", data=lse)
        value = T.alloc_local((OWN, 4), "float32")
        addend = T.alloc_local((AHEAD, OWN, 4), "float32")
        theirs = T.alloc_local((AHEAD,), "float32")
        seen = T.local_scalar("int32")
        top = T.local_scalar("float32")
        shift = T.local_scalar("float32")
        total = T.local_scalar("float32")
        factor = T.local_scalar("float32")
        lane: T.let = tx % WARP
        # Each warp looks at all parts, a lane at every 32nd of them.
        seen = 0
        top = -T.infinity("float32")
        shift = -T.infinity("float32")
        for g in T.serial((parts + (WARP - 1)) // WARP):
            p: T.let = g * WARP + lane
            if p < parts:
                # The sums of a part without keys were never written.
                if STAT[row, p, 2] != T.float32(EMPTY):
                    seen = 1
                    top = max_nan(top, STAT[row, p, 0])
                    shift = T.max(shift, STAT[row, p, 1])
        for r in T.unroll(5):
            seen = seen | call("shuffle_xor", seen, 1 << r)
            top = max_nan(top, call("shuffle_xor", top, 1 << r, dtype="float32"))
            shift = T.max(shift, call("shuffle_xor", shift, 1 << r, dtype="float32"))
        if shift == -T.infinity("float32"):
            shift = T.float32(0)
        total = T.float32(0)
        for i in T.unroll(OWN):
            for e in T.unroll(4):
                value[i, e] = T.float32(0)
        for g in T.serial((parts + (WARP - 1)) // WARP):
            p: T.let = g * WARP + lane
            factor = T.float32(EMPTY)
            if p < parts:
                if STAT[row, p, 2] != T.float32(EMPTY):
                    factor = T.float32(1)
                    # Without a shift all weights were 0, and the sums are 0 or NaN.
                    if STAT[row, p, 1] > -T.infinity("float32"):
                        factor = exp2(STAT[row, p, 1] - shift)
                    total = total + STAT[row, p, 2] * factor
            for j in T.serial(WARP // AHEAD):
                if g * WARP + j * AHEAD < parts:
                    for a in T.unroll(AHEAD):
                        theirs[a] = call("shuffle", factor, j * AHEAD + a, dtype="float32")
                        for i in T.unroll(OWN):
                            quad: T.let = i * THREADS + tx
                            if quad < QUADS and theirs[a] != T.float32(EMPTY):
                                at: T.let = T.address_of(SUMS[row, g * WARP + j * AHEAD + a, quad * 4])
                                T.evaluate(call("get_128", T.address_of(addend[a, i, 0]), at, dtype="void"))
                    for a in T.unroll(AHEAD):
                        if theirs[a] != T.float32(EMPTY):
                            for i in T.unroll(OWN):
                                for e in T.unroll(4):
                                    value[i, e] = value[i, e] + addend[a, i, e] * theirs[a]
        for r in T.unroll(5):
            total = total + call("shuffle_xor", total, 1 << r, dtype="float32")
        factor = T.float32(1)
        if seen == 1:
            if tx == 0:
                MAX[row] = top * T.float32(LN_2)
                LSE[row] = shift * T.float32(LN_2) + T.log(total)
            if has_sink == 1:
                total = total + exp2(SINK[row % h_q] * T.float32(LOG2_E) - shift)
            factor = call("reciprocal", total, dtype="float32")
        elif tx == 0:
            MAX[row] = -T.infinity("float32")
            LSE[row] = T.infinity("float32")
        for i in T.unroll(OWN):
            quad: T.let = i * THREADS + tx
            if quad < QUADS:
                if dtype == "float32":
                    for e in T.unroll(4):
                        OUT[row, quad * 4 + e] = value[i, e] * factor
                else:
                    for pair in T.unroll(2):
                        to: T.let = T.address_of(OUT[row, quad * 4 + pair * 2])
                        low: T.let = value[i, pair * 2] * factor
                        high: T.let = value[i, pair * 2 + 1] * factor
                        T.evaluate(call("put_2x16", to, call(pack, low, high, dtype="uint32"), dtype="void"))

    return combine
