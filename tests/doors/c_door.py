"""The C door, through ctypes on raw structures."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from doors import Door, Refused
from hostile import Argument, Call

from dsa_tvm.runtime import library
from dsa_tvm.runtime.dlpack import Tensor
from dsa_tvm.spec import DLPACK_TYPES


class CDoor(Door):
    """The C functions on raw structures: each by its own name, or all through ``dsa_tvm_call``."""

    offers = frozenset({"outputs", "strides", "negative strides", "bytes", "device", "raw", "double", "options"})

    def __init__(self, *, typed: bool) -> None:
        self.typed, self.name = typed, "C functions" if typed else "dsa_tvm_call"
        self.library = ctypes.CDLL(library.get_library_path())
        self.library.dsa_tvm_last_error.restype = ctypes.c_char_p
        self.library.dsa_tvm_plan_create.restype = ctypes.c_void_p
        self.plan = ctypes.c_void_p(self.library.dsa_tvm_plan_create())

    def __del__(self) -> None:
        self.library.dsa_tvm_plan_destroy(self.plan)

    def run(self, call: Call) -> list[np.ndarray]:
        inputs = [structure(x) for x in call.inputs.values()]
        outputs = [structure(x) for x in call.outputs.values()]
        options = ctypes.byref(self.options(call))
        status = (self._typed if self.typed else self._generic)(call, inputs, outputs, options)
        if status == 1:
            raise Refused(self.library.dsa_tvm_last_error().decode())
        assert status == 0, f"status {status}: {self.library.dsa_tvm_last_error().decode()}"
        return [call.tensor(t.name).array for t in call.spec.outputs]

    def options(self, call: Call) -> ctypes.Structure:
        """The options of the call."""
        return Options(call.options.get("size", ctypes.sizeof(Options)), call.options.get("num_threads", 0))

    def _typed(self, call: Call, inputs: list, outputs: list, options: Any) -> int:
        attrs = [(ctypes.c_double if a.kind is float else ctypes.c_int64)(call.attrs[a.name]) for a in call.spec.attrs]
        arguments = [*map(by_reference, inputs), *attrs, *map(by_reference, outputs), options]
        return getattr(self.library, f"dsa_tvm_{call.spec.name}")(*arguments)

    def _generic(self, call: Call, inputs: list, outputs: list, options: Any) -> int:
        attrs = (Attribute * 8)()
        for slot, attr in zip(attrs, call.spec.attrs, strict=False):
            setattr(slot, "f" if attr.kind is float else "i", call.attrs[attr.name])
        first = (call.spec.name.encode(), pointers(inputs), len(inputs), attrs, len(call.spec.attrs))
        status = self.library.dsa_tvm_call(*first, pointers(outputs), len(outputs), options)
        words = self.library.dsa_tvm_last_error()
        results = [] if status else [call.tensor(name).array for name in call.outputs]
        bits = [x.tobytes() for x in results]
        shapes, told = (ctypes.c_int64 * 3 * len(outputs))(), (ctypes.c_int64 * 3 * len(outputs))()
        size = ctypes.c_uint64()
        refused = self.library.dsa_tvm_output_shapes(*first, told, len(outputs))
        prepared = self.library.dsa_tvm_prepare(self.plan, *first, shapes, len(outputs), ctypes.byref(size))
        again = prepared or self.library.dsa_tvm_run(self.plan, pointers(outputs), len(outputs), options)
        # Three roads to one answer: the same status, the same words, the same results and their shapes.
        assert (again, prepared) == (status, refused)
        if status:
            assert self.library.dsa_tvm_last_error() == words
        else:
            assert bytes(shapes) == bytes(told)
            for x, shape, before in zip(results, shapes, bits, strict=True):
                assert tuple(shape)[: x.ndim] == x.shape and not any(tuple(shape)[x.ndim :])
                assert x.tobytes() == before
        return status


class Attribute(ctypes.Union):
    """``dsa_tvm_attr``."""

    _fields_ = (("i", ctypes.c_int64), ("f", ctypes.c_double))


class Options(ctypes.Structure):
    """``dsa_tvm_options``."""

    _fields_ = (("size", ctypes.c_uint32), ("num_threads", ctypes.c_int32))


def structure(argument: Argument | None) -> Tensor | None:
    """``dsa_tvm_tensor`` of an argument."""
    if argument is None:
        return None
    x = argument.array
    code, bits = DLPACK_TYPES.get(x.dtype.name) or (
        {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}[x.dtype.kind],
        8 * x.itemsize,
    )
    fields: dict[str, Any] = {
        "data": x.ctypes.data,
        "device_type": 2 if argument.form == "device" else 1,
        "ndim": x.ndim,
        "code": code,
        "bits": bits,
        "lanes": 1,
        "shape": x.shape,
        # An array at an odd address has strides that are no multiple of its element only if it says so itself.
        "strides": [s // x.itemsize for s in x.strides],
        **argument.raw,
    }
    for name in ("shape", "strides"):
        fields[name] = None if fields[name] is None else (ctypes.c_int64 * len(fields[name]))(*fields[name])
    return Tensor(**fields)


def by_reference(tensor: Tensor | None) -> Any:
    """A pointer to the structure, null for None."""
    return ctypes.c_void_p(None) if tensor is None else ctypes.byref(tensor)


def pointers(tensors: list[Tensor | None]) -> Any:
    """An array of pointers to structures."""
    return (ctypes.POINTER(Tensor) * len(tensors))(
        *[ctypes.POINTER(Tensor)() if t is None else ctypes.pointer(t) for t in tensors]
    )
