"""The CPU token selector: one vectorized scan against a threshold.

A buffer holds the best keys so far. Once it is full, its topk-th value is a lower bound for that of the row. So the
scan only looks for larger values, a vector at a time, and most vectors hold none. A full buffer is cut back to its topk
best keys, and the threshold rises. A long row starts with a threshold that is guessed from a sample, a little below the
expected one. If fewer than topk keys exceed it, the row is done again without a guess.

A cut finds the exact topk-th value bit by bit. Counting is a vector loop, needs no histogram, and takes the same time
for any data. Everything stays in index order, so that lower indices are kept among equal values and the result is
ascending. In the worst case, a row in ascending order, there is a cut for every `slack` keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from .elements import is_nan

LANES = 16
INT32_MIN = -(2**31)


@dataclass(frozen=True)
class Decisions:
    """The decisions of a search.

    Parameters
    ----------
    slack : int
        How many candidates more than topk the buffer takes before it is cut.
    scan : int
        Keys that the scan compares before it asks whether any was larger; a multiple of 16.
    sample : int
        Keys from which the first threshold of a row is guessed; a multiple of 16, at most `slack`.

    Raises
    ------
    ValueError
        A decision is not a multiple of what it has to be, or `sample` exceeds `slack`.
    """

    slack: int
    scan: int
    sample: int

    def __post_init__(self) -> None:
        if self.scan % LANES or self.sample % LANES or self.sample > self.slack:
            raise ValueError(f"topk: decisions that do not divide: {self}")


DEFAULT = {
    target: Decisions(slack=2048, scan=64, sample=2048) for target in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64")
}


def choices(target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision that are worth trying on `target`."""
    return {
        "slack": (256, 512, 1024, 2048, 4096, 8192),
        "scan": (16, 32, 48, 64, 96, 128, 256),
        "sample": (128, 256, 512, 1024, 2048, 4096, 8192),
    }


# What is done with the next piece of a row.
SAMPLE, FILL, SCAN = 0, 1, 2


def order(x):
    """An int32 that sorts like the f32 `x`, with -0 equal to +0."""
    bits = T.reinterpret("int32", x)
    # The bits of negative numbers sort in reverse, so flip all but the sign. -0 would be below +0.
    return T.Select(x == T.float32(0), T.int32(0), bits ^ ((bits >> 31) & T.int32(0x7FFFFFFF)))


def tensor_ir(variant: dict[str, str], c: Decisions) -> tirx.PrimFunc:
    """Make the kernel for the rows [m0, m1).

    Parameters
    ----------
    variant : dict
        Empty: logits are f32.
    c : Decisions

    Returns
    -------
    PrimFunc
        Its parameters are ``(logits, ks, ke, indices, m0, m1, row0, out0)``. Query m reads row ``m - m0 + row0`` of
        logits and writes row ``m - m0 + out0`` of indices.
    """
    s_q, s_kv, s_rows, s_out, topk = (tirx.Var(n, "int64") for n in ("s_q", "s_kv", "s_rows", "s_out", "topk"))
    STEP = c.scan
    capacity = (topk + c.slack + STEP + LANES - 1) // LANES * LANES

    @T.prim_func(s_tir=True)
    def topk_rows(
        logits: T.handle,
        ks: T.handle,
        ke: T.handle,
        indices: T.handle,
        m0: T.int64,
        m1: T.int64,
        row0: T.int64,
        out0: T.int64,
    ):
        T.func_attr({"tirx.noalias": True})
        X = T.match_buffer(logits, (s_rows, s_kv), "float32", align=4)
        KS = T.match_buffer(ks, (s_q,), "int32", align=4)
        KE = T.match_buffer(ke, (s_q,), "int32", align=4)
        OUT = T.match_buffer(indices, (s_out, topk), "int32", align=4)
        with T.sblock("task"):
            T.reads()
            T.writes()
            # One more than is kept: the append has no branch, so it writes before it knows whether the key stays.
            value = T.sblock_alloc_buffer((capacity + 1,), "float32")
            index = T.sblock_alloc_buffer((capacity + 1,), "int32")
            rank = T.sblock_alloc_buffer((capacity,), "int32")
            hits = T.sblock_alloc_buffer((LANES,), "int32", scope="local")
            count = T.sblock_alloc_buffer((LANES,), "int32", scope="local")
            used = T.sblock_alloc_buffer((1,), "int64", scope="local")
            bound = T.sblock_alloc_buffer((1,), "float32", scope="local")
            phase = T.sblock_alloc_buffer((1,), "int32", scope="local")
            guessed = T.sblock_alloc_buffer((1,), "int32", scope="local")
            at = T.sblock_alloc_buffer((1,), "int64", scope="local")
            wanted = T.sblock_alloc_buffer((1,), "int64", scope="local")
            cut = T.sblock_alloc_buffer((1,), "int32", scope="local")
            exact = T.sblock_alloc_buffer((1,), "int32", scope="local")
            ties = T.sblock_alloc_buffer((1,), "int64", scope="local")
            kept = T.sblock_alloc_buffer((1,), "int64", scope="local")
            bit = T.sblock_alloc_buffer((1,), "int32", scope="local")
            for i in T.serial(m1 - m0):
                start: T.let = T.max(T.Cast("int64", KS[m0 + i]), T.int64(0))
                stop: T.let = T.min(T.Cast("int64", KE[m0 + i]), s_kv)
                used[0] = T.int64(0)
                bound[0] = -T.infinity("float32")
                guessed[0] = 0
                phase[0] = T.Select(stop - start > topk + c.slack, SAMPLE, FILL)
                at[0] = start
                while at[0] < stop:
                    wanted[0] = topk
                    if phase[0] == SAMPLE:
                        # How many keys of the sample are expected among the topk, plus three standard deviations.
                        share: T.let = T.Cast("float32", topk) * T.float32(c.sample) / T.Cast("float32", stop - start)
                        expected: T.let = T.Cast("int64", share + T.float32(3) * T.sqrt(share)) + T.int64(8)
                        wanted[0] = T.min(expected, T.int64(c.sample))
                        for j in T.serial(c.sample):
                            x: T.let = X[row0 + i, start + j * ((stop - start) // c.sample)]
                            value[j] = T.Select(is_nan(x), -T.infinity("float32"), x)
                        used[0] = T.int64(c.sample)
                    if phase[0] == FILL:
                        first: T.let = T.min(stop - at[0], topk + c.slack - used[0])
                        for j in T.serial(first):
                            x: T.let = X[row0 + i, at[0] + j]
                            value[used[0]] = x
                            index[used[0]] = T.Cast("int32", at[0] + j)
                            used[0] = used[0] + T.Select(is_nan(x), T.int64(0), T.int64(1))
                        at[0] = at[0] + first
                    if phase[0] == SCAN:
                        while at[0] < stop and used[0] < topk + c.slack:
                            width: T.let = T.min(stop - at[0], T.int64(STEP))
                            if width == T.int64(STEP):
                                for l in T.vectorized(LANES):
                                    hits[l] = 0
                                for p in T.unroll(STEP // LANES):
                                    for l in T.vectorized(LANES):
                                        hits[l] = hits[l] | T.Select(
                                            X[row0 + i, at[0] + p * LANES + l] > bound[0], T.int32(1), T.int32(0)
                                        )
                                for l in T.vectorized(8):
                                    hits[l] = hits[l] | hits[l + 8]
                                for l in T.vectorized(4):
                                    hits[l] = hits[l] | hits[l + 4]
                                for l in T.vectorized(2):
                                    hits[l] = hits[l] | hits[l + 2]
                            else:
                                hits[0] = 1
                                hits[1] = 1
                            if (hits[0] | hits[1]) != 0:
                                for j in T.serial(width):
                                    x: T.let = X[row0 + i, at[0] + j]
                                    value[used[0]] = x
                                    index[used[0]] = T.Cast("int32", at[0] + j)
                                    used[0] = used[0] + T.Select(x > bound[0], T.int64(1), T.int64(0))
                            at[0] = at[0] + width
                    if phase[0] == SAMPLE or (used[0] > topk and (at[0] >= stop or used[0] >= topk + c.slack)):
                        padded: T.let = (used[0] + LANES - 1) // LANES
                        for j in T.serial(padded * LANES - used[0]):
                            value[used[0] + j] = -T.infinity("float32")
                        for j in T.serial(padded):
                            for l in T.vectorized(LANES):
                                rank[j * LANES + l] = order(value[j * LANES + l])
                        for j in T.serial(padded * LANES - used[0]):
                            rank[used[0] + j] = T.int32(INT32_MIN)
                        # Find the largest value that at least that many ranks reach, from the sign bit down.
                        cut[0] = T.int32(INT32_MIN)
                        exact[0] = 0
                        bit[0] = 32
                        while bit[0] > 0:
                            bit[0] = bit[0] - 1
                            trial: T.let = cut[0] ^ (T.int32(1) << bit[0])
                            for l in T.vectorized(LANES):
                                count[l] = 0
                            for j in T.serial(padded):
                                for l in T.vectorized(LANES):
                                    count[l] = count[l] + T.Select(rank[j * LANES + l] >= trial, T.int32(1), T.int32(0))
                            for l in T.vectorized(8):
                                count[l] = count[l] + count[l + 8]
                            for l in T.vectorized(4):
                                count[l] = count[l] + count[l + 4]
                            reached: T.let = T.Cast("int64", (count[0] + count[1]) + (count[2] + count[3]))
                            if reached >= wanted[0]:
                                cut[0] = trial
                            if reached == wanted[0]:
                                exact[0] = 1
                                bit[0] = 0
                        kept[0] = T.int64(0)
                        if phase[0] != SAMPLE:
                            if exact[0] == 1:
                                for j in T.serial(used[0]):
                                    r: T.let = rank[j]
                                    value[kept[0]] = value[j]
                                    index[kept[0]] = index[j]
                                    kept[0] = kept[0] + T.Select(r >= cut[0], T.int64(1), T.int64(0))
                            else:
                                # More keys equal the cut than there is room for, so the first ones stay.
                                ties[0] = topk
                                for j in T.serial(used[0]):
                                    ties[0] = ties[0] - T.Select(rank[j] > cut[0], T.int64(1), T.int64(0))
                                for j in T.serial(used[0]):
                                    r: T.let = rank[j]
                                    tie: T.let = T.Select(r == cut[0] and ties[0] > T.int64(0), T.int64(1), T.int64(0))
                                    value[kept[0]] = value[j]
                                    index[kept[0]] = index[j]
                                    kept[0] = kept[0] + T.Select(r > cut[0], T.int64(1), tie)
                                    ties[0] = ties[0] - tie
                        guessed[0] = T.Select(phase[0] == SAMPLE, T.int32(1), T.int32(0))
                        used[0] = kept[0]
                        # A guess is the value just below that of the sample, so that equal keys are found too. Just
                        # below zero that is not -0, which equals zero.
                        cut[0] = cut[0] - guessed[0] * T.Select(cut[0] == 0, T.int32(2), T.int32(1))
                        bound[0] = T.reinterpret("float32", cut[0] ^ ((cut[0] >> 31) & T.int32(0x7FFFFFFF)))
                        phase[0] = SCAN
                    if at[0] >= stop and guessed[0] == 1 and used[0] < topk:
                        at[0] = start
                        used[0] = T.int64(0)
                        guessed[0] = 0
                        phase[0] = FILL
                for j in T.serial(used[0]):
                    OUT[out0 + i, j] = index[j]
                for j in T.serial(topk - used[0]):
                    OUT[out0 + i, used[0] + j] = -1

    return topk_rows
