"""Anything that holds a tensor, as a DLPack tensor: NumPy and torch directly, the rest through ``__dlpack__``.

Nothing is copied and nothing is checked beyond what the view itself needs; the library checks the rest.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from .dlpack import CPU, CUDA, HINT, Tensor, View, from_producer
from .errors import ArgumentError
from .spec import DLPACK_TYPES

_KIND_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}

_FIELDS = struct.Struct("@QiiiBBHQQQ")
assert _FIELDS.size == ctypes.sizeof(Tensor)


class Pack:
    """Views as an array of pointers to `Tensor`, null for None. Made with few ctypes objects: they cost a microsecond.

    Attributes
    ----------
    pointers : ctypes array of void pointers
        Valid while the `Pack` lives.
    """

    def __init__(self, views: Sequence[View | None]) -> None:
        lengths: list[int] = []
        for view in views:
            if view is not None:
                lengths += view.shape
                lengths += view.strides or ()
        self._lengths = (ctypes.c_int64 * len(lengths))(*lengths)
        self._tensors = ctypes.create_string_buffer(_FIELDS.size * len(views))
        address, at = ctypes.addressof(self._tensors), ctypes.addressof(self._lengths)
        pointers: list[int | None] = []
        for i, view in enumerate(views):
            if view is None:
                pointers.append(None)
                continue
            data, device, dtype, shape, strides = view
            ndim, offset = len(shape), i * _FIELDS.size
            strides_at = at + 8 * ndim if strides else 0
            _FIELDS.pack_into(self._tensors, offset, data, *device, ndim, *dtype, 1, at, strides_at, 0)
            at += 16 * ndim if strides else 8 * ndim
            pointers.append(address + offset)
        self.pointers = (ctypes.c_void_p * len(views))(*pointers)


def is_torch(x: Any) -> bool:
    """Whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, getattr(torch, "Tensor", ()))


def note_written(tensors: Iterable[Any]) -> None:
    """Tell torch that its tensors among these hold something else now: a backward that wants the old would be wrong."""
    for x in tensors:
        if is_torch(x) and not x.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(x)


@functools.cache
def numpy_type(dtype: Any) -> tuple[int, int]:
    """DLPack (code, bits) of a NumPy type; cached, because NumPy works out a type's name anew each time."""
    return DLPACK_TYPES.get(dtype.name) or (_KIND_CODES.get(dtype.kind, -1), dtype.itemsize * 8)


def _from_numpy(x: Any, fail, writable: bool) -> View:
    dtype = numpy_type(x.dtype)
    if dtype[0] < 0 or dtype[1] > 255:
        fail("a numeric array", f"dtype {x.dtype}")
    if not x.dtype.isnative:
        fail("native byte order", f"dtype {x.dtype.str}")
    if writable and not x.flags.writeable:
        fail("a writable array", "a read-only one")
    strides = None
    if not x.flags.c_contiguous:
        size = x.dtype.itemsize
        if any(s % size for s in x.strides):
            fail("a contiguous array", f"strides of {x.strides} bytes")
        strides = [s // size for s in x.strides]
    return View(x.ctypes.data, (CPU, 0), dtype, x.shape, strides)


@functools.cache
def torch_type(dtype: Any) -> tuple[int, int]:
    """DLPack (code, bits) of a torch type."""
    name, bits = str(dtype).removeprefix("torch."), dtype.itemsize * 8
    # Quantized ones and others are opaque, and so is what has fewer bits than its storage.
    integer = {f"int{bits}": 0, f"uint{bits}": 1, "bool": 6}.get(name, 3)
    kind = 2 if dtype.is_floating_point else 5 if dtype.is_complex else integer
    return DLPACK_TYPES.get(name) or (kind, bits)


def _from_torch(x: Any, fail, writable: bool, cuda: bool) -> View:
    import torch

    if torch.is_grad_enabled() and x.requires_grad:
        fail(
            "a tensor without requires_grad (there is no backward; use torch.no_grad())", "one that asks for gradients"
        )
    if x.layout is not torch.strided:
        fail("a dense tensor", f"layout {x.layout}")
    if x.device.type != "cpu" and not (cuda and x.is_cuda):
        hint = HINT if x.is_cuda else ""
        fail("a tensor on the CPU" + " or on a CUDA GPU" * cuda, f"device {x.device}{hint}")
    if x.is_conj() or x.is_neg():
        fail("a resolved tensor", "one with its conjugate or negative bit set")
    strides = None if x.is_contiguous() else x.stride()
    device = (CUDA, x.device.index) if x.is_cuda else (CPU, 0)
    return View(x.data_ptr(), device, torch_type(x.dtype), x.shape, strides)


def cuda_stream(tensors: Iterable[Any]) -> int:
    """The current stream of the GPU that the first torch tensor is on; 0, the default stream, where there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    on_gpus = (x.device for x in tensors if is_torch(x) and x.is_cuda)
    return next((torch.cuda.current_stream(device).cuda_stream for device in on_gpus), 0)


def as_tensor(
    op: str, name: str, x: Any, keep: list[Any], *, writable: bool = False, cuda: bool = False, stream: int = 0
) -> View:
    """A view of `x`; what must outlive the call is appended to `keep`.

    Parameters
    ----------
    op, name : str
        Whose argument it is.
    x : tensor
    keep : list
    writable : bool
        Whether it will be written to.
    cuda : bool
        Whether it may be on a GPU.
    stream : int
        Where it will be used then.

    Raises
    ------
    ArgumentError
        `x` is no tensor, or one that cannot be seen as a DLPack tensor on such a device.
    """

    def fail(expected: str, got: str):
        raise ArgumentError(f"{op}: {name}: expected {expected}, got {got}")

    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(x, numpy.ndarray):
        return _from_numpy(x, fail, writable)
    if is_torch(x):
        return _from_torch(x, fail, writable, cuda)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return from_producer(x, fail, writable, keep, cuda, stream)
    return fail("a tensor (NumPy, torch, or anything with DLPack)", type(x).__name__)
