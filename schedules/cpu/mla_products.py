"""How the CPU sparse attention multiplies: in f32, or with the bf16 dot products of AVX512-BF16.

`products_of` picks the class. Both own the packed queries, keys and values of a task. They add the products of a
register tile to its accumulators, which are f32 in either case.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .elements import CHAIN, STEP, f32_bits, narrow, widen
from .products import BF16X16, bf16_dot, bf16_twice, with_bf16_dot

#: The half of an f32 that is a bf16.
_UPPER = 0xFFFF0000


def products_of(dots: str | None):
    """The class that multiplies with the dot products of this name, or in f32."""
    return {None: FloatProducts, BF16X16: Bf16Products}[dots]


@T.meta_class
class FloatProducts:
    """Multiply-adds in f32: a key's element broadcast times a vector of heads, a weight broadcast times values.

    Parameters
    ----------
    c : Decisions
    dtype : str
        Element type of q and out.
    heads : tuple of expression
        The heads [h0, h1) of the task.
    widths : tuple of expression
        d_qk and d_v.
    """

    #: Heads that a tile of scores has a multiple of.
    lanes = 8

    @staticmethod
    def check(c: Any) -> None:
        """Nothing: it takes all decisions."""

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        """The kernel with what its products need."""
        return kernel

    def __init__(self, c, dtype: str, heads, widths) -> None:
        self.c, self.dtype, self.d_qk, self.d_v = c, dtype, *widths
        self.h0, self.h1 = heads
        self.blocks = (self.h1 - self.h0 + c.heads - 1) // c.heads
        self.queries = T.sblock_alloc_buffer((self.blocks, self.d_qk, c.heads), "float32")
        self.keys = T.sblock_alloc_buffer((c.block_keys, self.d_qk), "float32")

    def score(self, total, sm_scale):
        """What a sum of products makes a score."""
        return total

    @T.inline
    def put_queries(self, q, m, sm_scale):
        # Heads past h1 are zero queries: their scores are finite, and nothing of them is stored.
        for hb, d, h in T.grid(self.blocks, self.d_qk, self.c.heads):
            if self.h0 + hb * self.c.heads + h < self.h1:
                self.queries[hb, d, h] = widen(q[m, self.h0 + hb * self.c.heads + h, d], self.dtype) * sm_scale
            else:
                self.queries[hb, d, h] = T.float32(0)

    @T.inline
    def put_nothing(self, at):
        for d in T.serial(self.d_qk // STEP):
            for l in T.vectorized(STEP):
                self.keys[at, d * STEP + l] = T.float32(0)

    @T.inline
    def put_weights(self, weights, keys, heads):
        """Make the weights of the block's keys ready, for the first `heads` heads."""

    @T.inline
    def add_scores(self, acc, hb, first, part):
        for d in T.serial(part * (CHAIN // self.c.unroll_d), T.min((part + 1) * CHAIN, self.d_qk) // self.c.unroll_d):
            for u in T.unroll(self.c.unroll_d):
                for j in T.unroll(acc.shape[0]):
                    for h in T.vectorized(acc.shape[1]):
                        acc[j, h] = (
                            acc[j, h]
                            + self.keys[first + j, d * self.c.unroll_d + u]
                            * self.queries[hb, d * self.c.unroll_d + u, h]
                        )

    @T.inline
    def add_values(self, tile, weights, keys, head, value):
        for j in T.serial(keys):
            for r in T.unroll(self.c.tile_heads):
                for l in T.vectorized(self.c.values):
                    tile[r, l] = tile[r, l] + weights[j, head + r] * self.keys[j, value + l]

    @T.inline
    def store(self, out, m, head, sums, h, divisor):
        for d in T.serial(self.d_v // STEP):
            for l in T.vectorized(STEP):
                out[m, head, d * STEP + l] = narrow(sums[h, d * STEP + l] / divisor, self.dtype)


@T.meta_class
class Bf16Products(FloatProducts):
    """Dot products of pairs of bf16.

    A score's pairs run along d_qk: a key's pair is broadcast, times a vector of 16 heads' pairs. Both operands are the
    caller's bf16, so products are exact, and the scale multiplies their sum. One bf16 is too coarse for a weight where
    few keys count, so a weight is the sum of two. They are the output's pair: it is broadcast, times a vector of 16
    values, each twice.

    The processor takes subnormal bf16 for 0, makes subnormal sums 0, and rounds each addition to nearest even, whatever
    mode the caller has set.
    """

    lanes = 16

    @staticmethod
    def check(c: Any) -> None:
        """Raise ValueError for decisions that bf16 dot products cannot have."""
        if c.heads % 16 or c.values % 16 or STEP // 2 % c.unroll_d:
            raise ValueError(f"sparse_mla: decisions that do not divide for bf16 dot products: {c}")

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_bf16_dot(kernel)

    def __init__(self, c, dtype: str, heads, widths) -> None:
        self.c, self.dtype, self.d_qk, self.d_v = c, dtype, *widths
        self.h0, self.h1 = heads
        self.blocks = (self.h1 - self.h0 + c.heads - 1) // c.heads
        self.queries = T.sblock_alloc_buffer((self.blocks, self.d_qk // 2, c.heads), "uint32")
        self.keys = T.sblock_alloc_buffer((c.block_keys, self.d_qk), "uint16")
        self.weights = T.sblock_alloc_buffer((c.block_keys, c.heads), "uint32")

    def score(self, total, sm_scale):
        return total * sm_scale

    def pair(self, row, d):
        """Two neighbouring elements of a key as a u32."""
        return T.reinterpret("uint32", self.keys[row, T.Ramp(2 * d, 1, 2)])

    def rest(self, weight):
        """The bits of what a weight is above the bf16 that it begins with."""
        bits = T.reinterpret("uint32", weight)
        # Rounded by the addition: the weights are not negative, and a NaN is one by its first part.
        return T.reinterpret("uint32", weight - f32_bits(bits & T.uint32(_UPPER))) + T.uint32(0x8000)

    @T.inline
    def put_queries(self, q, m, sm_scale):
        # Heads past h1 are zero, as in f32.
        for hb, d, h in T.grid(self.blocks, self.d_qk // 2, self.c.heads):
            if self.h0 + hb * self.c.heads + h < self.h1:
                self.queries[hb, d, h] = T.reinterpret(
                    "uint32", q[m, self.h0 + hb * self.c.heads + h, T.Ramp(2 * d, 1, 2)]
                )
            else:
                self.queries[hb, d, h] = T.uint32(0)

    @T.inline
    def put_nothing(self, at):
        for d in T.serial(self.d_qk // STEP):
            for l in T.vectorized(STEP):
                self.keys[at, d * STEP + l] = T.uint16(0)

    @T.inline
    def put_weights(self, weights, keys, heads):
        for j in T.serial(keys):
            for h in T.vectorized(heads):
                self.weights[j, h] = (T.reinterpret("uint32", weights[j, h]) >> T.uint32(16)) | (
                    self.rest(weights[j, h]) & T.uint32(_UPPER)
                )

    @T.inline
    def add_scores(self, acc, hb, first, part):
        for d in T.serial(
            part * (CHAIN // 2 // self.c.unroll_d), T.min((part + 1) * CHAIN, self.d_qk) // 2 // self.c.unroll_d
        ):
            for u in T.unroll(self.c.unroll_d):
                for j in T.unroll(acc.shape[0]):
                    for g in T.unroll(acc.shape[1] // 16):
                        acc[j, T.Ramp(16 * g, 1, 16)] = bf16_dot(
                            acc[j, T.Ramp(16 * g, 1, 16)],
                            self.pair(first + j, d * self.c.unroll_d + u),
                            self.queries[hb, d * self.c.unroll_d + u, T.Ramp(16 * g, 1, 16)],
                        )

    @T.inline
    def add_values(self, tile, weights, keys, head, value):
        for j in T.serial(keys):
            for g in T.unroll(self.c.values // 16):
                for r in T.unroll(self.c.tile_heads):
                    tile[r, T.Ramp(16 * g, 1, 16)] = bf16_dot(
                        tile[r, T.Ramp(16 * g, 1, 16)],
                        self.weights[j, head + r],
                        bf16_twice(self.keys[j, T.Ramp(value + 16 * g, 1, 16)]),
                    )
