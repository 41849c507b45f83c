"""Element types as bits: what a machine needs to measure kernels of types that NumPy lacks without further packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

#: What holds an element's bits.
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


def _fp8_values() -> np.ndarray:
    """The numbers of the codes 0..126: a sign, four bits of exponent with bias 7, three of mantissa, no infinity."""
    codes = np.arange(_FP8_NAN)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return values.astype(np.float32)


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round f32 numbers to `dtype`, to nearest, ties to even; the bits, in `STORAGE`.

    What is too large for float8_e4m3fn or int8 becomes the number of that type that is next to it; NaN, of which int8
    has none, becomes 0 there.
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
    """The numbers that the bits of `encode` stand for: f32, or integers as they are."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float8_e4m3fn":
        positive = np.append(_fp8_values(), np.float32(np.nan))
        return np.concatenate([positive, -positive])[bits]
    return bits if dtype in ("int32", "uint8") else bits.astype(np.float32)
