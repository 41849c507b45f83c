"""What this machine can do at most, as the library measures it: multiply-adds in registers, and reading memory."""

from __future__ import annotations

import ctypes
from typing import Any

from ..errors import ArgumentError, KernelError
from . import library

_INVALID_ARGUMENT, _UNSUPPORTED = 1, 3


def peak(dtype: str, num_threads: int = 0, seconds: float = 0.05) -> float | None:
    """Floating-point operations per second of multiply-adds in registers, with the instructions of the active target.

    Parameters
    ----------
    dtype : str
        What is multiplied: one of `ops.element_types.PRODUCTS`. Sums are float32, or int32 for int8.
    num_threads : int
        0 stands for the process default.
    seconds : float
        How long to try. The best that was reached meanwhile counts.

    Returns
    -------
    float or None
        A product and its addition are two operations. None if the target has no dot products of this type; its kernels
        then widen to float32. None too if the library is of an earlier version, which measures nothing.

    Raises
    ------
    ArgumentError
        An unknown type, or a number out of range.
    LibraryError
        As `library.load`.
    """
    return _measured("peak", dtype.encode(), num_threads, seconds)


def read_rate(size: int, num_threads: int = 0, seconds: float = 0.02) -> float | None:
    """Bytes per second of reading `size` bytes again and again, each thread its part: from whatever cache holds them.

    Parameters
    ----------
    size : int
        Bytes, at least 1. So many are allocated.
    num_threads, seconds
        As in `peak`.

    Returns
    -------
    float or None
        None if the library is of an earlier version.

    Raises
    ------
    ArgumentError
        A number out of range.
    KernelError
        There is no memory for that.
    LibraryError
        As `library.load`.
    """
    return _measured("read_rate", ctypes.c_int64(size), num_threads, seconds)


def _measured(name: str, what: Any, num_threads: int, seconds: float) -> float | None:
    lib = library.load()
    function = getattr(lib, f"dsa_tvm_{name}", None)
    if function is None:
        return None
    rate = ctypes.c_double()
    status = function(what, num_threads, ctypes.c_double(seconds), ctypes.byref(rate))
    if status not in (0, _UNSUPPORTED):
        error = ArgumentError if status == _INVALID_ARGUMENT else KernelError
        raise error(lib.dsa_tvm_last_error().decode())
    return None if status else rate.value
