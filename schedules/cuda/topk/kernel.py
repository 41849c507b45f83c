"""The CUDA token selector: one read of the row against a threshold guessed from a sample.

A block takes a row. By an exact selection from an evenly spread sample it guesses a threshold that a little more than
topk keys reach. One pass over the row compacts these keys into a list in shared memory, in index order, and the exact
selection is made there. A short row fits into the list as a whole. If the guess was wrong, so that there are too few
keys or more than the list holds, the selection is made on the row in global memory. That is slower but always possible,
so no key is ever dropped.

If there are few long rows, they are cut into parts with a block for each. A block writes the topk values and positions
of its part, and a merge selects from those of all parts. A part keeps the lower index of a tie, and the parts are in
index order, so the merge resolves ties correctly.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from ..emit import Place, SharedPool, call, shared
from .keys import ListKeys, RowKeys, key_of, value_of
from .select import Selector, selector_bytes

MAX_TOPK = 4096
STAGES = ("rows", "parts", "merge")


@dataclass(frozen=True)
class Decisions:
    """The decisions of a search.

    Parameters
    ----------
    threads : int
        Threads of a block: 256, 512 or 1024.
    sample : int
        Keys the threshold is guessed from; a multiple of 4, at most the list's capacity.
    list_factor : int
        The list holds this many times topk keys, between `list_min` and `list_max`.
    list_min, list_max : int
        Multiples of 4.

    Raises
    ------
    ValueError
        A decision is out of bounds, or not a multiple of what it has to be.
    """

    threads: int
    sample: int
    list_factor: int
    list_min: int
    list_max: int

    def __post_init__(self) -> None:
        if self.threads not in (256, 512, 1024) or self.sample % 4 or self.list_min % 4 or self.list_max % 4:
            raise ValueError(f"topk: decisions that do not divide: {self}")
        if not 0 < self.sample <= self.list_min <= self.list_max or self.list_max < MAX_TOPK:
            raise ValueError(f"topk: a sample or list out of bounds: {self}")

    def capacity(self, topk: int) -> int:
        """Keys the list holds."""
        return min(max(self.list_factor * topk, self.list_min), self.list_max) // 4 * 4

    def shared_bytes(self, topk: int) -> int:
        """Shared memory of a launch."""
        return selector_bytes() + 8 * self.capacity(topk)


DEFAULT = {"cuda": Decisions(threads=512, sample=4096, list_factor=4, list_min=4096, list_max=10240)}


def choices(target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision that are worth trying on `target`."""
    return {
        "threads": (256, 512, 1024),
        "sample": (1024, 2048, 4096),
        "list_factor": (2, 3, 4, 6),
        "list_min": (4096, 8192),
        "list_max": (8192, 10240),
    }


def tensor_ir(variant: dict[str, str], c: Decisions, stage: str = "rows") -> tirx.PrimFunc:
    """The kernel of one stage. The grid is (rows, parts).

    Parameters
    ----------
    variant : dict
        Empty: logits are f32.
    c : Decisions
    stage : str
        ``rows`` selects from rows of logits; ``parts`` does so from a part of each row and keeps the values;
        ``merge`` selects from those values.

    Returns
    -------
    PrimFunc
        ``(logits, ks, ke, positions, values, indices, s_kv, topk, capacity, rows, parts)``. Every pointer is that
        of the grid's first row. `positions` (merge alone) are the indices that the values in `logits` came from;
        `values` (parts alone) receives what was selected; `ks` and `ke` are not read by merge. Of parts, row m writes
        rows ``m * parts`` and following of `values` and `indices`.
    """
    if stage not in STAGES:
        raise ValueError(f"topk: no stage {stage}")
    THREADS = c.threads
    GROUPS = c.sample // 4

    @T.prim_func(s_tir=True)
    def select_rows(
        logits: T.handle("float32"),
        ks: T.handle("int32"),
        ke: T.handle("int32"),
        positions: T.handle("int32"),
        values: T.handle("float32"),
        indices: T.handle("int32"),
        s_kv: T.int64,
        topk: T.int64,
        capacity: T.int32,
        rows: T.int64,
        parts: T.int64,
    ):
        row = T.launch_thread("blockIdx.x", rows)
        part = T.launch_thread("blockIdx.y", parts)
        tx = T.launch_thread("threadIdx.x", THREADS)
        X = T.decl_buffer((rows, s_kv), "float32", data=logits)
        KS = T.decl_buffer((rows,), "int32", data=ks)
        KE = T.decl_buffer((rows,), "int32", data=ke)
        POSITIONS = T.decl_buffer((rows, s_kv), "int32", data=positions)
        VALUES = T.decl_buffer((rows * parts, topk), "float32", data=values)
        OUT = T.decl_buffer((rows * parts, topk), "int32", data=indices)
        pool = T.alloc_buffer((0,), "uint8", scope="shared.dyn")
        places = T.meta_var(SharedPool())
        best = Selector(pool, places, tx, THREADS)
        list_key = shared(pool, places.place((capacity,), "uint32"))
        # Behind the keys, whose number the launch decides.
        list_index = shared(pool, Place((capacity,), "int32", places.bytes // 4 + capacity))
        k: T.let = T.Cast("int32", topk)
        first = T.local_scalar("int64")
        last = T.local_scalar("int64")
        first = T.int64(0)
        last = s_kv
        if stage != "merge":
            first = T.max(T.Cast("int64", KS[row]), T.int64(0))
            last = T.min(T.Cast("int64", KE[row]), s_kv)
        if stage == "parts":
            length: T.let = T.max(last - first, T.int64(0)) // parts + 1
            first = first + length * part
            last = T.min(last, first + length)
        start: T.let = first
        stop: T.let = last
        # Tiles begin at a boundary of 16 bytes, so that all quads but the outermost are loaded at once.
        origin: T.let = start - T.Cast("int64", call("behind_16", T.address_of(X[row, start])))
        of_row = RowKeys(best, T.address_of(X[row, 0]), start, stop, origin)
        of_list = ListKeys(best, list_key)
        row_tiles: T.let = T.Cast("int32", best.tiles(T.max(stop - origin, T.int64(0))))

        @T.inline
        def emit(place, key, index):
            if stage == "merge":
                OUT[row, place] = POSITIONS[row, index]
            elif stage == "parts":
                OUT[row * parts + part, place] = index
                VALUES[row * parts + part, place] = value_of(key)
            else:
                OUT[row, place] = index

        @T.inline
        def row_to_list(place, key, at):
            if place < capacity:
                list_key[place] = key
                list_index[place] = T.Cast("int32", origin) + at

        @T.inline
        def list_to_out(place, key, at):
            emit(place, key, list_index[at])

        @T.inline
        def row_to_out(place, key, at):
            emit(place, key, T.Cast("int32", origin) + at)

        best.bound = T.uint32(0)
        best.ties = 0
        if stop - start > T.Cast("int64", capacity):
            quads: T.let = (stop - origin) // 4
            for g in T.serial((GROUPS + THREADS - 1) // THREADS):
                group: T.let = g * THREADS + tx
                if group < GROUPS:
                    of_row.load(0, T.Cast("int64", group) * quads // GROUPS * 4)
                    for e in T.unroll(4):
                        of_list.quad[e] = key_of(of_row.quad[0, e])
                    to: T.let = T.address_of(list_key[group * 4])
                    T.evaluate(call("put_4x32", to, T.address_of(of_list.quad[0]), dtype="void"))
            T.tvm_storage_sync("shared")
            of_list.used = c.sample
            # The keys of the sample that are expected among the topk, and three standard deviations more.
            share: T.let = T.Cast("float32", topk) * T.float32(c.sample) / T.Cast("float32", stop - start)
            expected: T.let = T.Cast("int32", share + T.float32(3) * T.sqrt(share)) + 8
            best.select(of_list, best.tiles(c.sample), expected)
            # The sample does not tell how many keys of the row equal the bound, so take all of them.
            if best.ties > 0:
                best.bound = best.bound - T.uint32(1)
                best.ties = 0
        best.compact(of_row, row_tiles, capacity + 1, row_to_list)
        T.tvm_storage_sync("shared")
        if best.passed <= capacity and (best.passed >= k or best.bound == T.uint32(0)):
            of_list.used = best.passed
            best.bound = T.uint32(0)
            best.ties = 0
            if of_list.used > k:
                best.select(of_list, best.tiles(of_list.used), k)
            best.compact(of_list, best.tiles(of_list.used), k, list_to_out)
        else:
            best.select(of_row, row_tiles, k)
            best.compact(of_row, row_tiles, k, row_to_out)
        for j in T.serial((k - best.passed + THREADS - 1) // THREADS):
            place: T.let = best.passed + j * THREADS + tx
            if place < k:
                OUT[row * parts + part, place] = -1
                if stage == "parts":
                    VALUES[row * parts + part, place] = T.reinterpret("float32", T.uint32(0x7FFFFFFF))

    return select_rows
