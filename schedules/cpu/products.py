"""How the CPU indexer multiplies queries by keys: in f32, or with the bf16 dot products of AVX512-BF16.

`products_of` picks the class. Both say how queries and keys are packed, and add the products of a register tile to its
accumulators, which are f32 in either case.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import StringImm
from tvm.script import tirx as T

from .elements import CHAIN, STEP, widen

#: What the bf16 dot products take, exactly: bf16 itself, and the types of 8 bits, whose numbers are all normal bf16.
BF16_EXACT = ("bfloat16", "float8_e4m3fn", "int8")

#: Products of two bf16 vectors, two for each of 16 sums. TVM's legalization of bf16 changes the types of
#: such arguments, so LLVM's intrinsic is called from a function of its own, which is always inlined.
_DOT = "dsa_bf16_dot"
_DOT_IR = f"""
define linkonce_odr hidden <16 x float> @{_DOT}(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) #0 {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
attributes #0 = {{ alwaysinline nounwind "target-features"="+avx512bf16,+avx512bw,+avx512f,+avx512vl" }}
"""


def bf16_dot(sums, pair, pairs):
    """The 16 f32 `sums` and the products of a pair of bf16, its bits in a u32, and 16 such pairs."""
    return T.call_pure_extern("float32x16", _DOT, sums, pairs, T.Broadcast(pair, 16))


def with_bf16_dot(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """The kernel with the function that `bf16_dot` calls."""
    return kernel.with_body(tirx.AttrStmt(0, "pragma_import_llvm", StringImm(_DOT_IR), kernel.body))


def products_of(bf16: bool):
    """The class that multiplies in f32, or with bf16 dot products."""
    return Bf16Products if bf16 else FloatProducts


def bf16_bits(x, dtype: str):
    """The bits of the bf16 that the element `x` of a type of `BF16_EXACT` is."""
    return x if dtype == "bfloat16" else T.Cast("uint16", T.reinterpret("uint32", widen(x, dtype)) >> T.uint32(16))


@T.meta_class
class FloatProducts:
    """Multiply-adds in f32: a key's element broadcast, times a vector of heads.

    Parameters
    ----------
    queries, keys : Buffer
        Of element types `types`.
    types : tuple of str
    tile : tuple of int
        Keys and heads of a register tile, and steps of the product in one loop body.
    d_idx : expression
    """

    #: What packed queries and keys are declared as, and how many partial sums over the heads a key has.
    packed, lanes = "float32", 8

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        """The kernel with what its products need."""
        return kernel

    @staticmethod
    def reads_in_place(key_type: str) -> bool:
        """Whether keys can be multiplied where they are. Others cost more to convert in the inner loop than to copy."""
        return key_type == "float32"

    @staticmethod
    def query_shape(rows, blocks, d_idx, heads):
        """Of the packed queries."""
        return rows, blocks, d_idx, heads

    def __init__(self, queries, keys, types, tile, d_idx) -> None:
        self.queries, self.keys, self.types, self.tile, self.d_idx = queries, keys, types, tile, d_idx

    @T.inline
    def put_queries(self, packed, m0, rows, blocks, h_idx):
        # Heads past h_idx are zero, so that any head count runs the same tiles.
        for i, hb, d, h in T.grid(rows, blocks, self.d_idx, self.tile[1]):
            if hb * self.tile[1] + h < h_idx:
                packed[i, hb, d, h] = widen(self.queries[m0 + i, hb * self.tile[1] + h, d], self.types[0])
            else:
                packed[i, hb, d, h] = T.float32(0)

    @T.inline
    def put_key(self, row, packed, at):
        for d in T.serial(self.d_idx // STEP):
            for l in T.vectorized(STEP):
                packed[at, d * STEP + l] = widen(self.keys[row, d * STEP + l], self.types[1])

    @T.inline
    def put_nothing(self, packed, at):
        for d in T.serial(self.d_idx // STEP):
            for l in T.vectorized(STEP):
                packed[at, d * STEP + l] = T.float32(0)

    @T.inline
    def add(self, acc, keys, first, queries, i, hb, part):
        for d in T.serial(part * (CHAIN // self.tile[2]), T.min((part + 1) * CHAIN, self.d_idx) // self.tile[2]):
            for u in T.unroll(self.tile[2]):
                for j in T.unroll(self.tile[0]):
                    for h in T.vectorized(self.tile[1]):
                        acc[j, h] = (
                            acc[j, h] + keys[first + j, d * self.tile[2] + u] * queries[i, hb, d * self.tile[2] + u, h]
                        )


@T.meta_class
class Bf16Products:
    """Dot products of pairs of bf16: a key's pair broadcast, times a vector of 16 heads' pairs. As `FloatProducts`.

    The processor takes subnormal bf16 for 0, makes subnormal sums 0, and rounds each addition to nearest even, whatever
    mode the caller has set.
    """

    packed, lanes = "uint16", 16

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_bf16_dot(kernel)

    @staticmethod
    def reads_in_place(key_type: str) -> bool:
        return key_type == "bfloat16"

    @staticmethod
    def query_shape(rows, blocks, d_idx, heads):
        return rows, blocks, d_idx // 2, 2 * heads

    def __init__(self, queries, keys, types, tile, d_idx) -> None:
        self.queries, self.keys, self.types, self.tile, self.d_idx = queries, keys, types, tile, d_idx

    @T.inline
    def put_queries(self, packed, m0, rows, blocks, h_idx):
        for i, hb, d, h, p in T.grid(rows, blocks, self.d_idx // 2, self.tile[1], 2):
            if hb * self.tile[1] + h < h_idx:
                packed[i, hb, d, 2 * h + p] = bf16_bits(
                    self.queries[m0 + i, hb * self.tile[1] + h, 2 * d + p], self.types[0]
                )
            else:
                packed[i, hb, d, 2 * h + p] = T.uint16(0)

    @T.inline
    def put_key(self, row, packed, at):
        for d in T.serial(self.d_idx // STEP):
            for l in T.vectorized(STEP):
                packed[at, d * STEP + l] = bf16_bits(self.keys[row, d * STEP + l], self.types[1])

    @T.inline
    def put_nothing(self, packed, at):
        for d in T.serial(self.d_idx // STEP):
            for l in T.vectorized(STEP):
                packed[at, d * STEP + l] = T.uint16(0)

    @T.inline
    def add(self, acc, keys, first, queries, i, hb, part):
        for d in T.serial(
            part * (CHAIN // 2 // self.tile[2]), T.min((part + 1) * CHAIN, self.d_idx) // 2 // self.tile[2]
        ):
            for u in T.unroll(self.tile[2]):
                for j in T.unroll(self.tile[0]):
                    for g in T.unroll(self.tile[1] // 16):
                        acc[j, T.Ramp(16 * g, 1, 16)] = bf16_dot(
                            acc[j, T.Ramp(16 * g, 1, 16)],
                            T.reinterpret("uint32", keys[first + j, T.Ramp(2 * (d * self.tile[2] + u), 1, 2)]),
                            T.reinterpret("uint32x16", queries[i, hb, d * self.tile[2] + u, T.Ramp(32 * g, 1, 32)]),
                        )
