"""How the CPU indexer multiplies queries by keys: in f32, or with the processor's dot products of bf16 or int8.

`products_of` picks the class. Each says how queries and keys are packed, and adds the products of a register tile to
its accumulators.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import StringImm
from tvm.script import tirx as T

from . import amx
from .elements import CHAIN, STEP, widen

#: The dot products that a target may have (AVX512-BF16, AVX512-VNNI, AVX-VNNI, and those of Armv8.2), by what they
#: multiply and how many sums a vector holds.
BF16X16, INT8X16, INT8X8, INT8X4 = "bf16x16", "int8x16", "int8x8", "int8x4"
#: Arm's products of matrices (FEAT_I8MM and FEAT_BF16), whose vectors hold two by two sums.
INT8X2X2, BF16X2X2 = "int8x2x2", "bf16x2x2"
#: The tile products of AMX, of bf16 and of int8.
AMX = "amx"

#: The element types that they multiply exactly. All numbers of fp8 are normal numbers of bf16.
EXACT = dict.fromkeys((BF16X16, BF16X2X2), ("bfloat16", "float8_e4m3fn")) | dict.fromkeys(
    (INT8X16, INT8X8, INT8X4, INT8X2X2), ("int8",)
)
EXACT[AMX] = (*EXACT[BF16X16], "int8")

#: Products of two bf16 vectors, two for each of 16 sums. TVM's legalization of bf16 changes the types of
#: such arguments, so LLVM's intrinsic is called from a function of its own, which is always inlined.
_BF16_DOT, _BF16_TWICE = "dsa_bf16_dot", "dsa_bf16_twice"
_BF16_DOT_IR = f"""
define linkonce_odr hidden <16 x float> @{_BF16_DOT}(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) #0 {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr hidden <16 x i32> @{_BF16_TWICE}(<16 x i16> %x) #0 {{
  %y = shufflevector <16 x i16> %x, <16 x i16> poison, <32 x i32> <{", ".join(f"i32 {i // 2}" for i in range(32))}>
  %r = bitcast <32 x i16> %y to <16 x i32>
  ret <16 x i32> %r
}}
attributes #0 = {{ alwaysinline nounwind "target-features"="+avx512bf16,+avx512bw,+avx512f,+avx512vl" }}
"""


#: Products of bytes, four for each of some i32 sums. Nothing saturates. On x86-64 the bytes of the first vector are
#: unsigned.
_INT8_DOT = "dsa_int8_dot"
#: The intrinsics by the sums of a vector, and the features that they need.
_INT8_INTRINSICS = {
    16: ("llvm.x86.avx512.vpdpbusd.512", "+avx512vnni,+avx512bw,+avx512f,+avx512vl"),
    8: ("llvm.x86.avx512.vpdpbusd.256", "+avxvnni,+avx2"),
    4: ("llvm.aarch64.neon.sdot.v4i32.v16i8", "+dotprod,+neon"),
}


def _int8_dot_ir(lanes: int) -> str:
    sums, quads = f"<{lanes} x i32>", f"<{4 * lanes} x i8>"
    intrinsic, features = _INT8_INTRINSICS[lanes]
    return f"""
define linkonce_odr hidden {sums} @{_INT8_DOT}({sums} %sum, {sums} %a, {sums} %b) #0 {{
  %x = bitcast {sums} %a to {quads}
  %y = bitcast {sums} %b to {quads}
  %r = call {sums} @{intrinsic}({sums} %sum, {quads} %x, {quads} %y)
  ret {sums} %r
}}
declare {sums} @{intrinsic}({sums}, {quads}, {quads})
attributes #0 = {{ alwaysinline nounwind "target-features"="{features}" }}
"""


#: Adds to two by two sums the products of two rows of 8 bytes with two others. Sum 2 i + j is of row i of the first
#: and row j of the second. A row is 8 numbers of int8 or 4 of bf16.
_MATRIX = "dsa_matrix"
#: The two lower and the two upper halves of two vectors of four sums.
_LOWER, _UPPER = "dsa_lower_halves", "dsa_upper_halves"
#: The intrinsics by the type of the sums: what they take and the features that they need.
_MATRIX_INTRINSICS = {
    "i32": ("llvm.aarch64.neon.smmla.v4i32.v16i8", "<16 x i8>", "+i8mm,+neon"),
    "float": ("llvm.aarch64.neon.bfmmla", "<8 x bfloat>", "+bf16,+neon"),
}


def _matrix_ir(sum_type: str) -> str:
    sums = f"<4 x {sum_type}>"
    intrinsic, rows, features = _MATRIX_INTRINSICS[sum_type]
    return f"""
define linkonce_odr hidden {sums} @{_MATRIX}({sums} %sum, <2 x i64> %a, <2 x i64> %b) #0 {{
  %x = bitcast <2 x i64> %a to {rows}
  %y = bitcast <2 x i64> %b to {rows}
  %r = call {sums} @{intrinsic}({sums} %sum, {rows} %x, {rows} %y)
  ret {sums} %r
}}
declare {sums} @{intrinsic}({sums}, {rows}, {rows})
attributes #0 = {{ alwaysinline nounwind "target-features"="{features}" }}
"""


def _halves_ir(sum_type: str) -> str:
    sums = f"<4 x {sum_type}>"
    return "".join(
        f"""
define linkonce_odr hidden {sums} @{name}({sums} %a, {sums} %b) #0 {{
  %r = shufflevector {sums} %a, {sums} %b, <4 x i32> <i32 {at}, i32 {at + 1}, i32 {at + 4}, i32 {at + 5}>
  ret {sums} %r
}}
"""
        for name, at in ((_LOWER, 0), (_UPPER, 2))
    )


def with_matrix(kernel: tirx.PrimFunc, sums: str, more: str = "") -> tirx.PrimFunc:
    """The kernel with the functions that `matrix` and `settle` call for sums of this type, and with `more` LLVM IR."""
    sum_type = {"int32": "i32", "float32": "float"}[sums]
    return with_ir(kernel, _matrix_ir(sum_type) + _halves_ir(sum_type) + more)


def matrix(sums, dtype: str, left, right):
    """The two by two `sums` and the products of two rows `left` and two rows `right`, each row in a u64."""
    return T.call_pure_extern(f"{dtype}x4", _MATRIX, sums, left, right)


def place(acc, left: int, right: int):
    """Where the register tile `acc` has the sums of rows `left` of two and `right` of two, until `settle`.

    Two vectors have the sums of two rows by four. They lie in the places of these eight sums.
    """
    return 2 * left + right % 2, T.Ramp(right // 2 * 4, 1, 4)


@T.inline
def settle(acc, dtype):
    """Put the sums of a register tile from where `place` has them to their rows and columns."""
    for i in T.unroll(acc.shape[0] // 2):
        for g in T.unroll(acc.shape[1] // 4):
            lower: T.let = T.call_pure_extern(
                f"{dtype}x4", _LOWER, acc[2 * i, T.Ramp(4 * g, 1, 4)], acc[2 * i + 1, T.Ramp(4 * g, 1, 4)]
            )
            upper: T.let = T.call_pure_extern(
                f"{dtype}x4", _UPPER, acc[2 * i, T.Ramp(4 * g, 1, 4)], acc[2 * i + 1, T.Ramp(4 * g, 1, 4)]
            )
            acc[2 * i, T.Ramp(4 * g, 1, 4)] = lower
            acc[2 * i + 1, T.Ramp(4 * g, 1, 4)] = upper


def bf16_dot(sums, pair, pairs):
    """The 16 f32 `sums` and the products of a pair of bf16, its bits in a u32, and 16 such pairs."""
    return T.call_pure_extern("float32x16", _BF16_DOT, sums, pairs, T.Broadcast(pair, 16))


def bf16_twice(numbers):
    """Pairs of 16 bf16, each with itself, as u32."""
    return T.call_pure_extern("uint32x16", _BF16_TWICE, numbers)


def with_bf16_dot(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """The kernel with the functions that `bf16_dot` and `bf16_twice` call."""
    return with_ir(kernel, _BF16_DOT_IR)


def with_ir(kernel: tirx.PrimFunc, ir: str) -> tirx.PrimFunc:
    """The kernel with functions in LLVM's IR."""
    return kernel.with_body(tirx.AttrStmt(0, "pragma_import_llvm", StringImm(ir), kernel.body))


def products_of(dots: str | None, dtype: str = "bfloat16"):
    """The class that multiplies with the dot products of this name, or in f32.

    Queries are of element type `dtype`. It matters only where one name stands for the products of several types, whose
    classes take the same decisions.
    """
    if dots == AMX:
        return AmxInt8Products if dtype == "int8" else AmxBf16Products
    return {
        None: FloatProducts,
        BF16X16: Bf16Products,
        INT8X16: Int8Products16,
        INT8X8: Int8Products8,
        INT8X4: Int8Products4,
        INT8X2X2: Int8MatrixProducts,
        BF16X2X2: Bf16MatrixProducts,
    }[dots]


def bf16_bits(x, dtype: str):
    """The bits of the bf16 that the element `x` is, of a type that bf16 dot products take."""
    return x if dtype == "bfloat16" else T.Cast("uint16", T.reinterpret("uint32", widen(x, dtype)) >> T.uint32(16))


def relu(x):
    """max(x, 0), but NaN stays NaN."""
    return T.Select(x <= T.float32(0), T.float32(0), x)


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
    tasks : tuple of expression
        Queries and blocks of heads.
    """

    #: What packed queries and keys and the accumulators are declared as, and how many partial sums over the heads a key
    #: has.
    packed, sums, lanes = "float32", "float32", 8
    #: Entries of queries and keys that a step takes.
    entries = 1

    @staticmethod
    def check(c: Any) -> bool:
        """Whether it takes these decisions."""
        return True

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

    @staticmethod
    def key_shape(keys, d_idx):
        """Of the packed keys."""
        return keys, d_idx

    @staticmethod
    def parts(d_idx):
        """How many parts the products of a query and a key are summed in, each from zero."""
        return (d_idx + CHAIN - 1) // CHAIN

    def __init__(self, queries, keys, types, tile, d_idx, tasks) -> None:
        self.queries, self.keys, self.types, self.tile, self.d_idx = queries, keys, types, tile, d_idx

    @T.inline
    def begin(self):
        """Before the first product of a task."""

    @T.inline
    def end(self):
        """After its last product."""

    @T.inline
    def start(self, acc, i, hb, h0):
        """Set the sums of heads from h0 on to what they begin with."""
        for j in T.unroll(acc.shape[0]):
            for h in T.vectorized(acc.shape[1]):
                acc[j, h] = T.float32(0)

    def score(self, total):
        """max(sum, 0) as f32, but NaN stays NaN."""
        return relu(total)

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
    def add(self, acc, keys, first, queries, i, hb, h0, part):
        for d in T.serial(part * (CHAIN // self.tile[2]), T.min((part + 1) * CHAIN, self.d_idx) // self.tile[2]):
            for u in T.unroll(self.tile[2]):
                for j in T.unroll(self.tile[0]):
                    for h in T.vectorized(acc.shape[1]):
                        acc[j, h] = (
                            acc[j, h]
                            + keys[first + j, d * self.tile[2] + u] * queries[i, hb, d * self.tile[2] + u, h0 + h]
                        )


@T.meta_class
class Bf16Products(FloatProducts):
    """Dot products of pairs of bf16: a key's pair broadcast, times a vector of 16 heads' pairs.

    The processor takes subnormal bf16 for 0, makes subnormal sums 0, and rounds each addition to nearest even, whatever
    mode the caller has set.
    """

    packed, sums, lanes = "uint16", "float32", 16
    entries = 2

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_bf16_dot(kernel)

    @staticmethod
    def reads_in_place(key_type: str) -> bool:
        return key_type == "bfloat16"

    @staticmethod
    def query_shape(rows, blocks, d_idx, heads):
        return rows, blocks, d_idx // 2, 2 * heads

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
    def add(self, acc, keys, first, queries, i, hb, h0, part):
        for d in T.serial(
            part * (CHAIN // 2 // self.tile[2]), T.min((part + 1) * CHAIN, self.d_idx) // 2 // self.tile[2]
        ):
            for u in T.unroll(self.tile[2]):
                for j in T.unroll(self.tile[0]):
                    for g in T.unroll(acc.shape[1] // 16):
                        acc[j, T.Ramp(16 * g, 1, 16)] = bf16_dot(
                            acc[j, T.Ramp(16 * g, 1, 16)],
                            T.reinterpret("uint32", keys[first + j, T.Ramp(2 * (d * self.tile[2] + u), 1, 2)]),
                            T.reinterpret(
                                "uint32x16", queries[i, hb, d * self.tile[2] + u, T.Ramp(2 * h0 + 32 * g, 1, 32)]
                            ),
                        )


@T.meta_class
class _Int8Products(FloatProducts):
    """Dot products of four bytes: a key's four broadcast, times a vector of heads' four. As `FloatProducts`.

    Sums are integers and exact. An instruction that multiplies unsigned bytes by signed ones gets keys with 128 added,
    and accumulators begin with -128 times the sum of the head's query: with d_idx 1024, sums stay below 2**26.
    """

    packed, sums = "uint32", "int32"
    entries = 4
    #: Sums of a vector, and what makes four bytes of a key what the instruction takes.
    lanes: int
    flip: int

    @classmethod
    def completed(cls, kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_ir(kernel, _int8_dot_ir(cls.lanes))

    @staticmethod
    def reads_in_place(key_type: str) -> bool:
        return False

    @staticmethod
    def query_shape(rows, blocks, d_idx, heads):
        return rows, blocks, d_idx // 4, heads

    @staticmethod
    def key_shape(keys, d_idx):
        return keys, d_idx // 4

    @staticmethod
    def parts(d_idx):
        return 1

    def __init__(self, queries, keys, types, tile, d_idx, tasks) -> None:
        self.queries, self.keys, self.tile, self.d_idx = queries, keys, tile, d_idx
        self.offsets = T.sblock_alloc_buffer((*tasks, tile[1]), "int32")

    @T.inline
    def start(self, acc, i, hb, h0):
        for j in T.unroll(acc.shape[0]):
            for h in T.vectorized(acc.shape[1]):
                acc[j, h] = self.offsets[i, hb, h0 + h]

    def score(self, total):
        return T.Cast("float32", T.max(total, T.int32(0)))

    def dot(self, sums, quad, quads):
        """The i32 `sums` and the products of four bytes of a key and vectors of four of queries, all in a u32."""
        return T.call_pure_extern(f"int32x{self.lanes}", _INT8_DOT, sums, T.Broadcast(quad, self.lanes), quads)

    @T.inline
    def put_queries(self, packed, m0, rows, blocks, h_idx):
        for i, hb, d, h in T.grid(rows, blocks, self.d_idx // 4, self.tile[1]):
            if hb * self.tile[1] + h < h_idx:
                packed[i, hb, d, h] = T.reinterpret(
                    "uint32", self.queries[m0 + i, hb * self.tile[1] + h, T.Ramp(4 * d, 1, 4)]
                )
            else:
                packed[i, hb, d, h] = T.uint32(0)
        for i, hb, g in T.grid(rows, blocks, self.tile[1] // self.lanes):
            self.offsets[i, hb, T.Ramp(self.lanes * g, 1, self.lanes)] = T.Broadcast(T.int32(0), self.lanes)
            for d in T.serial(self.d_idx // 4):
                self.offsets[i, hb, T.Ramp(self.lanes * g, 1, self.lanes)] = self.dot(
                    self.offsets[i, hb, T.Ramp(self.lanes * g, 1, self.lanes)],
                    T.uint32(self.flip),
                    packed[i, hb, d, T.Ramp(self.lanes * g, 1, self.lanes)],
                )
            self.offsets[i, hb, T.Ramp(self.lanes * g, 1, self.lanes)] = (
                T.Broadcast(T.int32(0), self.lanes) - self.offsets[i, hb, T.Ramp(self.lanes * g, 1, self.lanes)]
            )

    @T.inline
    def put_key(self, row, packed, at):
        for d in T.serial(self.d_idx // STEP):
            packed[at, T.Ramp(d * (STEP // 4), 1, STEP // 4)] = T.reinterpret(
                f"uint32x{STEP // 4}", self.keys[row, T.Ramp(d * STEP, 1, STEP)]
            ) ^ T.Broadcast(T.uint32(self.flip), STEP // 4)

    @T.inline
    def put_nothing(self, packed, at):
        for d in T.serial(self.d_idx // STEP):
            packed[at, T.Ramp(d * (STEP // 4), 1, STEP // 4)] = T.Broadcast(T.uint32(0), STEP // 4)

    @T.inline
    def add(self, acc, keys, first, queries, i, hb, h0, part):
        for d in T.serial(self.d_idx // 4 // self.tile[2]):
            for u in T.unroll(self.tile[2]):
                for j in T.unroll(self.tile[0]):
                    for g in T.unroll(acc.shape[1] // self.lanes):
                        acc[j, T.Ramp(self.lanes * g, 1, self.lanes)] = self.dot(
                            acc[j, T.Ramp(self.lanes * g, 1, self.lanes)],
                            keys[first + j, d * self.tile[2] + u],
                            queries[i, hb, d * self.tile[2] + u, T.Ramp(h0 + self.lanes * g, 1, self.lanes)],
                        )


class Int8Products16(_Int8Products):
    """With AVX512-VNNI."""

    lanes, flip = 16, 0x80808080


class Int8Products8(_Int8Products):
    """With AVX-VNNI."""

    lanes, flip = 8, 0x80808080


class Int8Products4(_Int8Products):
    """With the dot products of Armv8.2, whose bytes are all signed: the sum of 0 times the queries is 0."""

    lanes, flip = 4, 0


class _AmxProducts:
    """What the products of tiles have in common."""

    @staticmethod
    def check(c: Any) -> bool:
        return amx.takes(c.tile_keys, c.heads)

    @staticmethod
    def completed(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_ir(kernel, amx.ir_of(kernel))

    @T.inline
    def begin(self):
        T.evaluate(amx.begin())

    @T.inline
    def end(self):
        T.evaluate(amx.end())

    @T.inline
    def start(self, acc, i, hb, h0):
        """Nothing: `add` sets the sums."""


@T.meta_class
class AmxBf16Products(_AmxProducts, Bf16Products):
    """Tiles of 16 keys by 16 heads and 32 entries. Packed queries are pairs of 16 heads' bf16 already, as tiles are.

    A step's 16 products of even entries are summed from zero, and so are those of odd ones. What `Bf16Products` says of
    subnormal numbers and of rounding holds.
    """

    @T.inline
    def add(self, acc, keys, first, queries, i, hb, h0, part):
        T.evaluate(
            amx.product(
                "bfloat16",
                acc,
                T.address_of(keys[first, part * CHAIN]),
                2 * self.d_idx,
                T.address_of(queries[i, hb, part * (CHAIN // 2), 2 * h0]),
                4 * self.tile[1],
                amx.steps(part * CHAIN, T.min((part + 1) * CHAIN, self.d_idx), 2),
            )
        )


@T.meta_class
class AmxInt8Products(_AmxProducts, _Int8Products):
    """Tiles of 16 keys by 16 heads and 64 entries, all signed. Keys and queries end with zeros where d_idx ends within
    64 entries.
    """

    lanes, flip = 16, 0

    @staticmethod
    def quads(d_idx):
        """Four entries each, up to the end of a tile's row."""
        return (d_idx + 63) // 64 * 16

    @classmethod
    def query_shape(cls, rows, blocks, d_idx, heads):
        return rows, blocks, cls.quads(d_idx), heads

    @classmethod
    def key_shape(cls, keys, d_idx):
        return keys, cls.quads(d_idx)

    def __init__(self, queries, keys, types, tile, d_idx, tasks) -> None:
        self.queries, self.keys, self.tile, self.d_idx = queries, keys, tile, d_idx

    @T.inline
    def put_queries(self, packed, m0, rows, blocks, h_idx):
        for i, hb, d, h in T.grid(rows, blocks, self.quads(self.d_idx), self.tile[1]):
            if hb * self.tile[1] + h < h_idx and d < self.d_idx // 4:
                packed[i, hb, d, h] = T.reinterpret(
                    "uint32", self.queries[m0 + i, hb * self.tile[1] + h, T.Ramp(4 * d, 1, 4)]
                )
            else:
                packed[i, hb, d, h] = T.uint32(0)

    @T.inline
    def put_key(self, row, packed, at):
        for d in T.serial(self.d_idx // STEP):
            packed[at, T.Ramp(d * (STEP // 4), 1, STEP // 4)] = T.reinterpret(
                f"uint32x{STEP // 4}", self.keys[row, T.Ramp(d * STEP, 1, STEP)]
            )
        if self.d_idx % 64 > 0:
            packed[at, T.Ramp(self.d_idx // 4, 1, STEP // 4)] = T.Broadcast(T.uint32(0), STEP // 4)

    @T.inline
    def put_nothing(self, packed, at):
        for d in T.serial(self.quads(self.d_idx) // (STEP // 4)):
            packed[at, T.Ramp(d * (STEP // 4), 1, STEP // 4)] = T.Broadcast(T.uint32(0), STEP // 4)

    @T.inline
    def add(self, acc, keys, first, queries, i, hb, h0, part):
        T.evaluate(
            amx.product(
                "int8",
                acc,
                T.address_of(keys[first, 0]),
                4 * self.quads(self.d_idx),
                T.address_of(queries[i, hb, 0, h0]),
                4 * self.tile[1],
                amx.steps(0, self.d_idx, 1),
            )
        )


@T.meta_class
class _MatrixProducts(FloatProducts):
    """Arm's products of two keys by two heads, from rows of 8 bytes each. As `FloatProducts`.

    A vector of keys has 8 bytes of a key and the same 8 of the next one, a vector of queries those of two heads.
    """

    packed = "uint64"

    @staticmethod
    def check(c: Any) -> bool:
        return c.tile_keys % 2 == 0

    @classmethod
    def completed(cls, kernel: tirx.PrimFunc) -> tirx.PrimFunc:
        return with_matrix(kernel, cls.sums)

    @staticmethod
    def reads_in_place(key_type: str) -> bool:
        return False

    @classmethod
    def query_shape(cls, rows, blocks, d_idx, heads):
        return rows, blocks, d_idx // cls.entries, heads

    @classmethod
    def key_shape(cls, keys, d_idx):
        return keys // 2, d_idx // cls.entries * 2

    @T.inline
    def start(self, acc, i, hb, h0):
        for j in T.unroll(acc.shape[0]):
            for h in T.vectorized(acc.shape[1]):
                acc[j, h] = T.Cast(self.sums, 0)

    @T.inline
    def put_queries(self, packed, m0, rows, blocks, h_idx):
        for i, hb, d, h in T.grid(rows, blocks, self.d_idx // self.entries, self.tile[1]):
            if hb * self.tile[1] + h < h_idx:
                packed[i, hb, d, h] = self.row(self.queries, (m0 + i, hb * self.tile[1] + h), d, self.types[0])
            else:
                packed[i, hb, d, h] = T.uint64(0)

    @T.inline
    def put_key(self, row, packed, at):
        for d in T.serial(self.d_idx // self.entries):
            packed[at // 2, 2 * d + at % 2] = self.row(self.keys, (row,), d, self.types[1])

    @T.inline
    def put_nothing(self, packed, at):
        for d in T.serial(self.d_idx // self.entries):
            packed[at // 2, 2 * d + at % 2] = T.uint64(0)

    @T.inline
    def add(self, acc, keys, first, queries, i, hb, h0, part):
        for d in T.serial(
            part * (self.chain // self.entries // self.tile[2]),
            T.min((part + 1) * self.chain, self.d_idx) // self.entries // self.tile[2],
        ):
            for u in T.unroll(self.tile[2]):
                for g in T.unroll(acc.shape[1] // 2):
                    for j in T.unroll(self.tile[0] // 2):
                        acc[place(acc, j, g)] = matrix(
                            acc[place(acc, j, g)],
                            self.sums,
                            keys[first // 2 + j, T.Ramp(2 * (d * self.tile[2] + u), 1, 2)],
                            queries[i, hb, d * self.tile[2] + u, T.Ramp(h0 + 2 * g, 1, 2)],
                        )
        settle(acc, self.sums)


@T.meta_class
class Bf16MatrixProducts(_MatrixProducts):
    """With `bfmmla`.

    The processor takes subnormal numbers for 0, makes subnormal products and sums 0, and rounds each sum to odd,
    whatever mode the caller has set: two products to their sum, and that to the sum of earlier ones.
    """

    entries, chain = 4, CHAIN

    def row(self, buffer, at, d, dtype: str):
        """Step d of a key or query as a u64."""
        bits = [T.Cast("uint64", bf16_bits(buffer[(*at, 4 * d + i)], dtype)) << T.uint64(16 * i) for i in range(4)]
        return bits[0] | bits[1] | bits[2] | bits[3]


@T.meta_class
class Int8MatrixProducts(_MatrixProducts):
    """With `smmla`, whose sums are integers and exact, as those of all dot products of bytes."""

    # A part is all of d_idx.
    sums, entries, chain = "int32", 8, 1 << 20

    @staticmethod
    def parts(d_idx):
        return 1

    def score(self, total):
        return T.Cast("float32", T.max(total, T.int32(0)))

    def row(self, buffer, at, d, dtype: str):
        """Step d of a key or query as a u64."""
        return T.reinterpret("uint64", buffer[(*at, T.Ramp(8 * d, 1, 8))])
