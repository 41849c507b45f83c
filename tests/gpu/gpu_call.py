"""Calls of the C functions with tensors that claim to be on a GPU. With an emulator as driver, that is true."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from c_door import Attribute, pointers, structure
from hostile import Argument

from dsa_tvm.ops import OPS
from dsa_tvm.runtime import library

CPU, GPU = (1, 0), (2, 0)
#: The alignment of workspaces.
ALIGNMENT = 256


class Options(ctypes.Structure):
    """All fields of ``dsa_tvm_options``."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("num_threads", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_uint64),
    )


class Refused(Exception):
    """A status other than 0, with its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Call:
    """One call.

    Parameters
    ----------
    op : str
    inputs : mapping
        Arrays by name, or None.
    attrs : mapping
    outputs : sequence of ndarray
    devices : mapping
        The devices of arguments that are not on the first GPU.
    """

    def __init__(self, op: str, inputs, attrs, outputs, devices: Mapping[str, tuple[int, int]] | None = None) -> None:
        spec = OPS[op]
        # One that was made for tuning has no manifest.
        self.library = ctypes.CDLL(os.environ.get("GPU_CALL_LIBRARY") or library.get_library_path())
        self.library.dsa_tvm_last_error.restype = ctypes.c_char_p
        places = devices or {}

        def tensor(name: str, array: Any):
            device = dict(zip(("device_type", "device_id"), places.get(name, GPU), strict=True))
            return None if array is None else structure(Argument(array, raw=device))

        self._inputs = [tensor(t.name, inputs.get(t.name)) for t in spec.inputs]
        self._outputs = [tensor(t.name, x) for t, x in zip(spec.outputs, outputs, strict=True)]
        attributes = (Attribute * 8)()
        for slot, attr in zip(attributes, spec.attrs, strict=False):
            setattr(slot, "f" if attr.kind is float else "i", attrs[attr.name])
        self._first = (op.encode(), pointers(self._inputs), len(self._inputs), attributes, len(spec.attrs))

    def _check(self, status: int) -> None:
        if status:
            raise Refused(status, self.library.dsa_tvm_last_error().decode())

    def workspace_size(self) -> int:
        """The size that ``dsa_tvm_workspace_size`` reports."""
        size = ctypes.c_uint64(12345)
        self._check(self.library.dsa_tvm_workspace_size(*self._first, ctypes.byref(size)))
        return size.value

    def run(self, options: Options | None = None) -> None:
        """Make the call, by default with a workspace of the reported size, filled with NaN."""
        if options is None:
            size = self.workspace_size()
            memory = np.full(size + ALIGNMENT, 0xFF, np.uint8)
            address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
            options = Options(ctypes.sizeof(Options), 0, None, address, size)
        outputs = pointers(self._outputs)
        self._check(self.library.dsa_tvm_call(*self._first, outputs, len(self._outputs), ctypes.byref(options)))
