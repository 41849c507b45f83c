"""Fast calls with torch tensors: the library reads them itself, through DLPack's C exchange interface.

A call enters the library twice: to check the inputs and to learn shapes and workspace, and to compute. torch has the
interface from version 2.10 on. Whatever it does not serve is left to `calls.call`, which also says what is wrong.
"""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..spec import OpSpec
from . import library
from .dlpack import Tensor, capsule_pointer
from .tensors import is_watching, note_written

_CAPSULE = b"dlpack_exchange_api"
_MAJOR = 1
_TENSOR_WORDS = ctypes.sizeof(Tensor) // 8
#: The rank that shapes have room for.
_LONGEST = 3
#: Larger ones are left to the library to refuse.
LARGEST_ATTRIBUTE = 4096
#: Allocates a tensor: takes shape, strides and element type.
_Empty = Callable[[tuple[int, ...], Any, Any], Any]
_IsPlain = Callable[[Sequence[Any], Sequence[int]], bool]
#: What ``dsa_tvm_prepare_objects`` returns; 0 is a call on the CPU.
_ON_GPU, _REFUSED = 1, -1


class _Exchange(ctypes.Structure):
    """The beginning of DLPack's ``DLPackExchangeAPI``."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("managed", ctypes.c_void_p * 3),
        ("view", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
    )


class _Python(ctypes.Structure):
    """``struct python`` of objects.c."""

    _fields_ = (
        ("exchange", ctypes.c_void_p),
        ("none", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 4),
    )


class _ObjectCall(ctypes.Structure):
    """``struct object_call`` of objects.c."""

    _fields_ = (
        ("python", ctypes.c_void_p),
        ("plan", ctypes.c_void_p),
        ("op", ctypes.c_char_p),
        ("attrs", ctypes.c_void_p),
        ("shapes", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("num_inputs", ctypes.c_int32),
        ("num_attrs", ctypes.c_int32),
        ("num_outputs", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("device_id", ctypes.c_int32),
    )


def _python(kind: type) -> _Python | None:
    """What the library needs to read tensors of a type; None if they lack the interface, or Python is another one."""
    if sys.implementation.name != "cpython":  # elsewhere the id of an object is not its address
        return None
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    names = ("PyTuple_GetItem", "PyErr_Clear", "PyEval_SaveThread", "PyEval_RestoreThread")
    try:
        address = capsule_pointer(capsule, _CAPSULE)
        functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in names]
    except (AttributeError, ValueError):
        return None
    while address and _Exchange.from_address(address).major != _MAJOR:
        address = _Exchange.from_address(address).previous
    if not address or not _Exchange.from_address(address).view:
        return None
    return _Python(address, id(None), (ctypes.c_void_p * 4)(*functions))


class _Frame:
    """The C structures for one call at a time.

    Attributes
    ----------
    call : ctypes structure
    pointer : ctypes pointer
        To `call`.
    integers, floats : ctypes arrays
        The same memory, for the attributes.
    shapes, strides, tensors : ctypes arrays
        Words: the lengths and strides of the outputs, three for each, and their ``dsa_tvm_tensor``, which begin with
        the address.
    """

    def __init__(self, spec: OpSpec, lib: ctypes.CDLL, python: _Python) -> None:
        self._destroy, self._plan = lib.dsa_tvm_plan_destroy, lib.dsa_tvm_plan_create()
        if not self._plan:
            raise MemoryError
        count = len(spec.outputs)
        self.integers = (ctypes.c_int64 * max(len(spec.attrs), 1))()
        self.floats = (ctypes.c_double * len(self.integers)).from_buffer(self.integers)
        self.shapes = (ctypes.c_int64 * (_LONGEST * count))()
        self.strides = (ctypes.c_int64 * (_LONGEST * count))()
        self.tensors = (ctypes.c_uint64 * (_TENSOR_WORDS * count))()
        at = ctypes.addressof
        self.call = _ObjectCall(
            *(at(python), self._plan, spec.name.encode(), at(self.integers), at(self.shapes)),
            *(at(self.strides), at(self.tensors)),
            *(len(spec.inputs), len(spec.attrs), count),
        )
        self.pointer = ctypes.byref(self.call)

    def __del__(self) -> None:
        self._destroy(self._plan)


class Caller:
    """Calls one operator with torch tensors.

    Parameters
    ----------
    spec : OpSpec
    torch : module
    is_plain : callable
        Takes tensors, or None for those that are not given, and which of them may be of a floating-point type. Whether
        a call may compute on their memory, here and now.
    """

    def __init__(self, spec: OpSpec, torch: Any, is_plain: _IsPlain) -> None:
        self._spec, self._torch, self._is_plain = spec, torch, is_plain
        self._python = _python(torch.Tensor)
        self._unused: list[_Frame] = []
        self._floats = [i for i, t in enumerate(spec.inputs) if t.dtype not in ("int32", "uint8")]
        self._attrs: list[tuple[int, Any]] = [(i, a.kind) for i, a in enumerate(spec.attrs)]
        #: Of each output: a function that takes its lengths or strides out of the words that have them, the word of its
        #: address, and its element type, which is None for that of the first input.
        self._outputs = [
            (
                operator.itemgetter(*range(_LONGEST * i, _LONGEST * i + len(t.shape))),
                _TENSOR_WORDS * i,
                None if t.dtype == "T" else getattr(torch, t.dtype),
            )
            for i, t in enumerate(spec.outputs)
        ]
        self._empty, self._gpus = _empty_on_cpu(torch), dict[int, Any]()
        self._prepare: Any = None
        self._run: Any = None

    def call(self, inputs: tuple[Any, ...], attrs: Iterable[Any], out: Any, num_threads: Any) -> Any:
        """Run the operator if all arguments are plain, see `frames.call`."""
        if not self._is_plain(inputs, self._floats) or type(num_threads) is not int or not 0 <= num_threads < 2**31:
            return None
        if out is not None:
            out = out if isinstance(out, tuple) else (out,)
            if len(out) != len(self._outputs) or not self._is_plain(out, range(len(out))):
                return None
        frame: _Frame | None
        try:
            frame = self._unused.pop()
        except IndexError:  # other threads are using all of them
            frame = self._make_frame()
            if frame is None:
                return None
        # In line, as a function would be called in a tenth of a microsecond.
        found = _REFUSED
        for value, (i, kind) in zip(attrs, self._attrs):  # noqa: B905 (they are equally long)
            if type(value) is not kind:
                break
            if kind is float:
                frame.floats[i] = value
            elif 0 < value <= LARGEST_ATTRIBUTE:
                frame.integers[i] = value
            else:
                break
        else:
            # Addresses as integers are faster to pass than ctypes.py_object.
            found = self._prepare(frame.pointer, id(inputs), id(out))
        if found == _REFUSED:  # `calls.call` says why
            self._unused.append(frame)
            return None
        empty = self._on_gpu(frame.call.device_id) if found == _ON_GPU else self._empty
        results = out
        if out is None:
            made = []
            for part, address, dtype in self._outputs:
                x = empty(part(frame.shapes), part(frame.strides), dtype or inputs[0].dtype)
                frame.tensors[address] = x.data_ptr()
                made.append(x)
            results = tuple(made)
        if found == _ON_GPU and frame.call.workspace_size:
            # The allocator has it back when this function returns. Whoever gets it next runs later on the same stream.
            workspace = empty((frame.call.workspace_size,), None, self._torch.uint8)
            frame.call.workspace = workspace.data_ptr()
        frame.call.num_threads = num_threads
        status = self._run(frame.pointer)
        self._unused.append(frame)
        if status:
            library.raise_error(library.load(), status)
        if out is not None:
            note_written(out)
        return results

    def _make_frame(self) -> _Frame | None:
        lib = library.load()
        if self._python is None or not hasattr(lib, "dsa_tvm_prepare_objects"):  # a library of an earlier version
            return None
        prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._run = lib.dsa_tvm_run_objects
        self._prepare = prototype(("dsa_tvm_prepare_objects", lib))
        return _Frame(self._spec, lib, self._python)

    def _on_gpu(self, number: int) -> _Empty:
        """A function that allocates on the GPU with this number."""
        known = self._gpus.get(number)
        if known is None:
            device, empty = self._torch.device("cuda", number), self._torch.empty
            known = self._gpus[number] = lambda shape, _, dtype: empty(*shape, dtype=dtype, device=device)
        return known


def _empty_on_cpu(torch: Any) -> _Empty:
    """A function that allocates on the CPU. Compiled graphs of torch use it too: it takes half the time of torch.empty,
    which is used instead if a first try shows a difference.
    """
    cpu, empty = torch.device("cpu"), torch.empty
    try:
        fast: _Empty = torch._C._dynamo.guards._empty_strided_cpu
        x = fast((2, 3), (3, 1), torch.int32)
        if (x.shape, x.stride(), x.dtype, x.device) == ((2, 3), (3, 1), torch.int32, cpu):
            return fast
    except (AttributeError, TypeError, RuntimeError):
        pass
    return lambda shape, _, dtype: empty(*shape, dtype=dtype, device=cpu)


def given(torch: Any) -> _IsPlain:
    """For `Caller`: tensors as a caller passes them. None is plain while torch records or transforms what happens."""
    kind, watching = torch.Tensor, is_watching(torch)

    def is_plain(tensors: Sequence[Any], floats: Sequence[int]) -> bool:
        if watching():
            return False
        for x in tensors:
            # A subclass may give its contents another meaning.
            if x is not None and type(x) is not kind:
                return False
        for i in floats:
            x = tensors[i]
            if x is not None and (x.requires_grad or x.is_neg()):
                return False
        return True

    return is_plain


def dispatched(tensors: Sequence[Any], floats: Sequence[int]) -> bool:
    """For `Caller`: tensors as torch's dispatcher passes them on if the keys of the call are plain."""
    for i in floats:
        x = tensors[i]
        if x is not None and x.requires_grad:
            return False
    return True
