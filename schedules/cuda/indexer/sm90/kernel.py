"""The sm_90a indexer: products of keys and heads by warpgroups, reduced over the heads in registers.

A block takes some queries, whose heads it holds in shared memory, and a run of key tiles. One thread copies the tiles
into a ring of stages, with bulk copies that use tensor maps. Each consumer warpgroup multiplies its 64 keys of a tile
with the heads of all queries, in parts. While a part is multiplied, the part before is summed over its heads and
stored. Tiles that no query of the block can see are filled, not computed.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from ...emit import WARP, SharedPool, call
from .decisions import DEFAULT, FEW_QUERIES, HEADS, Decisions, choices, default, padded_heads, serves, span
from .ring import Ring
from .scores import Scores

__all__ = [
    "DEFAULT",
    "FEW_QUERIES",
    "HEADS",
    "Decisions",
    "choices",
    "default",
    "padded_heads",
    "serves",
    "span",
    "tensor_ir",
]

GROUP = 128


def tensor_ir(variant: dict[str, str], c: Decisions, d_idx: int = 128, heads: int = 64) -> tirx.PrimFunc:
    """Make the kernel for the queries [m0, m1) and all keys. The grid is (blocks of queries, runs of key tiles).

    Parameters
    ----------
    variant : dict
        Element types T of q and K of k, which `serves` says there is a kernel for.
    c : Decisions
    d_idx : int
        A multiple of 32, 256 at most.
    heads : int
        32 or 64: the most that h_idx may be.

    Returns
    -------
    PrimFunc
        ``(q_map, k_map, weights, ks, ke, k_scale, logits, s_kv, h_idx, m0, m1, row0, tiles, scaled, fill, blocks,
        runs)``, as the portable kernel's but that q and k are tensor maps, of ``c.q_box`` and ``c.k_box`` with a
        swizzle of ``span(variant, d_idx)`` bytes: both are aligned to 16 bytes and neither is empty.

    Raises
    ------
    ValueError
        There is no kernel for these types, width or number of heads, or it would need more shared memory than a block
        can have.
    """
    if not serves(variant):
        raise ValueError(f"lightning_indexer: no sm_90a kernel for {variant}")
    if d_idx % 32 or not 32 <= d_idx <= 256:
        raise ValueError(f"lightning_indexer: d_idx: expected a multiple of 32 in 32..256, got {d_idx}")
    if heads not in HEADS:
        raise ValueError(f"lightning_indexer: heads: expected 32 or 64, got {heads}")
    if c.shared_bytes(variant, d_idx) > c.shared_limit:
        raise ValueError(f"lightning_indexer: {c} take more than {c.shared_limit} bytes of shared memory")
    THREADS, KEYS, QUERIES = (c.warpgroups + 1) * GROUP, c.block_keys, c.queries(heads)
    PRODUCER = c.warpgroups
    FEWER, MORE = (f"{name}_registers<{n}>" for name, n in zip(("fewer", "more"), c.registers, strict=True))
    FILLERS = GROUP - WARP
    LAST = c.parts - 1

    @T.prim_func(s_tir=True)
    def lightning_indexer(
        q_map: T.TensorMap(),
        k_map: T.TensorMap(),
        weights: T.handle("float32"),
        ks: T.handle("int32"),
        ke: T.handle("int32"),
        k_scale: T.handle("float32"),
        logits: T.handle("float32"),
        s_kv: T.int64,
        h_idx: T.int32,
        m0: T.int64,
        m1: T.int64,
        row0: T.int64,
        tiles: T.int32,
        scaled: T.int32,
        fill: T.int32,
        blocks: T.int64,
        runs: T.int32,
    ):
        # Without a number of blocks the assembler ignores the registers of each group.
        T.func_attr({"tirx.launch_bounds_min_blocks_per_sm": c.blocks})
        block = T.launch_thread("blockIdx.x", blocks)
        run = T.launch_thread("blockIdx.y", runs)
        tx = T.launch_thread("threadIdx.x", THREADS)
        W = T.decl_buffer((m1, h_idx), "float32", data=weights)
        KS = T.decl_buffer((m1,), "int32", data=ks)
        KE = T.decl_buffer((m1,), "int32", data=ke)
        SCALE = T.decl_buffer((s_kv,), "float32", data=k_scale)
        OUT = T.decl_buffer(((row0 + m1 - m0) * s_kv,), "float32", data=logits)
        first: T.let = m0 + block * QUERIES
        count: T.let = T.Cast("int32", T.min(m1 - first, T.int64(QUERIES)))
        base: T.let = run * tiles * KEYS
        length: T.let = T.Cast("int32", T.min(s_kv - T.Cast("int64", base), T.Cast("int64", tiles) * KEYS))
        # Where the run begins in the first query's logits.
        origin: T.let = (row0 + first - m0) * s_kv + T.Cast("int64", base)
        pool = T.alloc_buffer((0,), "uint8", scope="shared.dyn")
        places = T.meta_var(SharedPool())
        ring = Ring(pool, places, c, variant, d_idx)
        # Shows the compiler that all threads of a warp are in one group.
        group: T.let = call("shuffle", tx // GROUP, 0)
        low = T.local_scalar("int32")
        high = T.local_scalar("int32")

        if tx == 0:
            T.evaluate(call("tma_prefetch", q_map, dtype="void"))
            T.evaluate(call("tma_prefetch", k_map, dtype="void"))
        # The keys of the run, from `base` on, that any query of the block can see, and their tiles.
        low = base + length
        high = base
        for i in T.unroll(QUERIES):
            # If there are fewer, load the last one again. Then the loads need not wait for each other.
            query: T.let = first + T.min(i, count - 1)
            if KS[query] < KE[query]:
                low = T.min(low, KS[query])
                high = T.max(high, KE[query])
        low = T.max(low, base)
        high = T.min(high, base + length)
        low = low - base
        high = high - base
        from_tile: T.let = T.Select(low < high, low // KEYS, 0)
        to_tile: T.let = T.Select(low < high, (high - 1) // KEYS + 1, 0)

        @T.inline
        def fill_outside(thread, threads):
            before: T.let = from_tile * KEYS
            outside: T.let = before + T.max(length - to_tile * KEYS, 0)
            for i in T.serial(count):
                for e in T.serial((outside + (threads - 1)) // threads):
                    at: T.let = e * threads + thread
                    if at < outside:
                        key: T.let = T.Select(at < before, at, at + (to_tile - from_tile) * KEYS)
                        OUT[origin + i * s_kv + key] = -T.infinity("float32")

        if from_tile < to_tile:
            if tx == 0:
                ring.begin()
            T.tvm_storage_sync("shared")
            if group == PRODUCER:
                T.evaluate(call(FEWER, dtype="void"))
                if tx == PRODUCER * GROUP:
                    ring.bring_queries(q_map, T.Cast("int32", first), heads)
                    for t in T.serial(to_tile - from_tile):
                        ring.bring_keys(k_map, t, base + (from_tile + t) * KEYS)
                # The other warps have nothing to do but this.
                if tx >= PRODUCER * GROUP + WARP:
                    if fill == 1:
                        fill_outside(tx - (PRODUCER * GROUP + WARP), FILLERS)
            else:
                T.evaluate(call(MORE, dtype="void"))
                scores = Scores(ring, c, variant, heads, group, tx)
                scores.take_queries(W, KS, KE, first, count, h_idx, base, length)
                scores.take_places(origin, s_kv, count, from_tile * KEYS, length, fill)
                ring.wait_queries()
                for t in T.serial(to_tile - from_tile):
                    ring.wait_keys(t)
                    scores.multiply(t, 0)
                    if c.parts == 2:
                        scores.multiply(t, 1)
                    scores.take_scales(SCALE, base, length, scaled)
                    if c.parts == 2:
                        scores.wait(0, 1)
                        scores.sum_up(0, h_idx)
                        scores.store(OUT, 0)
                    scores.wait(LAST, 0)
                    ring.leave(t, tx)
                    scores.sum_up(LAST, h_idx)
                    scores.store(OUT, LAST)
                    scores.go_on()
        elif fill == 1:
            fill_outside(tx, THREADS)

    return lightning_indexer
