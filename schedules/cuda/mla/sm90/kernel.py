"""The CUDA sparse attention for sm_90a: gathered keys, products of warpgroups.

A block takes one query, 64 of its heads, and a part of the selected keys. It works on a pair of tiles of 64 keys at a
time. One warpgroup copies: the rows of tile s of a pair go to slot s, in halves that are filled as they become free.
The two other warpgroups multiply. Warpgroup w computes the scores and the weights of tile w. With the weights in
registers it adds up the values of half w of the output, and it passes them to the other warpgroup, which uses them for
its half. The weights of both are relative to one shift, which goes back and forth: warpgroup 0 computes it from the
shift of the last pair and its own scores, warpgroup 1 from that and its own scores. So one warpgroup multiplies while
the other makes weights. If some weight of a tile is large, the remainders that rounding cut off its weights are
multiplied as well.

Parameters, parts and their results are those of the portable kernel, and `combine` adds the parts up in the same way.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .....ops.packed_rows import SCALED, row_bytes
from ...emit import WARP, SharedPool, call, shared
from ..gather import SCANNED, find_last
from ..online_softmax import LOG2_E
from ..portable.kernel import STATS
from .decisions import DEFAULT, HEADS, KEYS, THREADS, WARPGROUP, Decisions, choices, exchange
from .gather import RowGather
from .output import Output
from .packed import PackedGather
from .products import Products
from .softmax import RowSoftmax
from .turns import BOTH, Turns, free, ready
from .votes import Votes

__all__ = ["DEFAULT", "Decisions", "choices", "tensor_ir"]


def tensor_ir(variant: dict[str, str], c: Decisions, d_qk: int, d_v: int) -> tirx.PrimFunc:
    """The kernel. The grid is (``c.blocks(s_q, h_q)``, parts). `q` and `kv` are aligned to 16 bytes.

    Parameters
    ----------
    variant : dict
        Element type T of q, kv and out: bfloat16 or float16. With K of float8_e4m3fn, rows of kv are packed as
        `packed` describes; T is then bfloat16.
    c : Decisions
    d_qk, d_v : int
        576 or 512, and 512.

    Returns
    -------
    PrimFunc
        With the parameters of `sparse_mla.tensor_ir`.
    """
    dtype = variant["T"]
    c.check(variant, d_qk, d_v)
    packed = variant.get("K", dtype) == SCALED
    KEY, WIDTH, Gather = ("uint8", row_bytes(d_qk, d_v), PackedGather) if packed else ("uint16", d_qk, RowGather)
    MORE, FEWER = f"more_registers<{c.consumer_registers}>", f"fewer_registers<{c.producer_registers}>"

    @T.prim_func(s_tir=True)
    def hopper_mla(
        q: T.handle("uint16"),
        kv: T.handle(KEY),
        indices: T.handle("int32"),
        attn_sink: T.handle("float32"),
        topk_length: T.handle("int32"),
        out: T.handle("uint16"),
        max_logits: T.handle("float32"),
        lse: T.handle("float32"),
        sums: T.handle("float32"),
        stats: T.handle("float32"),
        s_q: T.int64,
        s_kv: T.int64,
        h_q: T.int64,
        topk: T.int64,
        parts: T.int64,
        part_keys: T.int64,
        sm_scale: T.float32,
        has_sink: T.int32,
        has_length: T.int32,
    ):
        # Registers change hands only where their number is fixed at the launch.
        T.func_attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        block = T.launch_thread("blockIdx.x", s_q * ((h_q + (HEADS - 1)) // HEADS))
        part = T.launch_thread("blockIdx.y", parts)
        tx = T.launch_thread("threadIdx.x", THREADS)
        Q = T.decl_buffer((s_q, h_q, d_qk), "uint16", data=q)
        KV = T.decl_buffer((s_kv, WIDTH), KEY, data=kv)
        INDEX = T.decl_buffer((s_q, topk), "int32", data=indices)
        SINK = T.decl_buffer((h_q,), "float32", data=attn_sink)
        LENGTH = T.decl_buffer((s_q,), "int32", data=topk_length)
        OUT = T.decl_buffer((s_q, h_q, d_v), "uint16", data=out)
        MAX = T.decl_buffer((s_q, h_q), "float32", data=max_logits)
        LSE = T.decl_buffer((s_q, h_q), "float32", data=lse)
        SUMS = T.decl_buffer((s_q, h_q, parts, d_v), "float32", data=sums)
        STAT = T.decl_buffer((s_q, h_q, parts, STATS), "float32", data=stats)
        pool = T.alloc_buffer((0,), "uint8", scope="shared.dyn")
        places = T.meta_var(SharedPool())
        products = Products(pool, places, tx, d_qk, dtype)
        others = T.meta_var(exchange(places))
        bars = shared(pool, others[0])
        counts = shared(pool, others[1])
        shifts = shared(pool, others[2])
        ends = shared(pool, others[3])
        lasts = shared(pool, others[4])
        seat = shared(pool, others[5])
        head_blocks: T.let = (h_q + (HEADS - 1)) // HEADS
        m: T.let = T.Cast("int64", block) // head_blocks
        first_head: T.let = T.Cast("int32", T.Cast("int64", block) % head_blocks) * HEADS
        start: T.let = T.Cast("int32", T.Cast("int64", part) * part_keys)
        scale: T.let = sm_scale * T.float32(LOG2_E)
        warpgroup: T.let = call("shuffle", tx // WARPGROUP, 0)
        softmax = RowSoftmax(products)
        votes = Votes(products, softmax, shared(pool, others[6]), shared(pool, others[7]))
        gather = Gather(tx % WARPGROUP, INDEX, m, KV, s_kv, products.keys, counts, d_qk)
        end = T.local_scalar("int32")
        last = T.local_scalar("int32")
        own_last = T.alloc_local((1,), "int32")
        found = T.alloc_local((SCANNED,), "int32")

        @T.inline
        def fill(slot, half, parity):
            gather.fill(slot, half, ready(bars, slot, half), free(bars, slot, half), parity)

        if tx == 0:
            for slot in T.unroll(2):
                T.evaluate(call("mbarrier_init", ready(bars, slot, 0), Gather.arrivals(0, d_qk), dtype="void"))
                T.evaluate(call("mbarrier_init", ready(bars, slot, 1), Gather.arrivals(1, d_qk), dtype="void"))
                for half in T.unroll(2):
                    T.evaluate(call("mbarrier_init", free(bars, slot, half), WARPGROUP // WARP, dtype="void"))
            T.evaluate(call("mbarrier_fence", dtype="void"))
            seat[0] = T.Cast("int32", m)
            seat[1] = first_head
            seat[2] = part
        # Behind the last valid index nothing is looked at.
        end = T.Cast("int32", T.min(T.Cast("int64", start) + part_keys, topk))
        if has_length == 1:
            end = T.min(end, LENGTH[m])
        find_last(own_last, found, INDEX, m, start, end, s_kv, tx, THREADS)
        last = own_last[0]
        for r in T.unroll(5):
            last = T.max(last, call("shuffle_xor", last, 1 << r))
        if tx % WARP == 0:
            lasts[tx // WARP] = last
        T.tvm_storage_sync("shared")
        for w in T.unroll(THREADS // WARP):
            last = T.max(last, lasts[w])
        stop: T.let = call("shuffle", last, 0)
        tiles: T.let = (stop - start + (KEYS - 1)) // KEYS
        pairs: T.let = (tiles + 1) // 2

        if warpgroup == 2:
            T.evaluate(call(FEWER, dtype="void"))
            gather.look_up(start, stop)
            for j in T.serial(pairs):
                gather.settle()
                gather.look_up(start + (j + 1) * (2 * KEYS), stop)
                second: T.let = j * 2 + 1 < tiles
                # In the order in which the halves are asked for and become free.
                fill(0, 0, 1 - j % 2)
                if second:
                    fill(1, 0, 1 - j % 2)
                # By now it is known which rows come next.
                gather.expect()
                fill(0, 1, 1 - j % 2)
                if second:
                    fill(1, 1, 1 - j % 2)
        else:
            T.evaluate(call(MORE, dtype="void"))
            products.start(tx)
            products.clear()
            softmax.clear()
            votes.clear(warpgroup)
            if pairs > 0:
                products.fetch_queries(tx, 2 * WARPGROUP, Q, m, first_head, h_q)
                T.evaluate(call("cp_async_commit", dtype="void"))
                T.evaluate(call("cp_async_wait", 0, dtype="void"))
                T.evaluate(call("barrier", BOTH, 2 * WARPGROUP, dtype="void"))
            turns = Turns(products, softmax, votes, bars, counts, shifts, scale, tiles)
            if warpgroup == 0:
                turns.go_first(pairs)
            else:
                turns.go_second(pairs)
            # Read again here, so that no register holds them over the loops.
            output = Output(products, softmax, warpgroup, ends, seat[0], seat[1], h_q)
            output.add_up()
            if parts > T.int64(1):
                output.put_stats(STAT, seat[2], pairs == 0)
                if pairs > 0:
                    output.put_sums(SUMS, seat[2])
            else:
                output.put_ends(MAX, LSE, SINK, has_sink, pairs == 0)
                output.put_out(OUT)

    return hopper_mla
