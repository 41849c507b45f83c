"""Element types as TensorIR expressions.

Kernels read and write bf16, f16, fp8 and int8 as unsigned integers, and convert them with integer arithmetic. TVM's
float8_e4m3fn cast is wrong for zero, subnormals and NaN. Its bf16 and f16 casts may become library calls on CPUs that
lack such instructions. And the expressions here do not depend on the floating-point mode of the caller.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

#: Elements that are converted or copied at a time. Every width (d_idx, d_qk, d_v) is a multiple of it.
STEP = 32

#: How many products of a dot product are summed in one chain. Longer dot products are sums of such sums. The rounding
#: errors of equal addends all have the same sign, so a chain of n of them may be off by n / 2 roundings.
CHAIN = 128

#: Bytes of a cache line, on every CPU that we know.
LINE = 64

#: f32 elements that a vector register of each CPU target holds.
VECTOR = {
    "x86-64-v2": 4,
    "x86-64-v3": 8,
    "x86-64-v3-vnni": 8,
    "x86-64-v4": 16,
    "x86-64-v4-vnni": 16,
    "x86-64-v4-bf16": 16,
    "x86-64-v4-amx": 16,
    "aarch64": 4,
    "aarch64-dotprod": 4,
    "aarch64-i8mm": 4,
    "aarch64-bf16": 4,
}


def u32(x):
    return T.Cast("uint32", x)


def f32_bits(x):
    return T.reinterpret("float32", x)


def prefetch(element):
    """Ask for the cache line of a buffer's element, to be read soon. Nothing is read, whatever the address."""
    return tirx.call_intrin("void", "tirx.prefetch", T.address_of(element), T.int32(0), T.int32(2), T.int32(1))


def is_nan(x):
    """Whether the f32 `x` is NaN. TVM folds ``x != x`` to false."""
    return (T.reinterpret("int32", x) & T.int32(0x7FFFFFFF)) > T.int32(0x7F800000)


def _widen_small(x, exponent_bits: int, mantissa_bits: int, has_inf: bool):
    """The f32 value of an IEEE-like number that is stored in a uint32. It is exact for all codes."""
    bias = (1 << (exponent_bits - 1)) - 1
    shift = 23 - mantissa_bits
    magnitude_mask = (1 << (exponent_bits + mantissa_bits)) - 1
    top = ((1 << exponent_bits) - 1) << mantissa_bits

    def convert(m):
        normal = f32_bits((m << T.uint32(shift)) + T.uint32((127 - bias) << 23))
        subnormal = T.Cast("float32", T.Cast("int32", m)) * T.float32(2.0 ** (1 - bias - mantissa_bits))
        value = T.Select(m < T.uint32(1 << mantissa_bits), subnormal, normal)
        if has_inf:
            return T.Select(m >= T.uint32(top), f32_bits((m << T.uint32(shift)) | T.uint32(0x7F800000)), value)
        return T.Select(m == T.uint32(magnitude_mask), f32_bits(T.uint32(0x7FC00000)), value)

    sign = (x >> T.uint32(exponent_bits + mantissa_bits)) << T.uint32(31)
    magnitude = convert(x & T.uint32(magnitude_mask))
    return f32_bits(T.reinterpret("uint32", magnitude) | sign)


def widen(x, dtype: str):
    """The exact f32 value of the stored element `x`, including NaN and infinities."""
    if dtype == "float32":
        return x
    if dtype == "bfloat16":
        return f32_bits(u32(x) << T.uint32(16))
    if dtype == "float16":
        return _widen_small(u32(x), 5, 10, has_inf=True)
    if dtype == "float8_e4m3fn":
        return _widen_small(u32(x), 4, 3, has_inf=False)
    if dtype == "int8":
        return T.Cast("float32", T.Cast("int32", x ^ T.uint8(0x80)) - T.int32(0x80))
    raise ValueError(f"no element type {dtype}")


def narrow(x, dtype: str):
    """The element to store for the f32 value `x`. It is rounded to nearest even, and NaN stays NaN."""
    if dtype == "float32":
        return x
    if dtype == "bfloat16":
        b = T.reinterpret("uint32", x)
        rounded = (b + T.uint32(0x7FFF) + ((b >> T.uint32(16)) & T.uint32(1))) >> T.uint32(16)
        return T.Cast("uint16", T.Select(is_nan(x), T.uint32(0x7FC0), rounded))
    if dtype == "float16":

        def magnitude(m):
            # Adding 0.5 aligns a value below 2**-14 so that the hardware's own rounding leaves the f16 subnormal's
            # bits at the bottom of the f32 mantissa.
            subnormal = T.reinterpret("uint32", f32_bits(m) + T.float32(0.5)) - T.uint32(0x3F000000)
            odd = (m >> T.uint32(13)) & T.uint32(1)
            normal = (m - T.uint32(112 << 23) + T.uint32(0xFFF) + odd) >> T.uint32(13)
            finite = T.Select(m < T.uint32(113 << 23), subnormal, normal)
            # 65520 and above round to infinity.
            large = T.Select(m > T.uint32(0x7F800000), T.uint32(0x7E00), T.uint32(0x7C00))
            return T.Select(m >= T.uint32(0x477FF000), large, finite)

        b = T.reinterpret("uint32", x)
        half = magnitude(b & T.uint32(0x7FFFFFFF))
        return T.Cast("uint16", half | ((b >> T.uint32(16)) & T.uint32(0x8000)))
    raise ValueError(f"no element type {dtype}")
