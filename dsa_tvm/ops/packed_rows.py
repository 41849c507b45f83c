"""The format of packed latent rows, which `sparse_mla_fp8` reads, and its encoding and decoding with NumPy.

A row holds, in this order, d_v float8_e4m3fn, d_v / 128 little-endian float32 that each scale 128 of them, and
d_qk - d_v bfloat16, which are key only: 656 bytes for 576 and 512. FlashMLA and vLLM lay out theirs in the same way.
"""

from __future__ import annotations

import numpy as np

from ..spec import DIMS, ELEMENT_BYTES
from .element_types import decode, encode

#: Element types of what has scales, and of what is key only. All of a row is computed with in the latter.
SCALED, KEY_ONLY = "float8_e4m3fn", "bfloat16"

#: Numbers that share a scale.
GROUP = next(part.each for part in DIMS["d_packed"].parts if part.dim == "d_v")

#: The largest SCALED number.
LARGEST = 448.0
#: The largest number of a group, or its scale where it is a power of two, is taken to be at least this.
LEAST = 1e-4


def row_bytes(d_qk: int, d_v: int) -> int:
    """Bytes of a packed row."""
    found = DIMS["d_packed"].determined({"d_qk": d_qk, "d_v": d_v})
    assert found is not None
    return found


def scales_end(d_v: int) -> int:
    """Bytes of a row up to the end of its scales, where what is key only begins."""
    return d_v * ELEMENT_BYTES[SCALED] + d_v // GROUP * ELEMENT_BYTES["float32"]


def pack(values: np.ndarray, d_v: int, power_of_two: bool) -> np.ndarray:
    """Encode rows; the formula is that of `pack_mla_rows`.

    Parameters
    ----------
    values : ndarray [s_kv, d_qk], float32
    d_v : int
        A multiple of `GROUP`, at most d_qk.
    power_of_two : bool
        Whether scales are rounded up to powers of two.

    Returns
    -------
    ndarray [s_kv, row_bytes], uint8
    """
    groups = values[:, :d_v].reshape(len(values), d_v // GROUP, GROUP)
    amax = np.abs(groups).max(-1)
    if power_of_two:
        mantissa, exponent = np.frexp(np.maximum(amax / np.float32(LARGEST), np.float32(LEAST)))
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    else:
        scale = np.maximum(amax, np.float32(LEAST)) / np.float32(LARGEST)
    with np.errstate(invalid="ignore"):
        codes = encode(groups / scale[..., None], SCALED).reshape(-1, d_v)
    key_only = encode(values[:, d_v:], KEY_ONLY).astype("<u2")
    return np.concatenate([codes, scale.astype("<f4").view(np.uint8), key_only.view(np.uint8)], 1)


def unpack(rows: np.ndarray, d_v: int) -> np.ndarray:
    """Decode rows: fp8 times scale, rounded to float32 and then to bfloat16, to nearest even.

    Parameters
    ----------
    rows : ndarray [s_kv, row_bytes], uint8
    d_v : int
        A multiple of `GROUP`.

    Returns
    -------
    ndarray [s_kv, d_qk], float32
        Which holds every bfloat16.
    """
    scales = scales_end(d_v)
    scale = np.ascontiguousarray(rows[:, d_v:scales]).view("<f4").astype(np.float32)
    groups = decode(rows[:, :d_v], SCALED).reshape(len(rows), d_v // GROUP, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        values = (groups * scale[..., None]).reshape(len(rows), d_v)
    key_only = np.ascontiguousarray(rows[:, scales:]).view("<u2").astype(np.uint16)
    return decode(np.concatenate([encode(values, KEY_ONLY), key_only], 1), KEY_ONLY)
