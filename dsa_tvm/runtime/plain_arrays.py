"""Plain arrays of NumPy: contiguous, of the machine's byte order, and of no subclass."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .tensors import numpy_type

#: Where an array goes in the words of a frame: its element type, the slice of its lengths, and the word of its address.
#: None for an input that is not given.
Place = tuple[Any, slice, int] | None


class NumpyArrays:
    """`numpy.ndarray`.

    `write` does in one loop what it could ask one function after the other for, because that loop is a third of the
    time of a short call. For the same reason it calls ``zip`` without ``strict``: its arguments are equally long.

    Parameters
    ----------
    numpy : module

    Attributes
    ----------
    kind : type
        NumPy's own type and no subclass, which may give its contents another meaning.
    """

    def __init__(self, numpy: Any) -> None:
        self.kind = numpy.ndarray
        self._numpy = numpy
        self._address = _numpy_address(numpy)

    def dl_type(self, dtype: Any) -> tuple[int, int] | None:
        """DLPack (code, bits) of an element type; None if it has none."""
        known = numpy_type(dtype) if dtype.isnative else None
        return known if known is not None and known[1] < 256 else None

    def dtype(self, name: str) -> Any:
        """The element type that has this name in an OpSpec."""
        return self._numpy.dtype(name)

    def write(self, words: Any, places: Sequence[Place], arrays: Sequence[Any]) -> bool:
        """Write lengths and addresses of inputs into a frame.

        Returns
        -------
        bool
            Whether each of them is plain and has the type of its place.

        Raises
        ------
        ValueError
            One has another rank than its place.
        """
        kind, address = self.kind, self._address
        for x, place in zip(arrays, places):  # noqa: B905
            if place is None:
                if x is not None:
                    return False
                continue
            dtype, lengths, at = place
            if type(x) is not kind or not x.flags.c_contiguous or (x.dtype is not dtype and x.dtype != dtype):
                return False
            words[lengths] = x.shape
            words[at] = address(x)
        return True

    def write_outputs(self, words: Any, places: Sequence[Place], arrays: Sequence[Any]) -> bool:
        """The same of outputs, which must be writable too."""
        return self.write(words, places, arrays) and all(x.flags.writeable for x in arrays)

    def make(self, words: Any, place: Any, shape: Sequence[int]) -> Any:
        """Make an array, and write it into a frame. Raises MemoryError or ValueError if it cannot be."""
        dtype, lengths, at = place
        x = self._numpy.empty(shape, dtype)
        words[lengths] = shape
        words[at] = self._address(x)
        return x


def _numpy_address(numpy: Any) -> Callable[[Any], int]:
    """A function for the address of an array's elements. It reads the first field behind the object's head.

    C extensions read the same field: it is part of NumPy's ABI. This takes a fifth of the time of
    `numpy.ndarray.ctypes`, which is used instead if a first try shows a difference.
    """

    def by_ctypes(x: Any) -> int:
        return x.ctypes.data

    if sys.implementation.name != "cpython":
        return by_ctypes
    field, head = ctypes.c_size_t.from_address, object.__basicsize__

    def by_field(x: Any) -> int:
        return field(id(x) + head).value

    base = numpy.zeros((3, 4), numpy.float32)
    tried = (base, base[1:], base.view(numpy.int16)[2], numpy.zeros(0))
    return by_field if all(by_field(x) == x.ctypes.data for x in tried) else by_ctypes
