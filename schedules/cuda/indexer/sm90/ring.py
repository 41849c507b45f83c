"""Copies keys and queries of the sm_90a indexer to shared memory."""

from __future__ import annotations

from tvm.script import tirx as T

from .....spec import ELEMENT_BYTES
from ...emit import WARP, SharedPool, call, shared
from .decisions import Decisions, span


@T.meta_class
class Ring:
    """Tiles of keys on their way through stages of shared memory, and the queries, which come once.

    Rows are cut into blocks of `span` bytes, each a matrix of its own: of 8 rows, 16 bytes number c of row r lie at
    c ^ r (with 128 bytes to a row), as bulk copies write and wgmma reads them.

    Parameters
    ----------
    pool : Buffer
    places : SharedPool
    c : Decisions
    variant : dict
    d_idx : int
    """

    def __init__(self, pool, places: SharedPool, c: Decisions, variant: dict[str, str], d_idx: int) -> None:
        self.keys, self.columns, self.parts, self.stages = c.block_keys, c.columns, c.parts, c.stages
        self.warps = c.warpgroups * 4
        self.span = span(variant, d_idx)
        self.elements = self.span // ELEMENT_BYTES[variant["K"]]
        self.blocks = d_idx // self.elements
        self.descriptor = f"descriptor<{self.span}>"
        self.row_bytes = self.blocks * self.span
        self.queries = shared(pool, places.place((c.parts, self.blocks, c.columns, self.span), "uint8", 1024))
        self.tiles = shared(pool, places.place((c.stages, self.blocks, c.block_keys, self.span), "uint8", 1024))
        self.full = shared(pool, places.place((c.stages,), "uint64", 8))
        self.empty = shared(pool, places.place((c.stages,), "uint64", 8))
        self.ready = shared(pool, places.place((1,), "uint64", 8))

    @T.inline
    def begin(self):
        """By one thread, before a barrier of the block."""
        for s in T.unroll(self.stages):
            T.evaluate(call("mbarrier_init", T.address_of(self.full[s]), 1, dtype="void"))
            T.evaluate(call("mbarrier_init", T.address_of(self.empty[s]), self.warps, dtype="void"))
        T.evaluate(call("mbarrier_init", T.address_of(self.ready[0]), 1, dtype="void"))
        T.evaluate(call("mbarrier_fence", dtype="void"))

    @T.inline
    def bring_queries(self, q_map, first, heads):
        """By one thread: the heads of the block's queries, from query `first` on; zeros for what is not there."""
        bar: T.let = T.address_of(self.ready[0])
        T.evaluate(call("mbarrier_expect", bar, self.parts * self.columns * self.row_bytes, dtype="void"))
        for p in T.unroll(self.parts):
            for b in T.unroll(self.blocks):
                to: T.let = T.address_of(self.queries[p, b, 0, 0])
                query: T.let = first + p * (self.columns // heads)
                T.evaluate(call("tma_load_3d", to, q_map, bar, b * self.elements, 0, query, dtype="void"))

    @T.inline
    def bring_keys(self, k_map, t, key):
        """By the same thread: the run's tile number `t`, the keys from `key` on, as soon as its stage is left."""
        s: T.let = t % self.stages
        bar: T.let = T.address_of(self.full[s])
        # The first round finds all stages left.
        T.evaluate(call("mbarrier_wait", T.address_of(self.empty[s]), t // self.stages % 2 ^ 1, dtype="void"))
        T.evaluate(call("mbarrier_expect", bar, self.keys * self.row_bytes, dtype="void"))
        for b in T.unroll(self.blocks):
            to: T.let = T.address_of(self.tiles[s, b, 0, 0])
            T.evaluate(call("tma_load_2d", to, k_map, bar, b * self.elements, key, dtype="void"))

    @T.inline
    def wait_queries(self):
        T.evaluate(call("mbarrier_wait", T.address_of(self.ready[0]), 0, dtype="void"))

    @T.inline
    def wait_keys(self, t):
        bar: T.let = T.address_of(self.full[t % self.stages])
        T.evaluate(call("mbarrier_wait", bar, t // self.stages % 2, dtype="void"))

    @T.inline
    def leave(self, t, tx):
        """By every warp of the consumers, with the products of its keys complete."""
        if tx % WARP == 0:
            T.evaluate(call("mbarrier_arrive", T.address_of(self.empty[t % self.stages]), dtype="void"))
