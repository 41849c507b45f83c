"""A stand-in for torch's GPU tensors: the library takes tensors on the CPU for tensors on the first GPU.

It replaces two functions of the table with which torch lends its tensors. With an emulator as driver, whose GPU memory
is that of the process, the calls compute.
"""

from __future__ import annotations

import ctypes

import torch

from dsa_tvm.runtime import exchange, frames
from dsa_tvm.runtime.dlpack import CUDA, Tensor

STREAM = 4096

_View = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Tensor))
_Stream = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))

#: The number of bytes and the element type of every allocation there.
allocated: list[tuple[int, torch.dtype]] = []


def install() -> None:
    """Replace them for the rest of the process. Do this before `dsa_tvm.torch_ops` is imported."""
    real = exchange._python(torch.Tensor)
    view = _View(exchange._Exchange.from_address(real.exchange).view)

    @_View
    def view_on_gpu(tensor, out):
        status = view(tensor, out)
        out.contents.device_type = CUDA
        return status

    @_Stream
    def current_stream(kind, number, out):
        assert (kind, number) == (CUDA, 0)
        out[0] = STREAM
        return 0

    functions = [ctypes.cast(f, ctypes.c_void_p).value for f in (view_on_gpu, current_stream)]
    table = exchange._Exchange(1, 3, None, (ctypes.c_void_p * 3)(), *functions)
    changed = exchange._Python(ctypes.addressof(table), real.none, real.functions)

    def python(kind, keep=(view_on_gpu, current_stream, table)):
        return changed

    def on_gpu(caller, number):
        assert number == 0

        def empty(shape, strides, dtype):
            # At a multiple of 256, as torch's allocator for GPUs gives it.
            size = torch.Size(shape).numel() * dtype.itemsize
            allocated.append((size, dtype))
            memory = torch.full((size + 256,), 0x55, dtype=torch.uint8)
            start = -memory.data_ptr() % 256
            return memory[start : start + size].view(dtype).view(shape)

        return empty

    exchange._python, exchange.Caller._on_gpu = python, on_gpu
    frames._callers.clear()
