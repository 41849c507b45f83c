"""How the CPU sparse attention multiplies: in f32, or in bf16 with the products of AVX512-BF16, AMX or Arm.

`products_of` picks the class. Each owns the packed queries, keys and values of a task. They add the products of a
register tile to its accumulators, which are f32 in any case.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from . import amx
from .elements import CHAIN, STEP, f32_bits, narrow, widen
from .products import (
    AMX,
    BF16X2X2,
    BF16X16,
    bf16_dot,
    bf16_twice,
    matrix,
    place,
    settle,
    with_bf16_dot,
    with_ir,
    with_matrix,
)

#: The half of an f32 that is a bf16.
_UPPER = 0xFFFF0000

#: Rows of a product of matrices, two of them in <2 x i64>, from eight bf16 each of two keys. For scores, four of each
#: key, the lower or the upper ones. For the output, the numbers of both keys at one of the values, twice, and the same
#: at the next one: of values 0 and 1, 2 and 3, 4 and 5, or 6 and 7.
_KEYS, _VALUES = "dsa_matrix_keys", "dsa_matrix_values"


def _both(first: int) -> str:
    """The mask of four elements of two vectors of eight, in turns."""
    return ", ".join(f"i32 {first + i + of}" for i in range(4) for of in (0, 8))


#: The part is a constant once the loops around are unrolled. The CPU has each shuffle as a ``zip``.
_ROWS_IR = f"""
define linkonce_odr hidden <2 x i64> @{_KEYS}(i32 %part, <8 x i16> %a, <8 x i16> %b) #0 {{
  %x = bitcast <8 x i16> %a to <2 x i64>
  %y = bitcast <8 x i16> %b to <2 x i64>
  %lower = shufflevector <2 x i64> %x, <2 x i64> %y, <2 x i32> <i32 0, i32 2>
  %upper = shufflevector <2 x i64> %x, <2 x i64> %y, <2 x i32> <i32 1, i32 3>
  %first = icmp eq i32 %part, 0
  %r = select i1 %first, <2 x i64> %lower, <2 x i64> %upper
  ret <2 x i64> %r
}}
define linkonce_odr hidden <2 x i64> @{_VALUES}(i32 %part, <8 x i16> %a, <8 x i16> %b) #0 {{
  %lower = shufflevector <8 x i16> %a, <8 x i16> %b, <8 x i32> <{_both(0)}>
  %upper = shufflevector <8 x i16> %a, <8 x i16> %b, <8 x i32> <{_both(4)}>
  %half = icmp ult i32 %part, 2
  %x = select i1 %half, <8 x i16> %lower, <8 x i16> %upper
  %y = bitcast <8 x i16> %x to <4 x i32>
  %begin = shufflevector <4 x i32> %y, <4 x i32> poison, <4 x i32> <i32 0, i32 0, i32 1, i32 1>
  %end = shufflevector <4 x i32> %y, <4 x i32> poison, <4 x i32> <i32 2, i32 2, i32 3, i32 3>
  %odd = trunc i32 %part to i1
  %z = select i1 %odd, <4 x i32> %end, <4 x i32> %begin
  %r = bitcast <4 x i32> %z to <2 x i64>
  ret <2 x i64> %r
}}
"""


def _in_one(first, second):
    """The upper halves of two u32 as one: two bf16 by the bits of the f32 that begin with them."""
    return (first >> T.uint32(16)) | (second & T.uint32(_UPPER))


def products_of(dots: str | None):
    """The class that multiplies with the dot products of this name, or in f32."""
    return {None: FloatProducts, BF16X16: Bf16Products, AMX: AmxProducts, BF16X2X2: Bf16MatrixProducts}[dots]


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
    def begin(self):
        """Before the first product of a task."""

    @T.inline
    def end(self):
        """After its last product."""

    @T.inline
    def start(self, sums):
        """What the sums of a tile begin with."""
        for r in T.unroll(sums.shape[0]):
            for l in T.vectorized(sums.shape[1]):
                sums[r, l] = T.float32(0)

    @T.inline
    def put_values(self, keys):
        """Make the values of the block's keys ready, for all heads."""

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
    #: Entries of a query that a product takes at a time, what they are packed in, and so are weights.
    entries, packed = 2, "uint32"

    @staticmethod
    def check(c: Any) -> None:
        """Raise ValueError for decisions that bf16 dot products cannot have."""
        if c.heads % 16 or c.values % 16 or STEP // 2 % c.unroll_d:
            raise ValueError(f"sparse_mla: decisions that do not divide for bf16 dot products: {c}")

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_bf16_dot(kernel)

    @staticmethod
    def weight_shape(c):
        """Of the weights of a block of keys."""
        return c.block_keys, c.heads

    def __init__(self, c, dtype: str, heads, widths) -> None:
        self.c, self.dtype, self.d_qk, self.d_v = c, dtype, *widths
        self.h0, self.h1 = heads
        self.blocks = (self.h1 - self.h0 + c.heads - 1) // c.heads
        self.queries = T.sblock_alloc_buffer((self.blocks, self.d_qk // self.entries, c.heads), self.packed)
        self.keys = T.sblock_alloc_buffer((c.block_keys, self.d_qk), "uint16")
        self.weights = T.sblock_alloc_buffer(self.weight_shape(c), self.packed)

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
        for hb, d, h in T.grid(self.blocks, self.d_qk // self.entries, self.c.heads):
            if self.h0 + hb * self.c.heads + h < self.h1:
                self.queries[hb, d, h] = T.reinterpret(
                    self.packed, q[m, self.h0 + hb * self.c.heads + h, T.Ramp(self.entries * d, 1, self.entries)]
                )
            else:
                self.queries[hb, d, h] = tirx.const(0, self.packed)

    @T.inline
    def put_nothing(self, at):
        for d in T.serial(self.d_qk // STEP):
            for l in T.vectorized(STEP):
                self.keys[at, d * STEP + l] = T.uint16(0)

    @T.inline
    def put_weights(self, weights, keys, heads):
        for j in T.serial(keys):
            for h in T.vectorized(heads):
                self.weights[j, h] = _in_one(T.reinterpret("uint32", weights[j, h]), self.rest(weights[j, h]))

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


@T.meta_class
class AmxProducts(Bf16Products):
    """Tiles of bf16.

    Scores are those of 16 keys by 16 heads, and take 32 elements at a time. Queries are packed as for `Bf16Products`.
    Outputs are those of 16 heads by 16 values. They take pairs of keys, whose weights are two bf16 here too: first the
    products of the upper ones of 32 keys, then those of what is left.
    """

    @staticmethod
    def check(c: Any) -> None:
        """Raise ValueError for decisions that tiles cannot have."""
        # A step of the output takes the keys of two tiles.
        whole = amx.takes(c.tile_keys, c.heads) and amx.takes(c.tile_heads, c.values)
        if not whole or c.tile_keys % (2 * amx.ROWS):
            raise ValueError(f"sparse_mla: decisions that do not divide for tiles: {c}")

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_ir(kernel, amx.ir_of(kernel))

    @staticmethod
    def weight_shape(c):
        return 2, c.heads, c.block_keys // 2

    def __init__(self, c, dtype: str, heads, widths) -> None:
        super().__init__(c, dtype, heads, widths)
        # Of pairs of keys.
        self.values = T.sblock_alloc_buffer((c.block_keys // 2, self.d_v), "uint32")
        self.pairs = T.sblock_alloc_buffer((2, 16, 16), "uint32")

    @T.inline
    def begin(self):
        # TVM makes a buffer as small as what is indexed of it, and addresses that are passed on tell only a beginning.
        for i, h, j in T.grid(2, self.c.heads, self.c.block_keys // 32):
            for l in T.vectorized(16):
                self.weights[i, h, j * 16 + l] = T.uint32(0)
        T.evaluate(amx.begin())

    @T.inline
    def end(self):
        T.evaluate(amx.end())

    @T.inline
    def start(self, sums):
        """Nothing: products set the sums."""

    @T.inline
    def put_values(self, keys):
        # Rows up to a multiple of a tile's keys are zeros already.
        for j in T.serial((keys + 31) // 32 * 16):
            for d in T.serial(self.d_v // 16):
                for l in T.vectorized(16):
                    self.values[j, d * 16 + l] = T.Cast("uint32", self.keys[2 * j, d * 16 + l]) | (
                        T.Cast("uint32", self.keys[2 * j + 1, d * 16 + l]) << T.uint32(16)
                    )

    @T.inline
    def put_weights(self, weights, keys, heads):
        for j in T.serial((keys + 31) // 32 * 32 - keys):
            for h in T.vectorized(heads):
                weights[keys + j, h] = T.float32(0)
        for b, g in T.grid((keys + 31) // 32, heads // 16):
            for j in T.serial(16):
                for h in T.vectorized(16):
                    self.pairs[0, j, h] = _in_one(
                        T.reinterpret("uint32", weights[b * 32 + 2 * j, g * 16 + h]),
                        T.reinterpret("uint32", weights[b * 32 + 2 * j + 1, g * 16 + h]),
                    )
                for h in T.vectorized(16):
                    self.pairs[1, j, h] = _in_one(
                        self.rest(weights[b * 32 + 2 * j, g * 16 + h]),
                        self.rest(weights[b * 32 + 2 * j + 1, g * 16 + h]),
                    )
            for i in T.serial(2):
                T.evaluate(
                    amx.transpose(
                        T.address_of(self.weights[i, g * 16, b * 16]),
                        2 * self.c.block_keys,
                        T.address_of(self.pairs[i, 0, 0]),
                    )
                )

    @T.inline
    def add_scores(self, acc, hb, first, part):
        T.evaluate(
            amx.product(
                "bfloat16",
                acc,
                T.address_of(self.keys[first, part * CHAIN]),
                2 * self.d_qk,
                T.address_of(self.queries[hb, part * (CHAIN // 2), 0]),
                4 * self.c.heads,
                amx.steps(part * CHAIN, T.min((part + 1) * CHAIN, self.d_qk), 2),
            )
        )

    @T.inline
    def add_values(self, tile, weights, keys, head, value):
        T.evaluate(
            amx.product(
                "bfloat16",
                tile,
                T.address_of(self.weights[0, head, 0]),
                2 * self.c.block_keys,
                T.address_of(self.values[0, value]),
                4 * self.d_v,
                (keys + 31) // 32,
                lefts=2,
                part=2 * self.c.block_keys * self.c.heads,
            )
        )


@T.meta_class
class Bf16MatrixProducts(Bf16Products):
    """Arm's products of bf16 matrices: two keys by two heads, and two heads by two values.

    As `Bf16Products`. A score's row is four entries of a key. An output's row is a head's weights of two keys, first
    what both begin with and then the rests, and the other row is the values of both keys, twice.

    The processor takes subnormal bf16 for 0, makes subnormal sums 0, and rounds each sum to odd, whatever mode the
    caller has set.
    """

    lanes = 8
    entries, packed = 4, "uint64"

    @staticmethod
    def check(c: Any) -> None:
        """Raise ValueError for decisions that products of matrices cannot have."""
        if c.tile_keys % 2 or c.heads % 8 or c.tile_heads % 2 or c.values % 8 or STEP // 4 % c.unroll_d:
            raise ValueError(f"sparse_mla: decisions that do not divide for products of matrices: {c}")
        if c.unroll_d % 2:
            raise ValueError(
                f"sparse_mla: unroll_d: expected an even number for products of matrices, got {c.unroll_d}"
            )

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_matrix(kernel, "float32", _ROWS_IR)

    @staticmethod
    def weight_shape(c):
        return c.block_keys // 2, c.heads

    def rows(self, name: str, part: int, row, d):
        """Rows of a product, from eight entries of a key and of the next one, from d on."""
        eight = T.Ramp(d, 1, 8)
        part = T.Cast("int32", part)
        return T.call_pure_extern("uint64x2", name, part, self.keys[row, eight], self.keys[row + 1, eight])

    def parts(self, first, second):
        """The bf16 parts of a weight and of that of the next key, as the row of a product."""
        begin = _in_one(T.reinterpret("uint32", first), T.reinterpret("uint32", second))
        rest = _in_one(self.rest(first), self.rest(second))
        return T.Cast("uint64", begin) | (T.Cast("uint64", rest) << T.uint64(32))

    @T.inline
    def put_weights(self, weights, keys, heads):
        for j in T.serial((keys + 1) // 2):
            # The partner of a last key is a row of zeros: its weight must be finite.
            if 2 * j + 1 == keys:
                for h in T.vectorized(heads):
                    weights[2 * j + 1, h] = T.float32(0)
            for h in T.vectorized(heads):
                self.weights[j, h] = self.parts(weights[2 * j, h], weights[2 * j + 1, h])

    @T.inline
    def add_scores(self, acc, hb, first, part):
        for d in T.serial(
            part * (CHAIN // 4 // self.c.unroll_d), T.min((part + 1) * CHAIN, self.d_qk) // 4 // self.c.unroll_d
        ):
            for u in T.unroll(self.c.unroll_d):
                for g in T.unroll(acc.shape[1] // 2):
                    for j in T.unroll(acc.shape[0] // 2):
                        acc[place(acc, j, g)] = matrix(
                            acc[place(acc, j, g)],
                            "float32",
                            self.rows(_KEYS, u % 2, first + 2 * j, 4 * (d * self.c.unroll_d + u // 2 * 2)),
                            self.queries[hb, d * self.c.unroll_d + u, T.Ramp(2 * g, 1, 2)],
                        )
        settle(acc, "float32")

    @T.inline
    def add_values(self, tile, weights, keys, head, value):
        for j in T.serial((keys + 1) // 2):
            for g in T.unroll(tile.shape[1] // 2):
                for r in T.unroll(tile.shape[0] // 2):
                    tile[place(tile, r, g)] = matrix(
                        tile[place(tile, r, g)],
                        "float32",
                        self.weights[j, T.Ramp(head + 2 * r, 1, 2)],
                        self.rows(_VALUES, g % 4, 2 * j, value + g // 4 * 8),
                    )
        settle(tile, "float32")
