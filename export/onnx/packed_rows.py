"""Standard ONNX nodes that unpack rows of the latent cache from bytes to numbers."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ...ops.element_types import decode
from ...ops.packed_rows import GROUP, SCALED
from .body import Body


def unpack(b: Body, rows: str, d_v: str) -> str:
    """float32 [s_q, topk, d_qk] of uint8 rows [s_q, topk, d_packed]; `d_v` is int64 of shape [1]."""
    few, groups = b("Shape", rows, start=0, end=2), b("Div", d_v, b.const([GROUP]))
    scales_end = b("Add", d_v, b("Mul", groups, b.const([4])))
    end = b.length(rows, 2)

    def part(start: str, stop: str, *last: str) -> str:
        """Bytes [start, stop) of every row, with the last axis split into these lengths."""
        cut = b("Slice", rows, start, stop, b.const([2]))
        return b("Reshape", b.cast(cut, TensorProto.INT32), b("Concat", few, *last, axis=0), allowzero=1)

    codes = part(b.const([0]), d_v, groups, b.const([GROUP]))
    elements = b("Gather", b.const(decode(np.arange(256, dtype=np.uint8), SCALED)), codes, axis=0)
    scales = _float32(b, part(d_v, scales_end, groups, b.const([4])))
    values = b("Mul", elements, b.unsqueeze(scales, 3))
    values = b("Cast", b("Cast", values, to=TensorProto.BFLOAT16), to=TensorProto.FLOAT)
    count = b("Div", b("Sub", end, scales_end), b.const([2]))
    # A bf16 number is the upper half of an f32 number.
    halves = b(
        "Pad", part(scales_end, end, count, b.const([2])), b.const([0, 0, 0, 2, 0, 0, 0, 0]), b.const(np.int32(0))
    )
    width = b("Concat", few, d_v, axis=0)
    return b("Concat", b("Reshape", values, width), _float32(b, halves), axis=2)


def _float32(b: Body, quads: str) -> str:
    """float32 numbers from their little-endian bytes, which are the last axis of an int32 tensor."""
    first, second, third, fourth = (b("Gather", quads, b.const(i), axis=3) for i in range(4))
    half = b.const(np.int32(128))
    exponent = b("Add", b("Mul", b("Mod", fourth, half), b.const(np.int32(2))), b("Div", third, half))
    mantissa = b(
        "Add", b("Mul", b("Mod", third, half), b.const(np.int32(65536))), b("Mul", second, b.const(np.int32(256)))
    )
    mantissa = b.cast(b("Add", mantissa, first), TensorProto.DOUBLE)
    # By exponent: the unit of the mantissa and its leading bit. float64 holds all products exactly.
    exponents = np.arange(256)
    unit = np.where(exponents < 255, 2.0 ** (np.maximum(exponents, 1) - 150), np.inf)
    leading = np.where(exponents > 0, 2.0**23, 0.0)
    size = b("Mul", b("Add", mantissa, b("Gather", b.const(leading), exponent)), b("Gather", b.const(unit), exponent))
    is_nan = b("And", b("Equal", exponent, b.const(np.int32(255))), b("Greater", mantissa, b.const(np.float64(0))))
    size = b("Where", is_nan, b.const(np.float64(np.nan)), size)
    return b.cast(b("Where", b("Less", fourth, half), size, b("Neg", size)), TensorProto.FLOAT)
