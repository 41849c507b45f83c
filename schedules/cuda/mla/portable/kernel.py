"""The CUDA sparse attention: online softmax over blocks of gathered keys.

A block of threads takes one query, some of its heads, and a part of the selected keys. It works on some keys at a time.
Rows of the latent cache are copied asynchronously into a ring of slots in shared memory, where they serve as keys and
as values. The output stays in registers. Two barriers divide a step. Between them, the scores of some keys become
weights. After them, the values of these keys are added up and the scores of the next keys are computed, so that the
tensor cores have one long phase.

If there are few queries, the keys are cut into parts with a block for each. A block writes its sums and the shift that
they are relative to, and `combine` adds the parts up in order. Indices after the last valid one of a row cost nothing.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .....ops.packed_rows import row_bytes
from ....storage import STORAGE
from ...emit import SharedPool, call, shared
from ..online_softmax import LN_2, LOG2_E, OnlineSoftmax, exp2
from ..packed_gather import PackedGather
from .decisions import DEFAULT, STAGES, Decisions, choices, default, gather_of, tiles_of, work_place

__all__ = [
    "DEFAULT",
    "EMPTY",
    "STAGES",
    "STATS",
    "Decisions",
    "choices",
    "default",
    "tensor_ir",
]

#: f32 that a part leaves for each head: the largest score, the shift, the sum of weights, all for powers of two.
STATS = 3

#: The sum of weights of a part without a valid key.
EMPTY = -1.0


def tensor_ir(variant: dict[str, str], c: Decisions, d_qk: int, d_v: int) -> tirx.PrimFunc:
    """The kernel. The grid is (``c.blocks(s_q, h_q)``, parts).

    Parameters
    ----------
    variant : dict
        Element type T of q, kv and out. With K of float8_e4m3fn, rows of kv are packed as `ops.packed_rows` says; T is
        bfloat16 then.
    c : Decisions
    d_qk, d_v : int

    Returns
    -------
    PrimFunc
        ``(q, kv, indices, attn_sink, topk_length, out, max_logits, lse, sums, stats, s_q, s_kv, h_q, topk, parts,
        part_keys, sm_scale, has_sink, has_length)``. Part p has the selected positions from ``p * part_keys`` on;
        `part_keys` is a multiple of ``c.block_keys``. attn_sink and topk_length are read only when their flags are 1.
        With one part `sums` and `stats` are not touched, with several `out`, `max_logits` and `lse` are not:
        f32 ``sums [s_q, h_q, parts, d_v]``, aligned to 16 bytes, and ``stats [s_q, h_q, parts, 3]`` are then what
        `combine` takes.
    """
    dtype = variant["T"]
    c.check(variant, d_qk, d_v)
    STORE = STORAGE[dtype]
    HEADS, BK, SLOTS, THREADS = c.heads, c.block_keys, c.stages, c.threads
    Tiles, Gather = tiles_of(dtype), gather_of(variant)
    KEY, WIDTH = ("uint8", row_bytes(d_qk, d_v)) if Gather is PackedGather else (STORE, d_qk)
    pack = "pack_f16" if dtype == "float16" else "pack_bf16"

    @T.prim_func(s_tir=True)
    def sparse_mla(
        q: T.handle(STORE),
        kv: T.handle(KEY),
        indices: T.handle("int32"),
        attn_sink: T.handle("float32"),
        topk_length: T.handle("int32"),
        out: T.handle(STORE),
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
        block = T.launch_thread("blockIdx.x", s_q * ((h_q + (HEADS - 1)) // HEADS))
        part = T.launch_thread("blockIdx.y", parts)
        tx = T.launch_thread("threadIdx.x", THREADS)
        Q = T.decl_buffer((s_q, h_q, d_qk), STORE, data=q)
        KV = T.decl_buffer((s_kv, WIDTH), KEY, data=kv)
        INDEX = T.decl_buffer((s_q, topk), "int32", data=indices)
        SINK = T.decl_buffer((h_q,), "float32", data=attn_sink)
        LENGTH = T.decl_buffer((s_q,), "int32", data=topk_length)
        OUT = T.decl_buffer((s_q, h_q, d_v), STORE, data=out)
        MAX = T.decl_buffer((s_q, h_q), "float32", data=max_logits)
        LSE = T.decl_buffer((s_q, h_q), "float32", data=lse)
        SUMS = T.decl_buffer((s_q, h_q, parts, d_v), "float32", data=sums)
        STAT = T.decl_buffer((s_q, h_q, parts, STATS), "float32", data=stats)
        pool = T.alloc_buffer((0,), "uint8", scope="shared.dyn")
        places = T.meta_var(SharedPool())
        tiles = Tiles(pool, places, tx, c, d_qk, d_v, dtype, Gather.slots_of(c))
        softmax = OnlineSoftmax(pool, places, tx, c)
        head_blocks: T.let = T.Cast("int32", (h_q + (HEADS - 1)) // HEADS)
        query: T.let = T.truncdiv(T.Cast("int32", block), head_blocks)
        m: T.let = T.Cast("int64", query)
        first_head: T.let = (T.Cast("int32", block) - query * head_blocks) * HEADS
        start: T.let = T.Cast("int32", T.Cast("int64", part) * part_keys)
        # For the end: kept in registers, the offsets of the results would take some all along.
        work = shared(pool, work_place(places))
        if tx == 0:
            work[0] = query
            work[1] = first_head
        scale: T.let = sm_scale * T.float32(LOG2_E)
        end = T.local_scalar("int32")
        end = T.Cast("int32", T.min(T.Cast("int64", start) + part_keys, topk))
        if has_length == 1:
            end = T.min(end, T.max(LENGTH[m], 0))
        gather = Gather(pool, places, tx, c, INDEX, m, KV, s_kv, tiles.keys, d_qk, d_v)
        gather.begin(start, end)
        steps: T.let = (gather.stop - start + (BK - 1)) // BK
        passes = T.local_scalar("int32")
        passes = 1

        tiles.clear()
        softmax.clear()
        if steps > 0:
            gather.look_up(0)
            tiles.load_queries(Q, m, first_head, h_q)
            gather.start(steps)
            T.tvm_storage_sync("shared")
            tiles.score(0)
        for step in T.serial(T.max(steps, 0)):
            gather.await_next()
            T.tvm_storage_sync("shared")
            softmax.update(tiles, gather.valid, step % SLOTS, scale)
            gather.settle_next(step, steps)
            if Tiles.ROUNDS:
                passes = 1 + call("barrier_or", softmax.large)
            else:
                T.tvm_storage_sync("shared")
            # All have done with the slot before this one.
            gather.go_on(step, steps)
            tiles.scale(softmax.factor, False)
            tiles.accumulate(gather.slot(step), passes)
            if step + 1 < steps:
                tiles.score(gather.slot(step + 1))

        row: T.let = T.Cast("int64", work[0])
        its_first: T.let = work[1]
        owner: T.let = T.Cast("int64", its_first + softmax.head)
        T.tvm_storage_sync("shared")
        if softmax.works and softmax.lane == 0 and owner < h_q:
            if parts > T.int64(1):
                STAT[row, owner, part, 0] = softmax.top
                STAT[row, owner, part, 1] = T.Select(
                    softmax.top == -T.infinity("float32"), -T.infinity("float32"), softmax.shift
                )
                STAT[row, owner, part, 2] = T.Select(steps > 0, softmax.total, T.float32(EMPTY))
            elif steps > 0:
                MAX[row, owner] = softmax.top * T.float32(LN_2)
                LSE[row, owner] = softmax.shift * T.float32(LN_2) + T.log(softmax.total)
                if has_sink == 1:
                    softmax.total = softmax.total + exp2(SINK[owner] * T.float32(LOG2_E) - softmax.shift)
                softmax.factor[softmax.head] = call("reciprocal", softmax.total, dtype="float32")
            else:
                MAX[row, owner] = -T.infinity("float32")
                LSE[row, owner] = T.infinity("float32")
                softmax.factor[softmax.head] = T.float32(1)
        T.tvm_storage_sync("shared")

        @T.inline
        def put_sums(head, value, low, high):
            at: T.let = T.Cast("int64", its_first + head)
            if at < h_q:
                T.evaluate(call("put_64", T.address_of(SUMS[row, at, part, value]), low, high, dtype="void"))

        @T.inline
        def put_out(head, value, low, high):
            at: T.let = T.Cast("int64", its_first + head)
            if at < h_q:
                if dtype == "float32":
                    OUT[row, at, value] = low
                    OUT[row, at, value + 1] = high
                else:
                    to: T.let = T.address_of(OUT[row, at, value])
                    T.evaluate(call("put_2x16", to, call(pack, low, high, dtype="uint32"), dtype="void"))

        if parts > T.int64(1):
            if steps > 0:
                tiles.each_pair(put_sums)
        else:
            tiles.scale(softmax.factor, True)
            tiles.each_pair(put_out)

    return sparse_mla
