"""Plain arrays: of NumPy or torch, contiguous, on the CPU, and with nothing else that a call would have to respect."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .tensors import is_watching, note_written, numpy_type, torch_type

#: Where an array goes in the words of a frame: its element type, the slice of its lengths, and the word of its address.
#: None for an input that is not given.
Place = tuple[Any, slice, int] | None


class Kind(Protocol):
    """The arrays of one package.

    `write` does in one loop what it could ask one function after the other for, because that loop is a third of the
    time of a short call. For the same reason it calls ``zip`` without ``strict``: its arguments are equally long.

    Attributes
    ----------
    kind : type of the arrays
        The package's own type and no subclass, which may give its contents another meaning.
    """

    kind: Any

    def dl_type(self, dtype: Any) -> tuple[int, int] | None:
        """DLPack (code, bits) of an element type; None if it has none."""

    def dtype(self, name: str) -> Any:
        """The element type that has this name in an OpSpec."""

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

    def write_outputs(self, words: Any, places: Sequence[Place], arrays: Sequence[Any]) -> bool:
        """The same of outputs, which must be writable too."""

    def note_written(self, arrays: Sequence[Any]) -> None:
        """Tell the package that a call has written to outputs that it did not make."""

    def make(self, words: Any, place: Any, shape: Sequence[int]) -> Any:
        """Make an array, and write it into a frame. Raises MemoryError, RuntimeError or ValueError if it cannot be."""


class _NumpyArrays:
    """`numpy.ndarray`."""

    def __init__(self, numpy: Any) -> None:
        self.kind = numpy.ndarray
        self._numpy = numpy
        self._address = _numpy_address(numpy)

    def dl_type(self, dtype: Any) -> tuple[int, int] | None:
        known = numpy_type(dtype) if dtype.isnative else None
        return known if known is not None and known[1] < 256 else None

    def dtype(self, name: str) -> Any:
        return self._numpy.dtype(name)

    def write(self, words: Any, places: Sequence[Place], arrays: Sequence[Any]) -> bool:
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
        return self.write(words, places, arrays) and all(x.flags.writeable for x in arrays)

    def note_written(self, arrays: Sequence[Any]) -> None:
        pass

    def make(self, words: Any, place: Any, shape: Sequence[int]) -> Any:
        dtype, lengths, at = place
        x = self._numpy.empty(shape, dtype)
        words[lengths] = shape
        words[at] = self._address(x)
        return x


class _DispatchedTensors:
    """`torch.Tensor` as torch's dispatcher passes it on if the call's keys are plain: dense, on the CPU, not lazy."""

    def __init__(self, torch: Any) -> None:
        self.kind = torch.Tensor
        self._torch, self._cpu = torch, torch.device("cpu")
        self.dl_type = torch_type

    def dtype(self, name: str) -> Any:
        return getattr(self._torch, name)

    def write(self, words: Any, places: Sequence[Place], arrays: Sequence[Any]) -> bool:
        kind = self.kind
        for x, place in zip(arrays, places):  # noqa: B905
            if place is None:
                if x is not None:
                    return False
                continue
            dtype, lengths, at = place
            if type(x) is not kind or x.dtype is not dtype or x.requires_grad or not x.is_contiguous():
                return False
            words[lengths] = x.shape
            words[at] = x.data_ptr()
        return True

    def write_outputs(self, words: Any, places: Sequence[Place], arrays: Sequence[Any]) -> bool:
        return self.write(words, places, arrays)

    def note_written(self, arrays: Sequence[Any]) -> None:
        note_written(arrays)

    def make(self, words: Any, place: Any, shape: Sequence[int]) -> Any:
        dtype, lengths, at = place
        x = self._torch.empty(*shape, dtype=dtype, device=self._cpu)
        words[lengths] = shape
        words[at] = x.data_ptr()
        return x


class _TorchTensors(_DispatchedTensors):
    """`torch.Tensor` as a caller passes it, while torch neither records nor transforms what happens."""

    def __init__(self, torch: Any) -> None:
        super().__init__(torch)
        self._strided, self._is_watching = torch.strided, is_watching(torch)

    def write(self, words: Any, places: Sequence[Place], arrays: Sequence[Any]) -> bool:
        if self._is_watching():
            return False
        kind, strided = self.kind, self._strided
        for x, place in zip(arrays, places):  # noqa: B905
            if place is None:
                if x is not None:
                    return False
                continue
            dtype, lengths, at = place
            if type(x) is not kind or x.dtype is not dtype or x.requires_grad:
                return False
            if x.layout is not strided or not x.is_cpu or not x.is_contiguous() or x.is_neg():
                return False
            words[lengths] = x.shape
            words[at] = x.data_ptr()
        return True


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


def dispatched(torch: Any) -> Kind:
    """The kind of tensors that reach an operator through torch's dispatcher, see `_DispatchedTensors`."""
    return _DispatchedTensors(torch)
