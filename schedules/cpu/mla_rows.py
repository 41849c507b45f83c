"""How the CPU sparse attention reads rows of the latent cache: as they are, or packed in bytes.

`rows_of` picks the class. Both say what kv is declared as, and ``put`` writes one row as f32, or as the bits of bf16.
"""

from __future__ import annotations

from functools import partial

from tvm.script import tirx as T

from ...ops.packed_rows import GROUP, KEY_ONLY, SCALED
from ...spec import ELEMENT_BYTES
from ..storage import STORAGE
from .elements import LINE, STEP, f32_bits, narrow, prefetch, u32, widen


def rows_of(variant: dict[str, str]):
    """The class for element types T and, where rows are packed, K."""
    return PackedRows if variant.get("K") == SCALED else PlainRows


@T.inline
def prefetch_rows(rows, indices, index_row, first, count, stop):
    """Ask for the rows of `count` indices from `first` on, and before `stop`."""
    for i in T.serial(T.max(T.min(count, stop - first), T.int64(0))):
        row: T.let = T.Cast("int64", indices[index_row, first + i])
        if T.int64(0) <= row and row < rows.kv.shape[0]:
            rows.prefetch(row)


@T.meta_class
class PlainRows:
    """Rows of d_qk elements.

    Parameters
    ----------
    kv : Buffer
    dtype : str
        Element type.
    d_qk, d_v : expression
    bits : bool
        Whether to write the bits of the bf16 that the elements are.
    """

    @staticmethod
    def stored(dtype: str) -> tuple[str, int]:
        """What kv's buffer is declared as, and its alignment."""
        return STORAGE[dtype], ELEMENT_BYTES[dtype]

    @staticmethod
    def width(d_qk, d_packed):
        """Elements of a row."""
        return d_qk

    def __init__(self, kv, dtype: str, d_qk, d_v, bits: bool) -> None:
        self.kv, self.d_qk, self.line = kv, d_qk, LINE // ELEMENT_BYTES[dtype]
        self.convert = (lambda x: x) if bits else partial(widen, dtype=dtype)

    @T.inline
    def prefetch(self, row):
        for i in T.serial((self.d_qk + self.line - 1) // self.line):
            T.evaluate(prefetch(self.kv[row, i * self.line]))

    @T.inline
    def put(self, row, keys, at):
        for d in T.serial(self.d_qk // STEP):
            for l in T.vectorized(STEP):
                keys[at, d * STEP + l] = self.convert(self.kv[row, d * STEP + l])


@T.meta_class
class PackedRows:
    """Rows of d_v e4m3, an f32 for each 128 of them, and d_qk - d_v bf16, at any address. Parameters as of `PlainRows`.

    What it puts is e4m3 times scale rounded to bf16, as every backend has it.
    """

    @staticmethod
    def stored(dtype: str) -> tuple[str, int]:
        return "uint8", 1

    @staticmethod
    def width(d_qk, d_packed):
        return d_packed

    def __init__(self, kv, dtype: str, d_qk, d_v, bits: bool) -> None:
        self.kv, self.d_qk, self.d_v = kv, d_qk, d_v
        self.convert = (lambda x: x) if bits else partial(widen, dtype=KEY_ONLY)
        self.key_only = d_v + d_v // GROUP * 4

    def scale(self, row, group):
        """The f32 of one group, from its bytes."""
        bits = u32(self.kv[row, self.d_v + group * 4])
        for i in (1, 2, 3):
            bits = bits | (u32(self.kv[row, self.d_v + group * 4 + i]) << T.uint32(8 * i))
        return f32_bits(bits)

    def bf16(self, row, i):
        """Element i of those that are key only, from its bytes."""
        at = self.key_only + 2 * i
        return T.Cast("uint16", self.kv[row, at]) | (T.Cast("uint16", self.kv[row, at + 1]) << T.uint16(8))

    @T.inline
    def prefetch(self, row):
        for i in T.serial((self.key_only + 2 * (self.d_qk - self.d_v) + LINE - 1) // LINE):
            T.evaluate(prefetch(self.kv[row, i * LINE]))

    @T.inline
    def put(self, row, keys, at):
        for g in T.serial(self.d_v // GROUP):
            scale: T.let = self.scale(row, g)
            for d in T.serial(GROUP // STEP):
                for l in T.vectorized(STEP):
                    value: T.let = widen(self.kv[row, g * GROUP + d * STEP + l], SCALED) * scale
                    keys[at, g * GROUP + d * STEP + l] = self.convert(narrow(value, KEY_ONLY))
        for d in T.serial((self.d_qk - self.d_v) // STEP):
            for l in T.vectorized(STEP):
                keys[at, self.d_v + d * STEP + l] = self.convert(self.bf16(row, d * STEP + l))
