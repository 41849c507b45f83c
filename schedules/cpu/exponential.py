"""The exponential of a softmax, as an expression that vectorizes."""

from __future__ import annotations

import math

from tvm.script import tirx as T

from .elements import is_nan

# exp(x) = 2**n * exp(f), n = round(x / ln 2), |f| <= ln(2) / 2. The Taylor sum to the 6th power is then within 2e-7.
_EXP = [1 / math.factorial(i) for i in range(7)]
_EXP_UNDERFLOW = -87.0


def exp_nonpositive(x):
    """Exp of a non-positive f32 or NaN; 0 below -87. TVM's exp would become a scalar call for each element."""
    # Without the clamp, the conversion of NaN and -inf to an integer would be undefined.
    clamped = T.Select(x >= T.float32(_EXP_UNDERFLOW), x, T.float32(_EXP_UNDERFLOW))
    n = T.floor(clamped * T.float32(math.log2(math.e)) + T.float32(0.5))
    # ln 2 in two parts. The first has so few bits that n times it is exact.
    f = clamped - n * T.float32(0.693359375) - n * T.float32(-2.12194440e-4)
    poly = T.float32(_EXP[6])
    for c in reversed(_EXP[:6]):
        poly = poly * f + T.float32(c)
    power = T.reinterpret("float32", (T.Cast("int32", n) + T.int32(127)) << T.int32(23))
    return T.Select(x >= T.float32(_EXP_UNDERFLOW), poly * power, T.Select(is_nan(x), x, T.float32(0)))
