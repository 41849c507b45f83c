"""Packs and unpacks a user's latent rows, NumPy arrays or torch tensors, in the format of `ops.packed_rows`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..ops import packed_rows
from ..ops.packed_rows import GROUP, LARGEST, LEAST
from .tensors import is_torch


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
    return packed_rows.pack(np.ascontiguousarray(values, np.float32), d_v, power_of_two)


def _pack_torch(values: Any, d_v: int, power_of_two: bool) -> Any:
    import torch

    values = values.detach().contiguous()
    groups = values[:, :d_v].float().reshape(len(values), d_v // GROUP, GROUP)
    amax = groups.abs().amax(-1)
    if power_of_two:
        mantissa, exponent = torch.frexp((amax / LARGEST).clamp(min=LEAST))
        scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    else:
        scale = amax.clamp(min=LEAST) / LARGEST
    codes = (groups / scale[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
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
    scales = packed_rows.scales_end(d_v)
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
    return packed_rows.unpack(np.asarray(rows), d_v)


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
