"""Plain arrays: of NumPy or torch, contiguous, on the CPU, and with nothing else that a call would have to respect."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .tensors import numpy_type, torch_type


class Kind(Protocol):
    """The arrays of one package.

    Attributes
    ----------
    kind : type of the arrays
        The package's own type and no subclass, which may give its contents another meaning.
    """

    kind: Any

    def address(self, x: Any) -> int:
        """The address of the first element."""

    def dl_type(self, dtype: Any) -> tuple[int, int] | None:
        """DLPack (code, bits) of an element type; None if it has none."""

    def is_plain(self, x: Any) -> bool:
        """Whether an array of `kind` is plain."""

    def is_plain_output(self, x: Any) -> bool:
        """Whether it may also be written to."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """A new array. Raises MemoryError, RuntimeError or ValueError if it cannot be made."""

    def dtype(self, name: str) -> Any:
        """The element type that has this name in an OpSpec."""


class _NumpyArrays:
    """`numpy.ndarray`."""

    def __init__(self, numpy: Any) -> None:
        self.kind = numpy.ndarray
        self._numpy = numpy
        self.address = _numpy_address(numpy)

    def dl_type(self, dtype: Any) -> tuple[int, int] | None:
        known = numpy_type(dtype) if dtype.isnative else None
        return known if known is not None and known[1] < 256 else None

    def is_plain(self, x: Any) -> bool:
        return x.flags.c_contiguous

    def is_plain_output(self, x: Any) -> bool:
        return x.flags.c_contiguous and x.flags.writeable

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._numpy.empty(shape, dtype)

    def dtype(self, name: str) -> Any:
        return self._numpy.dtype(name)


class _TorchTensors:
    """`torch.Tensor`."""

    def __init__(self, torch: Any) -> None:
        self.kind = torch.Tensor
        self._torch, self._strided, self._cpu = torch, torch.strided, torch.device("cpu")
        self.address = torch.Tensor.data_ptr
        self.dl_type = torch_type

    def is_plain(self, x: Any) -> bool:
        return x.layout is self._strided and x.is_cpu and not x.requires_grad and x.is_contiguous() and not x.is_neg()

    def is_plain_output(self, x: Any) -> bool:
        return False  # torch has to be told of the write

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._torch.empty(*shape, dtype=dtype, device=self._cpu)

    def dtype(self, name: str) -> Any:
        return getattr(self._torch, name)


def _numpy_address(numpy: Any) -> Callable[[Any], int]:
    """A function for the address of an array's elements. It reads the first field behind the object's head.

    C extensions read the same field: it is part of NumPy's ABI. This takes a fifth of the time of
    `numpy.ndarray.ctypes`, which is used instead if a first try shows a difference.
    """

    def by_ctypes(x: Any) -> int:
        return x.ctypes.data

    if sys.implementation.name != "cpython":
        return by_ctypes
    field, head = ctypes.c_void_p.from_address, object.__basicsize__

    def by_field(x: Any) -> int:
        return field(id(x) + head).value or 0

    base = numpy.zeros((3, 4), numpy.float32)
    tried = (base, base[1:], base.view(numpy.int16)[2], numpy.zeros(0))
    return by_field if all(by_field(x) == x.ctypes.data for x in tried) else by_ctypes


_kinds: dict[type, Kind] = {}


def kind_of(x: Any) -> Kind | None:
    """The kind of `x`; None if it is neither an array of NumPy nor a tensor of torch."""
    known = _kinds.get(type(x))
    if known is None:
        for name, array, make in (("numpy", "ndarray", _NumpyArrays), ("torch", "Tensor", _TorchTensors)):
            module = sys.modules.get(name)
            if module is not None and type(x) is getattr(module, array, None):
                known = _kinds[type(x)] = make(module)
    return known
