"""Anything that holds a tensor, as a DLPack tensor: NumPy and torch directly, the rest through ``__dlpack__``.

Nothing is copied and nothing is checked beyond what the view itself needs; the library checks the rest.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .errors import ArgumentError
from .spec import DLPACK_TYPES

CPU, CUDA = 1, 2


class Tensor(ctypes.Structure):
    """``dsa_tvm_tensor`` of the C header, which is DLPack's ``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLPack's ``DLManagedTensorVersioned``."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


_READ_ONLY = 1
_KIND_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class View(NamedTuple):
    """The fields of a `Tensor`; strides None where the tensor is contiguous."""

    data: int
    device: tuple[int, int]
    dtype: tuple[int, int]
    shape: Sequence[int]
    strides: Sequence[int] | None


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
    return type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "data_ptr")


@functools.cache
def _numpy_type(dtype: Any) -> tuple[int, int]:
    """DLPack (code, bits) of a NumPy type; cached, because NumPy works out a type's name anew each time."""
    return DLPACK_TYPES.get(dtype.name) or (_KIND_CODES.get(dtype.kind, -1), dtype.itemsize * 8)


def _from_numpy(x: Any, fail, writable: bool) -> View:
    dtype = _numpy_type(x.dtype)
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


#: What makes a library take the tensor of a GPU, for one that does not.
_HINT = "; dsa-tvm build --target cuda makes a library that takes it"


@functools.cache
def _torch_type(dtype: Any) -> tuple[int, int]:
    """DLPack (code, bits) of a torch type."""
    name = str(dtype).removeprefix("torch.")
    # Quantized ones and others are opaque.
    integer = {"int": 0, "uint": 1, "bool": 6}.get(name.rstrip("0123456789"), 3)
    kind = 2 if dtype.is_floating_point else 5 if dtype.is_complex else integer
    return DLPACK_TYPES.get(name) or (kind, dtype.itemsize * 8)


def _from_torch(x: Any, fail, writable: bool, cuda: bool) -> View:
    import torch

    if torch.is_grad_enabled() and x.requires_grad:
        fail(
            "a tensor without requires_grad (there is no backward; use torch.no_grad())", "one that asks for gradients"
        )
    if x.layout is not torch.strided:
        fail("a dense tensor", f"layout {x.layout}")
    if x.device.type != "cpu" and not (cuda and x.is_cuda):
        hint = _HINT if x.is_cuda else ""
        fail("a tensor on the CPU" + " or on a CUDA GPU" * cuda, f"device {x.device}{hint}")
    if x.is_conj() or x.is_neg():
        fail("a resolved tensor", "one with its conjugate or negative bit set")
    strides = None if x.is_contiguous() else x.stride()
    device = (CUDA, x.device.index) if x.is_cuda else (CPU, 0)
    return View(x.data_ptr(), device, _torch_type(x.dtype), x.shape, strides)


def _from_dlpack(x: Any, fail, writable: bool, keep: list[Any], cuda: bool, stream: int) -> View:
    kind, number = (int(v) for v in x.__dlpack_device__())
    if kind != CPU and not (cuda and kind == CUDA):
        hint = _HINT if kind == CUDA else ""
        fail("a tensor on the CPU (DLPack device 1)" + " or on a CUDA GPU (2)" * cuda, f"DLPack device {kind}{hint}")
    # The producer makes that stream wait for the tensor; its number for the default one is 1.
    ready = {"stream": stream or 1} if kind == CUDA else {}
    try:
        capsule = x.__dlpack__(max_version=(1, 0), **ready)
    except TypeError:  # a producer from before DLPack 1.0
        capsule = x.__dlpack__(**ready)
    except BufferError as error:
        fail("a tensor that can be exported", str(error))
    name = _capsule_name(capsule) if type(capsule).__name__ == "PyCapsule" else None
    if name not in (b"dltensor", b"dltensor_versioned"):  # used_dltensor: another consumer has taken the tensor
        fail("a DLPack capsule that has not been used", f"one named {name!r}" if name else type(capsule).__name__)
    keep.append(capsule)
    pointer = _capsule_pointer(capsule, name)
    if name == b"dltensor_versioned":
        managed = _Versioned.from_address(pointer)
        if managed.major != 1:
            fail("DLPack version 1", f"version {managed.major}")
        if writable and managed.flags & _READ_ONLY:
            fail("a writable tensor", "a read-only one")
        tensor = managed.tensor
    else:  # the unversioned DLManagedTensor starts with its DLTensor
        tensor = Tensor.from_address(pointer)
    if tensor.lanes != 1:
        fail("one lane", f"{tensor.lanes}")
    n = tensor.ndim
    strides = tensor.strides[:n] if tensor.strides else None
    return View(
        (tensor.data or 0) + tensor.byte_offset, (kind, number), (tensor.code, tensor.bits), tensor.shape[:n], strides
    )


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
        return _from_dlpack(x, fail, writable, keep, cuda, stream)
    return fail("a tensor (NumPy, torch, or anything with DLPack)", type(x).__name__)
