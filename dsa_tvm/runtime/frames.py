"""Fast calls with plain arrays. Their C structures are kept and reused: that takes a tenth of the time of making them.

Whatever is not plain is left to `calls.call`. The library checks every argument in either case.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..spec import OpSpec
from .dlpack import CPU, Tensor
from .plain_arrays import Kind, kind_of

_WORDS = ctypes.sizeof(Tensor) // 8  # the address comes first
_LARGEST_ATTRIBUTE = 4096

_CALL = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32),
    *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p),
)


class _Options(ctypes.Structure):
    """The first fields of ``dsa_tvm_options``, which are all that a call on a CPU needs."""

    _fields_ = (("size", ctypes.c_uint32), ("num_threads", ctypes.c_int32))


@dataclass(frozen=True)
class _Plan:
    """Where the parts of a call go in a `_Frame`, for one operator and one set of element types.

    Parameters
    ----------
    ranks : sequence of (int, int)
        For each input that is given: the word for its address, and its rank.
    attrs : sequence of (str, bool)
        The name of each attribute, and whether it is a float.
    outputs : sequence
        For each output: the word for its address, its element type, and the source of each of its lengths. A source is
        an index into the lengths of all inputs, followed by the attributes.
    lengths : int
        The first word for lengths: those of the inputs, then those of the outputs.
    make : callable
        Makes a new frame.
    unused : list
        Frames that no call is using.
    """

    ranks: Sequence[tuple[int, int]]
    attrs: Sequence[tuple[str, bool]]
    outputs: Sequence[tuple[int, Any, Sequence[int]]]
    lengths: int
    make: Callable[[], _Frame]
    unused: list[_Frame]


class _Frame:
    """The C structures for one call at a time.

    Parameters
    ----------
    spec : OpSpec
    tensors : sequence
        (code, bits) and rank of each input and output; None for an input that is not given.

    Attributes
    ----------
    words : ctypes array of int64
        The tensors. Their addresses and lengths are written for each call.
    integers, floats : ctypes arrays
        The attributes: the same memory as integers and as floats.
    options : ctypes structure
    arguments : tuple of int
        The arguments of ``dsa_tvm_call``.
    """

    def __init__(self, spec: OpSpec, tensors: Sequence[tuple[tuple[int, int], int] | None]) -> None:
        present = [t for t in tensors if t is not None]
        lengths = len(present) * _WORDS
        self.words = (ctypes.c_int64 * (lengths + sum(rank for _, rank in present)))()
        self.integers = (ctypes.c_int64 * max(len(spec.attrs), 1))()
        self.floats = (ctypes.c_double * len(self.integers)).from_buffer(self.integers)
        self.options = _Options(ctypes.sizeof(_Options), 0)
        self._name = ctypes.create_string_buffer(spec.name.encode())
        at = start = ctypes.addressof(self.words)
        length_at = start + 8 * lengths
        pointers: list[int | None] = []
        for t in tensors:
            if t is None:
                pointers.append(None)
                continue
            (code, bits), rank = t
            tensor = Tensor.from_buffer(self.words, at - start)
            tensor.device_type, tensor.ndim, tensor.code, tensor.bits, tensor.lanes = CPU, rank, code, bits, 1
            tensor.shape = ctypes.cast(length_at, type(tensor.shape))
            pointers.append(at)
            at += 8 * _WORDS
            length_at += 8 * rank
        inputs, outputs = pointers[: len(spec.inputs)], pointers[len(spec.inputs) :]
        self._inputs = (ctypes.c_void_p * len(inputs))(*inputs)
        self._outputs = (ctypes.c_void_p * len(outputs))(*outputs)
        self.arguments = (
            *(ctypes.addressof(self._name), ctypes.addressof(self._inputs), len(inputs)),
            *(ctypes.addressof(self.integers), len(spec.attrs)),
            *(ctypes.addressof(self._outputs), len(outputs), ctypes.addressof(self.options)),
        )


# By operator, package of the arrays, and element types of the inputs.
_plans: dict[tuple[Any, ...], _Plan] = {}


def _make_plan(spec: OpSpec, kind: Kind, dtypes: Sequence[Any]) -> _Plan | None:
    """The plan for such element types; None if the library does not serve them, or an input is missing."""
    tensors: list[tuple[tuple[int, int], int] | None] = []
    ranks: list[tuple[int, int]] = []
    sources: dict[str, int] = {}
    count = 0
    for t, dtype in zip(spec.inputs, dtypes, strict=True):
        dl_type = None if dtype is None else kind.dl_type(dtype)
        if dl_type is None:
            if dtype is not None or not t.optional:
                return None
            tensors.append(None)
            continue
        tensors.append((dl_type, len(t.shape)))
        ranks.append((len(ranks) * _WORDS, len(t.shape)))
        for dim in t.shape:
            sources.setdefault(dim, count)
            count += 1
    for i, attr in enumerate(spec.attrs):
        if attr.dim is not None:
            sources.setdefault(attr.dim, count + i)
    outputs = []
    for i, t in enumerate(spec.outputs):
        dtype = dtypes[0] if t.dtype == "T" else kind.dtype(t.dtype)
        if (dl_type := kind.dl_type(dtype)) is None:
            return None
        tensors.append((dl_type, len(t.shape)))
        outputs.append(((len(ranks) + i) * _WORDS, dtype, [sources[dim] for dim in t.shape]))
    attrs, lengths = [(a.name, a.kind is float) for a in spec.attrs], (len(ranks) + len(outputs)) * _WORDS
    return _Plan(ranks, attrs, outputs, lengths, functools.partial(_Frame, spec, tensors), [])


def call(
    function: Callable[..., int],
    spec: OpSpec,
    inputs: Mapping[str, Any],
    attrs: Mapping[str, Any],
    out: Any,
    num_threads: Any,
) -> tuple[int, tuple[Any, ...]] | None:
    """Run one operator if all of its arguments are plain.

    Parameters
    ----------
    function : callable
        What `entry` returned.
    spec : OpSpec
    inputs, attrs : mapping
        By name. An optional input may be None.
    out : tensor or tuple of tensors, optional
    num_threads : int

    Returns
    -------
    (int, tuple) or None
        The status of the library, and the outputs. None if an argument is not plain: then nothing has been computed.
    """
    given = [inputs[t.name] for t in spec.inputs]
    kind = kind_of(given[0])
    if kind is None or type(num_threads) is not int or not 0 <= num_threads < 2**31:
        return None
    plain, expected = kind.is_plain, kind.kind
    key: list[Any] = [spec.name, kind]
    for x in given:
        if x is None:
            key.append(None)
        elif type(x) is expected and plain(x):
            key.append(x.dtype)
        else:
            return None
    names = tuple(key)
    plan = _plans.get(names)
    if plan is None:
        plan = _make_plan(spec, kind, names[2:])
        if plan is None:
            return None
        _plans[names] = plan
    try:
        frame = plan.unused.pop()
    except IndexError:  # other threads are using all of them
        frame = plan.make()
    outputs = _fill(frame, plan, kind, given, attrs, out)
    status = 0
    if outputs is not None:
        frame.options.num_threads = num_threads
        status = function(*frame.arguments)
    plan.unused.append(frame)
    return None if outputs is None else (status, outputs)


def _fill(
    frame: _Frame, plan: _Plan, kind: Kind, given: Sequence[Any], attrs: Mapping[str, Any], out: Any
) -> tuple[Any, ...] | None:
    """Write addresses, lengths and attributes into a frame. Returns the outputs, or None if something is not plain."""
    words, address = frame.words, kind.address
    lengths: list[int] = []
    for x, (at, rank) in zip([x for x in given if x is not None], plan.ranks, strict=True):
        shape = x.shape
        if len(shape) != rank:
            return None
        lengths += shape
        words[at] = address(x)
    sources = lengths
    if plan.attrs:
        sources = lengths.copy()
        for i, (name, is_float) in enumerate(plan.attrs):
            value = attrs[name]
            if is_float:
                if type(value) is not float:
                    return None
                frame.floats[i] = value
            elif type(value) is not int or not 0 < value <= _LARGEST_ATTRIBUTE:
                return None
            else:
                frame.integers[i] = value
            sources.append(value)
    if out is None:
        made = []
        for at, dtype, places in plan.outputs:
            shape = [sources[i] for i in places]
            try:
                x = kind.empty(shape, dtype)
            except (MemoryError, RuntimeError, ValueError):  # the lengths may contradict each other
                return None
            words[at] = address(x)
            lengths += shape
            made.append(x)
        outputs = tuple(made)
    else:
        outputs = out if isinstance(out, tuple) else (out,)
        if len(outputs) != len(plan.outputs):
            return None
        for x, (at, dtype, places) in zip(outputs, plan.outputs, strict=True):
            if type(x) is not kind.kind or not kind.is_plain_output(x) or x.dtype != dtype or x.ndim != len(places):
                return None
            words[at] = address(x)
            lengths += x.shape
    words[plan.lengths : plan.lengths + len(lengths)] = lengths  # type: ignore[assignment]
    return outputs


@functools.cache
def entry(library: ctypes.CDLL) -> Callable[..., int]:
    """``dsa_tvm_call`` of a loaded library, which takes addresses as numbers."""
    return _CALL(("dsa_tvm_call", library))
