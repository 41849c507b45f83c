"""Tools for all CUDA kernels: calls of device functions, and the layout of arrays in shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm.script import tirx as T

WARP = 32

#: Bytes of one element. Kernels keep no bool and no pointers in shared memory.
_BYTES = {"float32": 4, "int32": 4, "uint32": 4, "uint64": 8, "uint16": 2, "uint8": 1}


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
        """The next place, for an array of `shape` and `dtype`, aligned to `align` bytes."""
        start = -(-self.bytes // align) * align
        if all(isinstance(n, int) for n in shape):
            self.bytes = start + math.prod(shape) * _BYTES[dtype]
        return Place(shape, dtype, start // _BYTES[dtype])


def shared(pool, place: Place):
    """The buffer at `place` of the kernel's `pool`."""
    return T.decl_buffer(place.shape, place.dtype, data=pool.data, elem_offset=place.elem_offset, scope="shared.dyn")


def call(name: str, *args, dtype: str = "int32"):
    """A call of the device function `dsa_<name>`. As a statement it needs ``T.evaluate`` around it."""
    return T.call_extern(dtype, f"dsa_{name}", *args)
