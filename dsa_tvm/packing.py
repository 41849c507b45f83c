"""Rows of the latent cache in bytes: fp8 with scales, and bfloat16 for what is key only.

A row is, in this order, d_v float8_e4m3fn, d_v / 128 little-endian float32 that each scale 128 of them, and d_qk - d_v
bfloat16: 656 bytes for 576 and 512. FlashMLA and vLLM lay out theirs in the same way.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from .element_types import decode, encode
from .errors import ArgumentError
from .tensors import is_torch

#: Numbers that share a scale.
GROUP = 128

#: The largest float8_e4m3fn, and what the largest number of a group is taken to be at least.
_FP8_MAX, _LEAST = 448.0, 1e-4


def pack_mla_rows(values: Any, d_v: int = 512, *, power_of_two: bool = False) -> Any:
    """Latent rows as `sparse_mla_fp8` takes them.

    Each 128 of the first d_v entries of a row are divided by ``max(amax, 1e-4) / 448`` and rounded to float8_e4m3fn;
    the others are rounded to bfloat16. Both to nearest even.

    Parameters
    ----------
    values : array or torch tensor [s_kv, d_qk], floating point
        Finite numbers.
    d_v : int
        A multiple of 128, at most d_qk.
    power_of_two : bool
        Whether scales are rounded up to powers of two.

    Returns
    -------
    rows : tensor [s_kv, d_v + d_v / 32 + 2 * (d_qk - d_v)], uint8
        As `values` are: a NumPy array, or a torch tensor where they are.

    Raises
    ------
    ArgumentError
        No matrix, or a width that cannot be packed.
    """
    _check("pack_mla_rows: values", values, d_v, least=d_v)
    if is_torch(values):
        return _pack_torch(values, d_v, power_of_two)
    values = np.asarray(values).astype(np.float32)
    groups = values[:, :d_v].reshape(len(values), d_v // GROUP, GROUP)
    scale = np.maximum(np.abs(groups).max(-1), np.float32(_LEAST)) / np.float32(_FP8_MAX)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    with np.errstate(invalid="ignore"):
        codes = encode(groups / scale[..., None], "float8_e4m3fn").reshape(-1, d_v)
    key_only = encode(values[:, d_v:], "bfloat16").astype("<u2")
    return np.concatenate([codes, scale.astype("<f4").view(np.uint8), key_only.view(np.uint8)], 1)


def _pack_torch(values: Any, d_v: int, power_of_two: bool) -> Any:
    import torch

    groups = values[:, :d_v].float().reshape(len(values), d_v // GROUP, GROUP)
    scale = groups.abs().amax(-1).clamp(min=_LEAST) / _FP8_MAX
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
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
        Where `rows` is a torch tensor, bfloat16; else float32, which holds all of it.

    Raises
    ------
    ArgumentError
        No matrix, or a width that no packed rows have.
    """
    scales = d_v + d_v // GROUP * 4
    _check("unpack_mla_rows: rows", rows, d_v, least=scales)
    if (rows.shape[1] - scales) % 2:
        raise ArgumentError(f"unpack_mla_rows: rows: expected an even number of bytes, got {rows.shape[1]}")
    if is_torch(rows):
        import torch

        # A copy also of what is contiguous already: the part of a single row may lie at any address.
        ends = (0, d_v, scales, rows.shape[1])
        parts = (rows[:, a:b].clone(memory_format=torch.contiguous_format) for a, b in pairwise(ends))
        codes, scale, key_only = (x.view(t) for x, t in zip(parts, _torch_types(), strict=True))
        groups = codes.float().view(len(rows), d_v // GROUP, GROUP) * scale[..., None]
        return torch.cat([groups.view(len(rows), d_v).bfloat16(), key_only], 1)
    rows = np.asarray(rows)
    scale = np.ascontiguousarray(rows[:, d_v:scales]).view("<f4").astype(np.float32)
    groups = decode(rows[:, :d_v], "float8_e4m3fn").reshape(len(rows), d_v // GROUP, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        values = (groups * scale[..., None]).reshape(len(rows), d_v)
    key_only = np.ascontiguousarray(rows[:, scales:]).view("<u2").astype(np.uint16)
    return decode(np.concatenate([encode(values, "bfloat16"), key_only], 1), "bfloat16")


def _torch_types() -> tuple[Any, ...]:
    import torch

    return torch.float8_e4m3fn, torch.float32, torch.bfloat16


def _check(where: str, x: Any, d_v: int, least: int) -> None:
    if d_v < GROUP or d_v % GROUP:
        raise ArgumentError(f"{where}: expected d_v to be a multiple of {GROUP}, got {d_v}")
    shape = list(getattr(x, "shape", ()))
    if len(shape) != 2 or shape[1] < least:
        raise ArgumentError(f"{where}: expected a matrix of at least {least} columns, got shape {shape}")
