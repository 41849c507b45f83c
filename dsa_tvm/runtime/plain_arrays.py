"""Plain arrays: NumPy's and torch's own, contiguous, on the CPU, with nothing else that a call would have to heed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .tensors import numpy_type, torch_type


class Kind(Protocol):
    """One package's arrays.

    Attributes
    ----------
    kind : type of the arrays
        The package's own, none that is made of it: a subclass may mean something else by its contents.
    """

    kind: Any

    def address(self, x: Any) -> int:
        """Where its elements are."""

    def dl_type(self, dtype: Any) -> tuple[int, int] | None:
        """DLPack (code, bits) of an element type; None where there is none."""

    def is_plain(self, x: Any) -> bool:
        """Whether one of `kind` is plain."""

    def is_plain_output(self, x: Any) -> bool:
        """Whether it may also be written to."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """A new one. Raises MemoryError, RuntimeError or ValueError."""

    def dtype(self, name: str) -> Any:
        """The element type of that name in an OpSpec."""


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
        return False  # torch has to be told that it was written to

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._torch.empty(*shape, dtype=dtype, device=self._cpu)

    def dtype(self, name: str) -> Any:
        return getattr(self._torch, name)


def _numpy_address(numpy: Any) -> Callable[[Any], int]:
    """Where an array's elements are, the way a C extension asks: by the first field behind the object's head.

    It is part of NumPy's ABI and takes a fifth of the time of `numpy.ndarray.ctypes`. It is tried first.
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
    """What `x` is one of; None where that is neither NumPy's nor torch's."""
    known = _kinds.get(type(x))
    if known is None:
        for name, array, make in (("numpy", "ndarray", _NumpyArrays), ("torch", "Tensor", _TorchTensors)):
            module = sys.modules.get(name)
            if module is not None and type(x) is getattr(module, array, None):
                known = _kinds[type(x)] = make(module)
    return known
