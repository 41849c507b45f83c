"""DLPack: its structures, and the tensors of any package that exports it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

CPU, CUDA = 1, 2

#: Names of DLPack's devices, for messages.
_DEVICES = {
    **{1: "the CPU", 2: "a CUDA GPU", 3: "the CPU in CUDA pinned memory", 7: "a Vulkan device", 8: "a Metal device"},
    **{10: "a ROCm GPU", 11: "the CPU in ROCm pinned memory", 13: "a CUDA GPU in managed memory"},
    **{14: "a oneAPI device", 15: "a WebGPU device", 16: "a Hexagon device", 17: "a MAIA device"},
}

#: Devices whose memory the CPU can read: its own, and memory that CUDA or ROCm have pinned.
_HOST = (1, 3, 11)

#: For a library without CUDA kernels: how to make one that has them.
HINT = "; dsa-tvm build --target cuda makes a library that takes it"

_READ_ONLY, _COPIED = 1, 2

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype, capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

Fail = Callable[[str, str], NoReturn]


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


class Versioned(ctypes.Structure):
    """DLPack's ``DLManagedTensorVersioned``."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


class View(NamedTuple):
    """The fields of a `Tensor`. The strides of a contiguous tensor are None."""

    data: int
    device: tuple[int, int]
    dtype: tuple[int, int]
    shape: Sequence[int]
    strides: Sequence[int] | None


def _export(x: Any, in_place: bool, ready: Mapping[str, int]) -> Any:
    """Ask for a capsule. Producers from before DLPack 1.0 know fewer arguments, and some know no `copy`."""
    versioned: dict[str, Any] = {"max_version": (1, 0)}
    for asked in [{**versioned, "copy": False}, versioned] if in_place else [versioned]:
        with contextlib.suppress(TypeError):
            return x.__dlpack__(**asked, **ready)
    return x.__dlpack__(**ready)


def from_producer(x: Any, fail: Fail, writable: bool, keep: list[Any], cuda: bool, stream: int) -> View:
    """A view of anything with ``__dlpack__``.

    `fail` takes what was expected and what was given, and raises. The other parameters are those of
    `tensors.as_tensor`.
    """
    try:
        kind, number = (int(v) for v in x.__dlpack_device__())
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        fail("a tensor that tells its device", f"a {type(x).__name__} that does not ({error})")
    if kind != CPU and not (cuda and kind == CUDA):
        got = f"one on {_DEVICES.get(kind, 'another device')} (DLPack device {kind})"
        fail("a tensor on the CPU" + " or on a CUDA GPU" * cuda, got + HINT * (kind == CUDA))
    # The producer makes this stream wait for the tensor. DLPack's number for the default stream is 1.
    ready = {"stream": stream or 1} if kind == CUDA else {}
    # Results written to a copy of an output would be lost. The copy of an input on a GPU would be freed when this call
    # returns, which is before the kernels have read it.
    in_place = writable or kind == CUDA
    try:
        capsule = _export(x, in_place, ready)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:  # the standard names only the first
        fail("a tensor that can be exported" + " without a copy" * in_place, str(error))
    name = _capsule_name(capsule) if type(capsule).__name__ == "PyCapsule" else None
    if name not in (b"dltensor", b"dltensor_versioned"):
        used = name in (b"used_dltensor", b"used_dltensor_versioned")
        got = "one whose tensor another consumer has taken" if used else f"a {type(capsule).__name__} without a tensor"
        fail("a DLPack capsule with a tensor", got)
    keep.append(capsule)
    pointer = capsule_pointer(capsule, name)
    if name == b"dltensor_versioned":
        managed = Versioned.from_address(pointer)
        if managed.major != 1:
            fail("DLPack version 1", f"version {managed.major}")
        if writable and managed.flags & _READ_ONLY:
            fail("a writable tensor", "a read-only one")
        if in_place and managed.flags & _COPIED:
            fail("a tensor that can be exported without a copy", "a copy")
        tensor = managed.tensor
    else:  # the unversioned DLManagedTensor starts with its DLTensor
        tensor = Tensor.from_address(pointer)
    elsewhere = (
        tensor.device_type not in _HOST if kind == CPU else (tensor.device_type, tensor.device_id) != (kind, number)
    )
    if elsewhere:
        said, found = (_DEVICES.get(k, f"DLPack device {k}") for k in (kind, tensor.device_type))
        fail(f"a tensor on {said}, number {number}, as its producer says", f"one on {found}, number {tensor.device_id}")
    if tensor.lanes != 1:
        fail("a scalar element type", f"vectors of {tensor.lanes} elements")
    n = tensor.ndim
    address = tensor.data + tensor.byte_offset if tensor.data else 0
    if address >= 2**64:
        fail("an address of 64 bits", f"data {tensor.data:#x} and byte_offset {tensor.byte_offset}")
    strides = tensor.strides[:n] if tensor.strides else None
    return View(address, (kind, number), (tensor.code, tensor.bits), tensor.shape[:n], strides)
