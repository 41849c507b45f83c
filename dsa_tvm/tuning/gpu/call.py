"""Calls of a candidate library on a GPU, with their inputs and outputs."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import numpy as np

from ...errors import BuildError, KernelError
from ...gpu.driver import Memory, Stream
from ...ops.element_types import STORAGE, decode
from ...runtime import loading
from ...runtime.calls import Attribute, Options
from ...runtime.dlpack import CUDA, View
from ...runtime.loading import CheckedFile
from ...runtime.tensors import Pack
from ...spec import DLPACK_TYPES, ELEMENT_BYTES
from ..problem import Problem

#: What outputs and workspaces are filled with: NaN as any floating-point type, and no index.
_NAN, _NO_INDEX = 0xFF, 0xB3
#: Bytes behind an array that no kernel may write.
_GUARD = 4096


class Guarded(Memory):
    """Memory followed by a guard area.

    Parameters
    ----------
    size : int
        Bytes without the guard area.
    byte : int
        The value that `poison` fills both with.
    """

    def __init__(self, size: int, byte: int) -> None:
        super().__init__(size + _GUARD)
        self._owned, self._byte = size, byte

    def poison(self, stream: Stream) -> None:
        """Enqueue a fill of the memory and the guard area."""
        stream.fill(self, self._byte)

    def is_overrun(self) -> bool:
        """Whether the guard area was written after `poison`."""
        return bool((self.read(np.empty(_GUARD, np.uint8), self._owned) != self._byte).any())


class Operands:
    """The inputs and outputs of a call in GPU memory.

    Parameters
    ----------
    problem : Problem
    """

    def __init__(self, problem: Problem) -> None:
        self.spec = spec = problem.work.spec
        self._inputs: list[Memory] = []
        views: list[View | None] = []
        for given in problem.inputs():
            if given is None:
                views.append(None)
                continue
            dtype, bits = given
            memory = Memory(bits.nbytes)
            memory.write(bits)
            self._inputs.append(memory)
            views.append(_view(memory, dtype, bits.shape))
        self.given = Pack(views)
        self.attributes = (Attribute * max(len(spec.attrs), 1))()
        for slot, attr in zip(self.attributes, spec.attrs, strict=False):
            setattr(slot, "f" if attr.kind is float else "i", problem.work.attrs[attr.name])
        self._results = problem.results()
        self.written: dict[str, Guarded] = {}
        views = []
        for tensor, (dtype, shape) in zip(spec.outputs, self._results, strict=True):
            byte = _NO_INDEX if dtype == "int32" else _NAN
            memory = Guarded(math.prod(shape) * ELEMENT_BYTES[dtype], byte)
            self.written[tensor.name] = memory
            views.append(_view(memory, dtype, shape))
        self.taken = Pack(views)

    def poison(self, stream: Stream) -> None:
        """Enqueue filling the outputs with values that no kernel writes."""
        for memory in self.written.values():
            memory.poison(stream)

    def outputs(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The outputs of some queries, as f32 or int32."""
        found = []
        for memory, (dtype, shape) in zip(self.written.values(), self._results, strict=True):
            bits = np.empty((len(rows), *shape[1:]), STORAGE[dtype])
            for i, row in enumerate(rows):
                memory.read(bits[i], row * bits[i].nbytes)
            found.append(decode(bits, dtype))
        return found


class Library:
    """A loaded candidate. It stays loaded, and so does its code on the GPU.

    Parameters
    ----------
    file : str or CheckedFile
        The path of a file that this process made, or a file that somebody else could have changed.

    Raises
    ------
    LibraryError
        The file cannot be read, or it is not the one that was built.
    BuildError
        The loader refuses it.
    """

    def __init__(self, file: str | CheckedFile) -> None:
        try:
            self._library = ctypes.CDLL(file) if isinstance(file, str) else _load(file)
        except OSError as error:
            raise BuildError(f"library: {error}") from error
        self._library.dsa_tvm_last_error.restype = ctypes.c_char_p

    def prepare(self, operands: Operands, stream: Stream) -> Call:
        """Prepare a call that can run any number of times.

        Raises
        ------
        KernelError
            The library refuses it.
        """
        return Call(self._library, operands, stream)


class Call:
    """One call of one library, with its own workspace."""

    def __init__(self, library: ctypes.CDLL, operands: Operands, stream: Stream) -> None:
        self._library, self._stream, self._operands = library, stream, operands
        spec = operands.spec
        given = (operands.given.pointers, len(spec.inputs), operands.attributes, len(spec.attrs))
        self._first = (spec.name.encode(), *given)
        size = ctypes.c_uint64()
        self._expect(library.dsa_tvm_workspace_size(*self._first, ctypes.byref(size)))
        self.workspace = Guarded(size.value, _NAN) if size.value else None
        address = self.workspace.address if self.workspace else None
        self._options = Options(ctypes.sizeof(Options), 0, stream.handle, address, size.value)
        self._arguments = (*self._first, operands.taken.pointers, len(spec.outputs), ctypes.byref(self._options))

    def poison(self, stream: Stream) -> None:
        """Enqueue a fill of the workspace with NaN."""
        if self.workspace:
            self.workspace.poison(stream)

    def run(self) -> None:
        """Enqueue the call.

        Raises
        ------
        KernelError
            The library refuses it.
        CudaError
            A kernel failed.
        """
        if status := self._library.dsa_tvm_call(*self._arguments):
            self._expect(status)

    def _expect(self, status: int) -> None:
        if status:
            words = self._library.dsa_tvm_last_error().decode(errors="replace")
            # If a kernel was at fault, this process has lost the GPU, and this raises the error that says so.
            self._stream.synchronize()
            raise KernelError(words)


@functools.cache
def _load(file: CheckedFile) -> ctypes.CDLL:
    """Load a file once: the library of DEFAULT comes again with every candidate."""
    return loading.load_checked(file)


def _view(memory: Memory, dtype: str, shape: tuple[int, ...]) -> View:
    return View(memory.address, (CUDA, 0), DLPACK_TYPES[dtype], shape, None)
