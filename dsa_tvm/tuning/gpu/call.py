"""A library's operators called on a GPU's memory, and the inputs, outputs and references of such calls."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...benchmark import check
from ...benchmark.workload import Workload
from ...errors import BuildError, KernelError
from ...gpu.driver import Memory, Stream
from ...ops.element_types import STORAGE, decode, encode
from ...runtime import loading
from ...runtime.calls import Attribute, Options
from ...runtime.dlpack import CUDA, View
from ...runtime.loading import CheckedFile
from ...runtime.tensors import Pack
from ...spec import DLPACK_TYPES, ELEMENT_BYTES

#: What outputs and workspaces are filled with: NaN as any floating-point type, and no index.
_NAN, _NO_INDEX = 0xFF, 0xB3
#: Bytes behind them that nothing may write.
_GUARD = 4096


class Guarded(Memory):
    """Memory with some behind it that nobody owns.

    Parameters
    ----------
    size : int
        Bytes without that.
    byte : int
        What `poison` fills both with.
    """

    def __init__(self, size: int, byte: int) -> None:
        super().__init__(size + _GUARD)
        self._owned, self._byte = size, byte

    def poison(self, stream: Stream) -> None:
        """Enqueue filling all of it."""
        stream.fill(self, self._byte)

    def is_overrun(self) -> bool:
        """Whether what lies behind was written since then."""
        return bool((self.read(np.empty(_GUARD, np.uint8), self._owned) != self._byte).any())


class Operands:
    """The inputs and outputs of a call, in the memory of the GPU.

    Parameters
    ----------
    work : Workload
        float32; what the type variables stand for is rounded to `types`.
    types : sequence of str
        Element types in the order of the type variables.
    """

    def __init__(self, work: Workload, types: Sequence[str]) -> None:
        spec = work.spec
        self.spec, self.types = spec, tuple(types) or ("float32",)
        variant = dict(zip(spec.variants[0], types, strict=True))
        self._inputs: list[Memory] = []
        views: list[View | None] = []
        for tensor in spec.inputs:
            if tensor.name not in work.inputs:
                views.append(None)
                continue
            dtype = spec.dtype_of(tensor, variant)
            bits = encode(work.inputs[tensor.name], dtype)
            memory = Memory(bits.nbytes)
            memory.write(bits)
            self._inputs.append(memory)
            views.append(_view(memory, dtype, bits.shape))
        self.given = Pack(views)
        self.attributes = (Attribute * max(len(spec.attrs), 1))()
        for slot, attr in zip(self.attributes, spec.attrs, strict=False):
            setattr(slot, "f" if attr.kind is float else "i", work.attrs[attr.name])
        lengths = {**work.lengths, **{a.dim: work.attrs[a.name] for a in spec.attrs if a.dim}}
        self._results = [(spec.dtype_of(t, variant), tuple(lengths[d] for d in t.shape)) for t in spec.outputs]
        self.written: dict[str, Guarded] = {}
        views = []
        for tensor, (dtype, shape) in zip(spec.outputs, self._results, strict=True):
            byte = _NO_INDEX if dtype == "int32" else _NAN
            memory = Guarded(math.prod(shape) * ELEMENT_BYTES[dtype], byte)
            self.written[tensor.name] = memory
            views.append(_view(memory, dtype, shape))
        self.taken = Pack(views)

    def poison(self, stream: Stream) -> None:
        """Enqueue filling the outputs with what no kernel writes."""
        for memory in self.written.values():
            memory.poison(stream)

    def outputs(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Some queries of the outputs, as f32 or int32."""
        found = []
        for memory, (dtype, shape) in zip(self.written.values(), self._results, strict=True):
            bits = np.empty((len(rows), *shape[1:]), STORAGE[dtype])
            for i, row in enumerate(rows):
                memory.read(bits[i], row * bits[i].nbytes)
            found.append(decode(bits, dtype))
        return found


@dataclass(frozen=True)
class Problem:
    """Inputs, the queries to look at, and what the reference says of them."""

    work: Workload
    operands: Operands
    rows: Sequence[int]
    references: tuple[Any, ...]

    @classmethod
    def of(cls, work: Workload, types: Sequence[str], rows: Sequence[int]) -> Problem:
        """With references for the inputs as `types` hold them."""
        variant = dict(zip(work.spec.variants[0], types, strict=True))
        exact = {}
        for tensor in work.spec.inputs:
            if tensor.name in work.inputs:
                x = work.inputs[tensor.name]
                cut = x if tensor.name in check.OF_KEYS else x[list(rows)]
                dtype = work.spec.dtype_of(tensor, variant)
                exact[tensor.name] = decode(encode(cut, dtype), dtype)
        return cls(work, Operands(work, types), rows, work.spec.reference(**exact, **work.attrs))


class Library:
    """A loaded candidate. It stays loaded: so does its code on the GPU.

    Parameters
    ----------
    file : str or CheckedFile
        A file of this process's own, by its path, or one that somebody else could have changed.

    Raises
    ------
    LibraryError
        It cannot be read, or it is not the one that was built.
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
        """A call that can be made any number of times.

        Raises
        ------
        KernelError
            The library refuses it.
        """
        return Call(self._library, operands, stream)


class Call:
    """One call of one library, with a workspace of its own."""

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
        """Enqueue filling the workspace with NaN."""
        if self.workspace:
            self.workspace.poison(stream)

    def run(self) -> None:
        """Enqueue it.

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
            # Where a kernel was at fault, the GPU is lost to this process, and this says so.
            self._stream.synchronize()
            raise KernelError(words)


@functools.cache
def _load(file: CheckedFile) -> ctypes.CDLL:
    """DEFAULT's library comes again with every candidate; it is read once."""
    return loading.load_checked(file)


def _view(memory: Memory, dtype: str, shape: tuple[int, ...]) -> View:
    return View(memory.address, (CUDA, 0), DLPACK_TYPES[dtype], shape, None)
