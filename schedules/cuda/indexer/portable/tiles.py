"""Compute the scores of a tile of keys for some heads, with tensor cores or in f32.

Both classes have the same interface. Each warp takes 16 * `key_tiles` keys of the tile of a block. ``take_keys`` loads
them, ``score`` computes the scores of 8 * `head_tiles` heads, and ``value(i, n, e)`` returns them. With g = lane / 4
and t = lane % 4 that is key ``16 i + 8 (e / 2) + g`` of the warp and head ``8 n + 2 t + e % 2``, as in ``mma.m16n8``. A
lane has a few keys and every fourth pair of heads, so the sum over the heads ends in two shuffles.
"""

from __future__ import annotations

from tvm.script import tirx as T

from .....spec import ELEMENT_BYTES
from ...emit import WARP, SharedPool, call, shared
from .decisions import planes, row_stride

#: Names of the products of each type.
_MMA = {"bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "e4m3", "int8": "s8"}

#: 1.5 * 2**23: an f32 of this much and an integer x in -2**22..2**22 has the bits of this one plus x.
_BIAS, _BIAS_BITS = 12582912.0, 0x4B400000


@T.meta_class
class Rows:
    """Rows in shared memory. The same 16 bytes of 8 consecutive rows lie in different banks.

    If rows fill whole lines of 128 bytes, the chunks of a row are permuted by the low bits of its number. Otherwise
    rows are padded.

    Parameters
    ----------
    pool : Buffer
    places : SharedPool
    rows : int or expression
    row_bytes : int
    """

    def __init__(self, pool, places: SharedPool, rows, row_bytes: int) -> None:
        stride = row_stride(row_bytes)
        self.mask = 7 if stride == row_bytes else 0
        self.bytes = shared(pool, places.place((rows, stride), "uint8", 128))

    def chunk(self, row, chunk, phase):
        """The address of 16 bytes of a row; `phase` is ``row % 8``."""
        return T.address_of(self.bytes[row, (chunk ^ (phase & self.mask)) * 16])


@T.meta_class
class MmaScores:
    """Products of 16 keys and 8 heads, 32 bytes of each. Registers hold the keys for all heads of all queries.

    Keys of e4m3 that are multiplied in 16 bits are widened when they are loaded. Of 16 neighbours, thread t then has
    4 t to 4 t + 3, where the instruction expects 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. So the queries are stored in shared
    memory in the same order.

    Sums are f32, or integers for int8. Integer sums begin at the bits of 1.5 * 2**23. With a sum of up to 256 products
    added, these are the bits of an f32, and one subtraction replaces a conversion, which would be slower.

    Parameters
    ----------
    c : Decisions
    variant : dict
    product : str
        Type of what is multiplied.
    d_idx : int
    keys, queries : Rows
    tx : expression
        The thread.
    """

    HELD = True

    def __init__(self, c, variant: dict[str, str], product: str, d_idx: int, keys: Rows, queries: Rows, tx) -> None:
        self.mma = f"mma_{_MMA[product]}"
        self.integer = product == "int8"
        self.narrow = product != variant["K"]
        self.widen = f"e4m3x2_to_{_MMA[product]}x2"
        self.keys, self.queries = keys, queries
        self.lane, self.warp = tx % WARP, tx // WARP
        self.key_tiles, self.head_tiles, self.planes = c.key_tiles, c.head_tiles, planes(variant)
        self.steps = d_idx * ELEMENT_BYTES[product] // 32
        self.a = T.alloc_local((c.key_tiles, self.steps, 4), "uint32")
        self.raw = T.alloc_local((4,), "uint32")
        self.b = T.alloc_local((4,), "uint32")
        self.zero = T.int32(_BIAS_BITS) if self.integer else T.float32(0)
        self.c = T.alloc_local((c.key_tiles, c.head_tiles, 4), "int32" if self.integer else "float32")

    def value(self, i, n, e):
        """A score, f32."""
        if self.integer:
            return T.reinterpret("float32", self.c[i, n, e]) - T.float32(_BIAS)
        return self.c[i, n, e]

    @T.inline
    def take_keys(self, first):
        """Load the keys: the rows from `first` on."""
        for i in T.unroll(self.key_tiles):
            row: T.let = first + (self.warp * self.key_tiles + i) * 16 + self.lane % 16
            if self.narrow:
                for s in T.unroll(self.steps // 2):
                    at: T.let = self.keys.chunk(row, s * 2 + self.lane // 16, self.lane % 8)
                    T.evaluate(call("ldmatrix_x4", T.address_of(self.raw[0]), at, dtype="void"))
                    for r in T.unroll(4):
                        low: T.let = call(self.widen, self.raw[r], dtype="uint32")
                        high: T.let = call(self.widen, self.raw[r] >> T.uint32(16), dtype="uint32")
                        self.a[i, s * 2 + r // 2, r % 2] = low
                        self.a[i, s * 2 + r // 2, r % 2 + 2] = high
            else:
                for s in T.unroll(self.steps):
                    at: T.let = self.keys.chunk(row, s * 2 + self.lane // 16, self.lane % 8)
                    T.evaluate(call("ldmatrix_x4", T.address_of(self.a[i, s, 0]), at, dtype="void"))

    @T.inline
    def score(self, first, distance):
        """The heads are the rows from `first` on, a multiple of 8; planes are `distance` rows apart."""
        for i in T.unroll(self.key_tiles):
            for n in T.unroll(self.head_tiles):
                for e in T.unroll(4):
                    self.c[i, n, e] = self.zero
        for p in T.unroll(self.planes):
            for s in T.unroll(self.steps):
                for n in T.unroll(self.head_tiles // 2):
                    row: T.let = first + p * distance + (n * 2 + self.lane // 16) * 8 + self.lane % 8
                    at: T.let = self.queries.chunk(row, s * 2 + self.lane // 8 % 2, self.lane % 8)
                    T.evaluate(call("ldmatrix_x4", T.address_of(self.b[0]), at, dtype="void"))
                    for half in T.unroll(2):
                        for i in T.unroll(self.key_tiles):
                            to: T.let = T.address_of(self.c[i, n * 2 + half, 0])
                            key: T.let = T.address_of(self.a[i, s, 0])
                            T.evaluate(call(self.mma, to, key, T.address_of(self.b[half * 2]), dtype="void"))


@T.meta_class
class FmaScores:
    """f32 without tensor cores: the parts that these would need of both factors make NaN of an infinity."""

    HELD = False

    def __init__(self, c, variant: dict[str, str], product: str, d_idx: int, keys: Rows, queries: Rows, tx) -> None:
        self.keys, self.queries = keys, queries
        self.lane, self.warp = tx % WARP, tx // WARP
        self.key_tiles, self.head_tiles = c.key_tiles, c.head_tiles
        self.chunks = d_idx // 4
        self.first = T.local_scalar("int32")
        self.a = T.alloc_local((c.key_tiles * 2, 4), "float32")
        self.b = T.alloc_local((4,), "float32")
        self.c = T.alloc_local((c.key_tiles, c.head_tiles, 4), "float32")

    def value(self, i, n, e):
        return self.c[i, n, e]

    @T.inline
    def take_keys(self, first):
        self.first = first + self.warp * self.key_tiles * 16

    @T.inline
    def score(self, first, distance):
        for i in T.unroll(self.key_tiles):
            for n in T.unroll(self.head_tiles):
                for e in T.unroll(4):
                    self.c[i, n, e] = T.float32(0)
        for s in T.serial(self.chunks // 2):
            for u in T.unroll(2):
                for i in T.unroll(self.key_tiles * 2):
                    at: T.let = self.keys.chunk(self.first + i * 8 + self.lane // 4, s * 2 + u, self.lane // 4)
                    T.evaluate(call("get_128", T.address_of(self.a[i, 0]), at, dtype="void"))
                for n in T.unroll(self.head_tiles):
                    for j in T.unroll(2):
                        head: T.let = self.lane % 4 * 2 + j
                        at: T.let = self.queries.chunk(first + n * 8 + head, s * 2 + u, head)
                        T.evaluate(call("get_128", T.address_of(self.b[0]), at, dtype="void"))
                        for d in T.unroll(4):
                            for i in T.unroll(self.key_tiles * 2):
                                self.c[i // 2, n, i % 2 * 2 + j] = (
                                    self.c[i // 2, n, i % 2 * 2 + j] + self.a[i, d] * self.b[d]
                                )
