"""Element types that NumPy lacks, as bits. Measuring kernels of these types then needs no further package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

#: The NumPy type that holds the bits of an element.
STORAGE: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float8_e4m3fn": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "uint8": np.dtype(np.uint8),
}
_FP8_NAN = 0x7F
#: The types that processors have multiply-adds or dot products of.
PRODUCTS = ("float32", "bfloat16", "int8")


def product_of(dtype: str) -> str:
    """In which of `PRODUCTS` queries of a type are multiplied, exactly, where the processor has it; else in float32."""
    return {"bfloat16": "bfloat16", "float8_e4m3fn": "bfloat16", "int8": "int8"}.get(dtype, "float32")


def _fp8_values() -> np.ndarray:
    """The values of the codes 0..126: a sign, 4 bits of exponent with bias 7, 3 of mantissa, and no infinity."""
    codes = np.arange(_FP8_NAN)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return values.astype(np.float32)


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round f32 numbers to `dtype`, to nearest even, and return the bits in the type that `STORAGE` has for it.

    Numbers that are too large for float8_e4m3fn or int8 become the largest of that type. int8 has no NaN, so NaN
    becomes 0 there.
    """
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))
    if dtype == "float8_e4m3fn":
        values = _fp8_values()
        middles = (values[1:] + values[:-1]) / 2
        size = np.abs(x)
        code = np.searchsorted(middles, size, "left").astype(np.uint8)
        # A number in the middle goes to the even code.
        tie = middles[np.minimum(code, len(middles) - 1)] == size
        code = np.where(tie, code + (code & 1), code).astype(np.uint8)
        code = np.where(np.isnan(x), np.uint8(_FP8_NAN), code)
        return (code | np.where(np.signbit(x), 0x80, 0).astype(np.uint8)).astype(np.uint8)
    if dtype == "int8":
        return np.clip(np.rint(np.nan_to_num(np.asarray(x), nan=0.0)), -128, 127).astype(np.int8)
    return np.ascontiguousarray(x, STORAGE[dtype])


def decode(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that bits from `encode` stand for: as f32, but integers as they are."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float8_e4m3fn":
        positive = np.append(_fp8_values(), np.float32(np.nan))
        return np.concatenate([positive, -positive])[bits]
    return bits if dtype in ("int32", "uint8") else bits.astype(np.float32)
