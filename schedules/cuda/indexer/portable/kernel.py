"""The CUDA indexer: a matrix product of keys and heads that is reduced over the heads in registers.

A block takes some queries, whose heads it holds in shared memory, and a run of key tiles, which a pipeline of
asynchronous copies brings. Each warp loads its keys of a tile into registers once, and multiplies them with all heads
of all queries. Tiles that no query of the block can see are filled, not computed.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .....spec import ELEMENT_BYTES
from ....storage import STORAGE
from ...emit import WARP, Place, SharedPool, call, shared
from .decisions import DEFAULT, Decisions, choices, default, planes, product_of, row_stride
from .head_sum import HeadSum
from .tiles import FmaScores, MmaScores, Rows

__all__ = ["DEFAULT", "Decisions", "choices", "default", "product_of", "tensor_ir"]


def clamp(x, low, high):
    """`x`, or the nearer bound. TVM would move later additions into a min or max, where they overflow."""
    return call("clamp", x, low, high)


def tensor_ir(variant: dict[str, str], product: str, c: Decisions, d_idx: int = 128) -> tirx.PrimFunc:
    """Make the kernel for the queries [m0, m1) and all keys. The grid is (blocks of queries, runs of key tiles).

    Parameters
    ----------
    variant : dict
        Element types T of q and K of k.
    product : str
        The type that is multiplied: `product_of` the architecture.
    c : Decisions
    d_idx : int
        A multiple of 32, 256 at most.

    Returns
    -------
    PrimFunc
        ``(q, k, weights, ks, ke, k_scale, logits, s_kv, h_idx, m0, m1, row0, tiles, scaled, fill, blocks, runs)``;
        query m writes row ``m - m0 + row0`` of logits, and k_scale is read only when `scaled` is 1. Keys outside a
        query's [ks, ke) get -inf, or nothing when `fill` is 0. A run is `tiles` tiles of ``c.block_keys``; there are no
        more `blocks` and `runs` than it takes.

    Raises
    ------
    ValueError
        The width is not a multiple of 32, or the keys do not fit into the registers.
    """
    if d_idx % 32 or not 32 <= d_idx <= 256:
        raise ValueError(f"lightning_indexer: d_idx: expected a multiple of 32 in 32..256, got {d_idx}")
    most_tiles = 1024 // (d_idx * ELEMENT_BYTES[product])
    if c.key_tiles > most_tiles and product != "float32":
        raise ValueError(f"lightning_indexer: key_tiles: expected at most {most_tiles}, got {c.key_tiles}")
    q_type, k_type = variant["T"], variant["K"]
    THREADS, KEYS, QUERIES, STAGES, KEY_TILES = c.warps * WARP, c.block_keys, c.queries, c.stages, c.key_tiles
    GROUP = 8 * c.head_tiles
    # Keys of a lane after the sum over the heads.
    OWN = max(KEY_TILES // 2, 1)
    PLANES, K_WIDTH = planes(variant), ELEMENT_BYTES[k_type]
    K_CHUNKS, K_CHUNK = d_idx * K_WIDTH // 16, 16 // K_WIDTH
    COPIES = -(-KEYS * K_CHUNKS // THREADS)
    # What one thread brings of a query at a time: 16 bytes, or 16 elements to be converted.
    CONVERTED = product != k_type
    WORDS = f"words_{q_type}"
    Q_CHUNK = 16 if CONVERTED else K_CHUNK
    Q_CHUNKS = d_idx // Q_CHUNK
    Q_STRIDE = row_stride(d_idx * ELEMENT_BYTES[product])
    Scores = FmaScores if product == "float32" else MmaScores
    # Tiles on their way. One that must stay while it is used leaves no room for that many, unless it is the only one.
    AHEAD = STAGES if Scores.HELD or STAGES == 1 else STAGES - 1

    @T.prim_func(s_tir=True)
    def lightning_indexer(
        q: T.handle(STORAGE[q_type]),
        k: T.handle(STORAGE[k_type]),
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
        # Otherwise the compiler spills registers, for more blocks than shared memory has room for.
        T.func_attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        block = T.launch_thread("blockIdx.x", blocks)
        run = T.launch_thread("blockIdx.y", runs)
        tx = T.launch_thread("threadIdx.x", THREADS)
        Q = T.decl_buffer((m1, h_idx, d_idx), STORAGE[q_type], data=q)
        K = T.decl_buffer((s_kv, d_idx), STORAGE[k_type], data=k)
        W = T.decl_buffer((m1, h_idx), "float32", data=weights)
        KS = T.decl_buffer((m1,), "int32", data=ks)
        KE = T.decl_buffer((m1,), "int32", data=ke)
        SCALE = T.decl_buffer((s_kv,), "float32", data=k_scale)
        OUT = T.decl_buffer((row0 + m1 - m0, s_kv), "float32", data=logits)
        first: T.let = m0 + block * QUERIES
        count: T.let = T.Cast("int32", T.min(m1 - first, T.int64(QUERIES)))
        groups: T.let = (h_idx + (GROUP - 1)) // GROUP
        rows: T.let = groups * GROUP
        last_key: T.let = T.Cast("int32", s_kv) - 1
        base: T.let = run * tiles * KEYS
        length: T.let = T.Cast("int32", T.min(s_kv - T.Cast("int64", base), T.Cast("int64", tiles) * KEYS))
        pool = T.alloc_buffer((0,), "uint8", scope="shared.dyn")
        places = T.meta_var(SharedPool())
        keys = Rows(pool, places, STAGES * KEYS, d_idx * K_WIDTH)
        heads = Rows(pool, places, QUERIES * PLANES * rows, d_idx * ELEMENT_BYTES[product])
        # Behind the heads, whose number the launch decides.
        behind: T.let = places.bytes // 4 + QUERIES * PLANES * rows * (Q_STRIDE // 4)
        head_weights = shared(pool, Place((QUERIES, rows), "float32", behind))
        scores = Scores(c, variant, product, d_idx, keys, heads, tx)
        sums = HeadSum(c, head_weights, h_idx, K_WIDTH > 1, tx)
        words = T.alloc_local((PLANES * 8,), "uint32")
        scale = T.alloc_local((OWN,), "float32")
        low = T.local_scalar("int32")
        high = T.local_scalar("int32")

        # All rows are, or none.
        aligned: T.let = call("aligned_16", T.address_of(K[0, 0]))

        # The keys of the run (from `base` on) that any query of the block can see, and their tiles.
        low = length
        high = 0
        for i in T.unroll(QUERIES):
            # If there are fewer, load the last one again. Then the loads need not wait for each other.
            query: T.let = first + T.min(i, count - 1)
            begin: T.let = clamp(KS[query], base, base + length) - base
            end: T.let = clamp(KE[query], base, base + length) - base
            if begin < end:
                low = T.min(low, begin)
                high = T.max(high, end)
        from_tile: T.let = T.Select(low < high, low // KEYS, 0)
        to_tile: T.let = T.Select(low < high, (high - 1) // KEYS + 1, 0)

        @T.inline
        def copy_keys(t, e, name):
            chunk: T.let = e * THREADS + tx
            if COPIES * THREADS == KEYS * K_CHUNKS or chunk < KEYS * K_CHUNKS:
                row: T.let = chunk // K_CHUNKS
                to: T.let = keys.chunk(t % STAGES * KEYS + row, chunk % K_CHUNKS, row % 8)
                valid: T.let = row < length - t * KEYS
                key: T.let = T.Select(valid, base + t * KEYS + row, last_key)
                at: T.let = T.address_of(K[key, chunk % K_CHUNKS * K_CHUNK])
                if name == "copy_16":
                    T.evaluate(call(name, to, at, K_WIDTH, valid, dtype="void"))
                else:
                    T.evaluate(call(name, to, at, valid, dtype="void"))

        @T.inline
        def fetch(t):
            if t < to_tile:
                if aligned == 1:
                    for e in T.unroll(COPIES):
                        copy_keys(t, e, "cp_async_16")
                else:
                    for e in T.serial(COPIES):
                        copy_keys(t, e, "copy_16")
            T.evaluate(call("cp_async_commit", dtype="void"))

        @T.inline
        def fetch_query(i):
            for e in T.serial((rows * Q_CHUNKS + THREADS - 1) // THREADS):
                chunk: T.let = e * THREADS + tx
                head: T.let = chunk // Q_CHUNKS
                at: T.let = T.address_of(Q[first + i, T.min(head, h_idx - 1), chunk % Q_CHUNKS * Q_CHUNK])
                if head < rows:
                    if CONVERTED:
                        T.evaluate(call(WORDS, T.address_of(words[0]), at, dtype="void"))
                        for x in T.unroll(PLANES * 8):
                            words[x] = T.Select(head < h_idx, words[x], T.uint32(0))
                        for p in T.unroll(PLANES):
                            row: T.let = (i * PLANES + p) * rows + head
                            even: T.let = heads.chunk(row, chunk % Q_CHUNKS * 2, head % 8)
                            odd: T.let = heads.chunk(row, chunk % Q_CHUNKS * 2 + 1, head % 8)
                            T.evaluate(call("put_even_odd", even, odd, T.address_of(words[p * 8]), dtype="void"))
                    else:
                        to: T.let = heads.chunk(i * rows + head, chunk % Q_CHUNKS, head % 8)
                        T.evaluate(call("copy_16", to, at, K_WIDTH, head < h_idx, dtype="void"))

        if from_tile < to_tile:
            # The wait for the first tile includes the copies of queries. Conversions overlap with the copies of keys.
            if not CONVERTED:
                for i in T.serial(count):
                    fetch_query(i)
            for t in T.unroll(AHEAD):
                fetch(from_tile + t)
            if CONVERTED:
                for i in T.serial(count):
                    fetch_query(i)
            for i in T.serial(count):
                sums.take_weights(W, first + i, i)
        if fill == 1:
            before: T.let = from_tile * KEYS
            outside: T.let = before + T.max(length - to_tile * KEYS, 0)
            for i in T.serial(count):
                for e in T.serial((outside + (THREADS - 1)) // THREADS):
                    at: T.let = e * THREADS + tx
                    if at < outside:
                        key: T.let = base + T.Select(at < before, at, at + (to_tile - from_tile) * KEYS)
                        OUT[row0 + first - m0 + i, key] = -T.infinity("float32")
        for t in T.serial(to_tile - from_tile):
            tile: T.let = from_tile + t
            T.evaluate(call("cp_async_wait", AHEAD - 1, dtype="void"))
            T.tvm_storage_sync("shared")
            scores.take_keys(tile % STAGES * KEYS)
            if Scores.HELD:
                T.tvm_storage_sync("shared")
            if Scores.HELD or STAGES > 1:
                # Copy to a place that all threads have left.
                fetch(tile + AHEAD)
            # Of four neighbouring groups of 8 keys, lane l has the keys l / 4 of group l % 4.
            own: T.let = tile * KEYS + (scores.warp * (KEY_TILES * 2) + scores.lane % 4) * 8 + scores.lane // 4
            for q in T.unroll(OWN):
                scale[q] = T.float32(1)
                if scaled == 1 and own + q * 32 < length:
                    scale[q] = SCALE[base + own + q * 32]
            for i in T.serial(count):
                begin: T.let = clamp(KS[first + i], base, base + length) - base
                end: T.let = clamp(KE[first + i], base, base + length) - base
                sums.clear()
                # Skip a tile that only other queries of the block see.
                if begin - tile * KEYS < KEYS and tile * KEYS < end:
                    for g in T.serial(groups):
                        scores.score(i * PLANES * rows + g * GROUP, rows)
                        sums.add(scores, i, g * GROUP)
                    sums.finish()
                for q in T.unroll(OWN):
                    at: T.let = own + q * 32
                    if at < length and scores.lane % 4 < KEY_TILES * 2:
                        if begin <= at and at < end:
                            OUT[row0 + first - m0 + i, base + at] = sums.part[q * 4] * scale[q]
                        elif fill == 1:
                            OUT[row0 + first - m0 + i, base + at] = -T.infinity("float32")
            if not Scores.HELD and STAGES == 1:
                T.tvm_storage_sync("shared")
                fetch(tile + 1)

    return lightning_indexer
