"""Tools for all CUDA kernels: calls of device functions, and the layout of arrays in shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tvm.script import tirx as T

WARP = 32


@dataclass(frozen=True)
class Place:
    """An array in shared memory.

    Parameters
    ----------
    shape : tuple of int or expression
    dtype : str
    elem_offset : int
        Offset from the start of the pool in elements of `dtype`, as ``T.decl_buffer`` expects it.
    """

    shape: tuple
    dtype: str
    elem_offset: int


class SharedPool:
    """Lays out arrays in the single allocation of shared memory that a kernel has.

    TVM would make an allocation for each array. But a kernel can have only one dynamic allocation, and static ones are
    limited to 48 KiB. The last array may have a symbolic length.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def place(self, shape: tuple, dtype: str, align: int = 16) -> Place:
        """The next `shape` of `dtype`, aligned to `align` bytes."""
        start, size = -(-self.bytes // align) * align, np.dtype(dtype).itemsize
        if all(isinstance(n, int) for n in shape):
            self.bytes = start + math.prod(shape) * size
        return Place(shape, dtype, start // size)


def shared(pool, place: Place):
    """The buffer at `place` of the kernel's `pool`."""
    return T.decl_buffer(place.shape, place.dtype, data=pool.data, elem_offset=place.elem_offset, scope="shared.dyn")


def call(name: str, *args, dtype: str = "int32"):
    """A call of the device function `dsa_<name>`. As a statement it needs ``T.evaluate`` around it."""
    return T.call_extern(dtype, f"dsa_{name}", *args)
