"""Packed rows of the latent cache: fp8 with scales for the part that is key and value, bfloat16 for the key-only part.

A row holds, in this order, d_v float8_e4m3fn, d_v / 128 little-endian float32 that each scale 128 of these, and
d_qk - d_v bfloat16: 656 bytes for d_qk 576 and d_v 512. FlashMLA and vLLM use the same layout.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .element_types import decode, encode
from .tensors import is_torch

#: Numbers that share a scale.
GROUP = 128

#: The largest float8_e4m3fn, and the least value that the amax of a group (or its scale) is clamped to.
_FP8_MAX, _LEAST = 448.0, 1e-4


def pack_mla_rows(values: Any, d_v: int = 512, *, power_of_two: bool = False) -> Any:
    """Pack latent rows for `sparse_mla_fp8`.

    Each group of 128 among the first d_v entries of a row shares a scale. Its numbers are divided by the scale and
    rounded to float8_e4m3fn. The other entries are rounded to bfloat16. All rounding is to nearest even. The scale is
    ``max(amax, 1e-4) / 448``, or with `power_of_two` the least power of two from ``max(amax / 448, 1e-4)`` on. For
    bfloat16, the latter gives the same bytes as the packers of FlashMLA (`quant.py` in its tests), vLLM and FlashInfer.

    Parameters
    ----------
    values : array or torch tensor [s_kv, d_qk], floating point
        Finite numbers, in any memory layout.
    d_v : int
        A multiple of 128, at most d_qk.
    power_of_two : bool
        Whether to round scales up to powers of two; the smallest is 2**-13.

    Returns
    -------
    rows : tensor [s_kv, d_v + d_v / 32 + 2 * (d_qk - d_v)], uint8
        A torch tensor if `values` is one, otherwise a NumPy array.

    Raises
    ------
    ArgumentError
        `values` is not a matrix of floating-point numbers, or its width cannot be packed.
    """
    _check("pack_mla_rows: values", values, d_v, least=d_v)
    _check_type("pack_mla_rows: values", values, _is_floating(values), "a floating-point type")
    if is_torch(values):
        return _pack_torch(values, d_v, power_of_two)
    values = np.ascontiguousarray(values, np.float32)
    groups = values[:, :d_v].reshape(len(values), d_v // GROUP, GROUP)
    amax = np.abs(groups).max(-1)
    if power_of_two:
        mantissa, exponent = np.frexp(np.maximum(amax / np.float32(_FP8_MAX), np.float32(_LEAST)))
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    else:
        scale = np.maximum(amax, np.float32(_LEAST)) / np.float32(_FP8_MAX)
    with np.errstate(invalid="ignore"):
        codes = encode(groups / scale[..., None], "float8_e4m3fn").reshape(-1, d_v)
    key_only = encode(values[:, d_v:], "bfloat16").astype("<u2")
    return np.concatenate([codes, scale.astype("<f4").view(np.uint8), key_only.view(np.uint8)], 1)


def _pack_torch(values: Any, d_v: int, power_of_two: bool) -> Any:
    import torch

    values = values.detach().contiguous()
    groups = values[:, :d_v].float().reshape(len(values), d_v // GROUP, GROUP)
    amax = groups.abs().amax(-1)
    if power_of_two:
        mantissa, exponent = torch.frexp((amax / _FP8_MAX).clamp(min=_LEAST))
        scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    else:
        scale = amax.clamp(min=_LEAST) / _FP8_MAX
    codes = (groups / scale[..., None]).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    key_only = values[:, d_v:].bfloat16().contiguous()
    parts = [codes.view(torch.uint8).view(-1, d_v), scale.view(torch.uint8), key_only.view(torch.uint8)]
    return torch.cat(parts, 1)


def unpack_mla_rows(rows: Any, d_v: int = 512) -> Any:
    """The numbers that `sparse_mla_fp8` computes with: fp8 times scale, rounded to float32 and then to bfloat16.

    Parameters
    ----------
    rows : array or torch tensor [s_kv, d_packed], uint8
    d_v : int
        A multiple of 128.

    Returns
    -------
    values : tensor [s_kv, d_qk]
        bfloat16 if `rows` is a torch tensor, otherwise float32, which holds these numbers exactly.

    Raises
    ------
    ArgumentError
        `rows` is not a matrix of bytes, or packed rows cannot have its width.
    """
    scales = d_v + d_v // GROUP * 4
    _check("unpack_mla_rows: rows", rows, d_v, least=scales)
    _check_type("unpack_mla_rows: rows", rows, _type_name(rows) == "uint8", "uint8")
    if (rows.shape[1] - scales) % 2:
        raise ArgumentError(f"unpack_mla_rows: rows: expected an even number of bytes, got {rows.shape[1]}")
    if is_torch(rows):
        import torch

        ends = (0, d_v, scales, rows.shape[1])
        parts = (rows[:, a:b] for a, b in pairwise(ends))
        codes, scale, key_only = (_reinterpreted(x, t) for x, t in zip(parts, _torch_types(), strict=True))
        groups = codes.float().view(len(rows), d_v // GROUP, GROUP) * scale[..., None]
        return torch.cat([groups.view(len(rows), d_v).bfloat16(), key_only], 1)
    rows = np.asarray(rows)
    scale = np.ascontiguousarray(rows[:, d_v:scales]).view("<f4").astype(np.float32)
    groups = decode(rows[:, :d_v], "float8_e4m3fn").reshape(len(rows), d_v // GROUP, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        values = (groups * scale[..., None]).reshape(len(rows), d_v)
    key_only = np.ascontiguousarray(rows[:, scales:]).view("<u2").astype(np.uint16)
    return decode(np.concatenate([encode(values, "bfloat16"), key_only], 1), "bfloat16")


def _reinterpreted(part: Any, dtype: Any) -> Any:
    import torch

    # Copy even a contiguous part: that of a single row may lie at any address. Flatten it, because torch refuses to
    # change the element type of rows without elements.
    flat = part.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(dtype).view(len(part), part.shape[1] // dtype.itemsize)


def _torch_types() -> tuple[Any, ...]:
    import torch

    return torch.float8_e4m3fn, torch.float32, torch.bfloat16


def _type_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.") if is_torch(x) else np.asarray(x).dtype.name


def _is_floating(x: Any) -> bool:
    # NumPy does not know that the types of ml_dtypes are floating-point types.
    return x.is_floating_point() if is_torch(x) else "float" in _type_name(x)


def _check_type(where: str, x: Any, accepted: bool, expected: str) -> None:
    if not accepted:
        raise ArgumentError(f"{where}: expected {expected}, got {_type_name(x)}")


def _check(where: str, x: Any, d_v: int, least: int) -> None:
    if d_v < GROUP or d_v % GROUP:
        raise ArgumentError(f"{where}: expected d_v to be a multiple of {GROUP}, got {d_v}")
    shape = list(getattr(x, "shape", ()))
    if len(shape) != 2 or shape[1] < least:
        raise ArgumentError(f"{where}: expected a matrix of at least {least} columns, got shape {shape}")
