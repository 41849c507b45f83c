"""Fast calls. Their C structures are kept and reused: that takes a tenth of the time of making them.

This file has those with NumPy arrays; `exchange` has those with torch tensors. Whatever is not plain is left to
`calls.call`. The library checks every argument in either case.
"""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..spec import OpSpec
from . import exchange, library
from .dlpack import CPU, Tensor
from .exchange import LARGEST_ATTRIBUTE
from .plain_arrays import NumpyArrays, Place

_TENSOR_WORDS = ctypes.sizeof(Tensor) // 8


class _Options(ctypes.Structure):
    """The first fields of ``dsa_tvm_options``, which are all that a call on a CPU needs."""

    _fields_ = (("size", ctypes.c_uint32), ("num_threads", ctypes.c_int32))


@dataclass(frozen=True)
class _Plan:
    """Where the parts of a call go in a `_Frame`, for one operator and one choice of element types.

    Parameters
    ----------
    inputs, outputs : sequence of Place
    attrs : sequence of (type, int)
        For each attribute: int or float, and the word for it.
    shapes : sequence of callable
        For each output: takes its lengths out of the words that have inputs and attributes.
    make : callable
        Makes a new frame.
    unused : list
        Frames that no call is using.
    """

    inputs: Sequence[Place]
    outputs: Sequence[Any]
    attrs: Sequence[tuple[Any, int]]
    shapes: Sequence[Callable[[Any], tuple[int, ...]]]
    make: Callable[[], _Frame]
    unused: list[_Frame]


class _Frame:
    """The C structures for one call at a time.

    Parameters
    ----------
    spec : OpSpec
    tensors : sequence
        (code, bits), rank and the first word of each input and output; None for an input that is not given. Its
        lengths come first, and then its ``dsa_tvm_tensor``, which begins with the address.
    end : int
        The word after the last tensor, for the attributes.

    Attributes
    ----------
    words, floats : ctypes arrays
        The same memory as int64 and as float64.
    options : ctypes structure
    arguments : tuple
        The arguments of ``dsa_tvm_call``. The pointers are made by ``ctypes.byref``: others take longer to pass.
    """

    def __init__(self, spec: OpSpec, tensors: Sequence[tuple[tuple[int, int], int, int] | None], end: int) -> None:
        self.words = (ctypes.c_int64 * (end + max(len(spec.attrs), 1)))()
        self.floats = (ctypes.c_double * len(self.words)).from_buffer(self.words)
        self.options = _Options(ctypes.sizeof(_Options), 0)
        start = ctypes.addressof(self.words)
        pointers: list[int | None] = []
        for t in tensors:
            if t is None:
                pointers.append(None)
                continue
            (code, bits), rank, word = t
            tensor = Tensor.from_buffer(self.words, 8 * (word + rank))
            tensor.device_type, tensor.ndim, tensor.code, tensor.bits, tensor.lanes = CPU, rank, code, bits, 1
            tensor.shape = ctypes.cast(start + 8 * word, type(tensor.shape))
            pointers.append(start + 8 * (word + rank))
        count = len(spec.inputs)
        name = ctypes.create_string_buffer(spec.name.encode())
        inputs = (ctypes.c_void_p * count)(*pointers[:count])
        outputs = (ctypes.c_void_p * len(spec.outputs))(*pointers[count:])
        pointer = ctypes.byref
        self.arguments = (
            *(pointer(name), pointer(inputs), count),
            *(pointer(self.words, 8 * end), len(spec.attrs)),
            *(pointer(outputs), len(spec.outputs), pointer(self.options)),
        )


class Caller:
    """Calls one operator with NumPy arrays.

    Parameters
    ----------
    spec : OpSpec
    kind : NumpyArrays
    """

    def __init__(self, spec: OpSpec, kind: NumpyArrays) -> None:
        self._spec, self._kind = spec, kind
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._latest: _Plan | None = None  # the next call is likely to have the same element types

    def call(self, inputs: Sequence[Any], attrs: Sequence[Any], out: Any, num_threads: Any) -> tuple[Any, ...] | None:
        """Run the operator if all arguments are plain, see the function `call`."""
        if type(num_threads) is not int or not 0 <= num_threads < 2**31:
            return None
        plan = self._latest
        frame = None if plan is None else self._with_inputs(plan, inputs)
        if frame is None:
            plan = self._plan_for(inputs)
            frame = None if plan is None else self._with_inputs(plan, inputs)
            if frame is None:
                return None
            self._latest = plan
        assert plan is not None
        outputs = self._with_outputs(frame, plan, attrs, out)
        status = 0
        if outputs is not None:
            frame.options.num_threads = num_threads
            loaded = library.load()
            status = loaded.dsa_tvm_call(*frame.arguments)
        plan.unused.append(frame)
        if status:
            library.raise_error(loaded, status)
        return outputs

    def _with_inputs(self, plan: _Plan, inputs: Sequence[Any]) -> _Frame | None:
        """A frame that has the inputs; None if they are not what the plan is for."""
        try:
            frame = plan.unused.pop()
        except IndexError:  # other threads are using all of them
            frame = plan.make()
        try:
            if self._kind.write(frame.words, plan.inputs, inputs):
                return frame
        except ValueError:  # another rank
            pass
        plan.unused.append(frame)
        return None

    def _with_outputs(self, frame: _Frame, plan: _Plan, attrs: Sequence[Any], out: Any) -> tuple[Any, ...] | None:
        """Write attributes and outputs into the frame. Returns the outputs, or None if something is not plain."""
        words, kind, places = frame.words, self._kind, plan.outputs
        for value, (expected, at) in zip(attrs, plan.attrs):  # noqa: B905
            if type(value) is not expected:
                return None
            if expected is float:
                frame.floats[at] = value
            elif 0 < value <= LARGEST_ATTRIBUTE:
                words[at] = value
            else:
                return None
        try:
            if out is None:
                if len(places) == 1:
                    return (kind.make(words, places[0], plan.shapes[0](words)),)
                return tuple([kind.make(words, places[i], shape(words)) for i, shape in enumerate(plan.shapes)])
            outputs = out if isinstance(out, tuple) else (out,)
            return outputs if len(outputs) == len(places) and kind.write_outputs(words, places, outputs) else None
        except (MemoryError, ValueError):  # another rank, or lengths that contradict each other
            return None

    def _plan_for(self, inputs: Sequence[Any]) -> _Plan | None:
        """The plan for the element types of these inputs; None if one is of another kind, or the library lacks it."""
        if any(x is not None and type(x) is not self._kind.kind for x in inputs):
            return None
        dtypes = tuple(None if x is None else x.dtype for x in inputs)
        plan = self._plans.get(dtypes)
        if plan is None:
            plan = _make_plan(self._spec, self._kind, dtypes)
            if plan is not None:
                self._plans[dtypes] = plan
        return plan


def _make_plan(spec: OpSpec, kind: NumpyArrays, dtypes: Sequence[Any]) -> _Plan | None:
    """The plan for such element types; None if the library does not serve them, or an input is missing."""
    sources: dict[str, int] = {}  # the word that has a length
    tensors: list[tuple[tuple[int, int], int, int] | None] = []
    places: list[Place] = []
    word = 0
    types = [*dtypes, *(dtypes[0] if t.dtype == "T" else kind.dtype(t.dtype) for t in spec.outputs)]
    count = len(spec.inputs)
    for n, (t, dtype) in enumerate(zip((*spec.inputs, *spec.outputs), types, strict=True)):
        dl_type = None if dtype is None else kind.dl_type(dtype)
        if dl_type is None:
            if dtype is not None or not t.optional:
                return None
            tensors.append(None)
            places.append(None)
            continue
        rank = len(t.shape)
        tensors.append((dl_type, rank, word))
        places.append((dtype, slice(word, word + rank), word + rank))
        for i, dim in enumerate(t.shape if n < count else ()):
            sources.setdefault(dim, word + i)
        word += rank + _TENSOR_WORDS
    for i, attr in enumerate(spec.attrs):
        if attr.dim is not None:
            sources.setdefault(attr.dim, word + i)
    return _Plan(
        inputs=places[:count],
        outputs=places[count:],
        attrs=[(a.kind, word + i) for i, a in enumerate(spec.attrs)],
        shapes=[operator.itemgetter(*(sources[dim] for dim in t.shape)) for t in spec.outputs],
        make=lambda: _Frame(spec, tensors, word),
        unused=[],
    )


_callers: dict[tuple[str, type], Caller | exchange.Caller] = {}


def _caller_for(spec: OpSpec, kind: type) -> Caller | exchange.Caller | None:
    """A caller for a type of arrays; None unless it is NumPy's or torch's own."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and kind is numpy.ndarray:
        return Caller(spec, NumpyArrays(numpy))
    if torch is not None and kind is getattr(torch, "Tensor", None):
        return exchange.Caller(spec, torch, exchange.given(torch))
    return None


def call(
    spec: OpSpec, inputs: tuple[Any, ...], attrs: Sequence[Any], out: Any, num_threads: Any
) -> tuple[Any, ...] | None:
    """Run one operator if all of its arguments are plain.

    Parameters
    ----------
    spec : OpSpec
    inputs : tuple
    attrs : sequence
        In the operator's order. An optional input may be None.
    out : tensor or tuple of tensors, optional
    num_threads : int

    Returns
    -------
    tuple or None
        The outputs. None if an argument is not plain: then nothing has been computed.

    Raises
    ------
    DsaError
        As `calls.call`.
    """
    caller = _callers.get((spec.name, type(inputs[0])))
    if caller is None:
        caller = _caller_for(spec, type(inputs[0]))
        if caller is None:
            return None
        _callers[spec.name, type(inputs[0])] = caller
    return caller.call(inputs, attrs, out, num_threads)
