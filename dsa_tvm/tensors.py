"""Anything that holds a tensor, as a DLPack tensor: NumPy and torch directly, the rest through ``__dlpack__``.

Nothing is copied and nothing is checked beyond what the view itself needs; the library checks the rest.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from .errors import ArgumentError
from .spec import DLPACK_TYPES

CPU = 1


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


def _make(data: int, device: tuple[int, int], dtype: tuple[int, int], shape, strides) -> Tensor:
    ndim = len(shape)
    lengths = ctypes.c_int64 * ndim
    # The structure keeps the arrays alive: ctypes records what a pointer field was assigned from.
    return Tensor(data, *device, ndim, *dtype, 1, lengths(*shape), lengths(*strides), 0)


def is_torch(x: Any) -> bool:
    """Whether `x` is a torch tensor, without importing torch."""
    return type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "data_ptr")


@functools.cache
def _numpy_type(dtype: Any) -> tuple[int, int]:
    """DLPack (code, bits) of a NumPy type; cached, because NumPy works out a type's name anew each time."""
    return DLPACK_TYPES.get(dtype.name) or (_KIND_CODES.get(dtype.kind, -1), dtype.itemsize * 8)


def _from_numpy(x: Any, fail, writable: bool) -> Tensor:
    dtype = _numpy_type(x.dtype)
    if dtype[0] < 0 or dtype[1] > 255:
        fail("a numeric array", f"dtype {x.dtype}")
    if not x.dtype.isnative:
        fail("native byte order", f"dtype {x.dtype.str}")
    if writable and not x.flags.writeable:
        fail("a writable array", "a read-only one")
    size = x.dtype.itemsize
    if any(s % size for s in x.strides):
        fail("a contiguous array", f"strides of {x.strides} bytes")
    return _make(x.__array_interface__["data"][0], (CPU, 0), dtype, x.shape, [s // size for s in x.strides])


def _from_torch(x: Any, fail, writable: bool) -> Tensor:
    import torch

    if torch.is_grad_enabled() and x.requires_grad:
        fail(
            "a tensor without requires_grad (there is no backward; use torch.no_grad())", "one that asks for gradients"
        )
    if x.layout is not torch.strided:
        fail("a dense tensor", f"layout {x.layout}")
    if x.device.type != "cpu":
        fail("a tensor on the CPU", f"device {x.device}")
    if x.is_conj() or x.is_neg():
        fail("a resolved tensor", "one with its conjugate or negative bit set")
    name = str(x.dtype).removeprefix("torch.")
    kind = 2 if x.dtype.is_floating_point else 5 if x.dtype.is_complex else 6 if x.dtype is torch.bool else 0
    dtype = DLPACK_TYPES.get(name) or (kind, x.element_size() * 8)
    return _make(x.data_ptr(), (CPU, 0), dtype, x.shape, x.stride())


def _from_dlpack(x: Any, fail, writable: bool, keep: list[Any]) -> Tensor:
    device = tuple(int(v) for v in x.__dlpack_device__())
    if device[0] != CPU:
        fail("a tensor on the CPU (DLPack device 1)", f"DLPack device {device[0]}")
    try:
        capsule = x.__dlpack__(max_version=(1, 0))
    except TypeError:  # a producer from before DLPack 1.0
        capsule = x.__dlpack__()
    except BufferError as error:
        fail("a tensor that can be exported", str(error))
    keep.append(capsule)
    name = _capsule_name(capsule)
    pointer = _capsule_pointer(capsule, name)
    if name == b"dltensor_versioned":
        managed = _Versioned.from_address(pointer)
        if managed.major != 1:
            fail("DLPack version 1", f"version {managed.major}")
        if writable and managed.flags & _READ_ONLY:
            fail("a writable tensor", "a read-only one")
        return managed.tensor
    # The unversioned DLManagedTensor starts with its DLTensor.
    return Tensor.from_address(pointer)


def as_tensor(op: str, name: str, x: Any, keep: list[Any], *, writable: bool = False) -> Tensor:
    """A view of `x`; what must outlive the call is appended to `keep`.

    Raises
    ------
    ArgumentError
        `x` is no tensor, or one that cannot be seen as a DLPack tensor on the CPU.
    """

    def fail(expected: str, got: str):
        raise ArgumentError(f"{op}: {name}: expected {expected}, got {got}")

    if type(x).__module__ == "numpy" and hasattr(x, "__array_interface__"):
        return _from_numpy(x, fail, writable)
    if is_torch(x):
        return _from_torch(x, fail, writable)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _from_dlpack(x, fail, writable, keep)
    return fail("a tensor (NumPy, torch, or anything with DLPack)", type(x).__name__)
