"""Small valid arguments of any operator, made only from its `OpSpec`, in memory that shows every write.

Hostile cases start from these, and so can any test that needs valid arguments. This needs only NumPy, and ml_dtypes for
bfloat16 and fp8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsa_tvm.runtime.packing import pack_mla_rows
from dsa_tvm.spec import DIMS, OpSpec, TensorSpec, completed

#: The number of guard bytes before and behind every array of `allocate`, and their value.
GUARD = 64
CANARY = 0xA5
ALIGNMENT = 64

# All different, so that two lengths taken for each other are noticed. A length with served values is the first of them.
_LENGTHS = {"s_q": 3, "s_kv": 11, "h_idx": 2, "topk": 5, "h_q": 4, "batch": 2, "capacity": 7, "s_new": 4, "d_row": 5}
_FLOAT_ATTR = 0.0625


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of a name, from ml_dtypes if NumPy has none."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def small_dims(spec: OpSpec, dims: Mapping[str, int] | None = None) -> dict[str, int]:
    """A small length for each dimension of an operator, unless `dims` has one."""
    free = [d for d in spec.dims if not DIMS[d].parts]
    return completed({d: DIMS[d].values[0] if DIMS[d].values else _LENGTHS[d] for d in free} | dict(dims or {}))


def allocate(shape: Sequence[int], dtype: np.dtype, *, offset: int = 0) -> np.ndarray:
    """An array with `GUARD` canary bytes at both ends, all canary itself, `offset` bytes behind a 64-byte boundary."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.full(ALIGNMENT + 2 * GUARD + offset + size, CANARY, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT + GUARD + offset
    return np.ndarray(tuple(shape), dtype, memory, start)


def place(values: np.ndarray, *, offset: int = 0) -> np.ndarray:
    """A contiguous copy in memory from `allocate`."""
    array = allocate(values.shape, values.dtype, offset=offset)
    array[...] = values
    return array


def memory_of(array: np.ndarray) -> np.ndarray:
    """The whole allocation of an array, including its guards."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def valid_arguments(
    spec: OpSpec,
    variant: Mapping[str, str],
    dims: Mapping[str, int] | None = None,
    rng: np.random.Generator | None = None,
) -> dict[str, Any]:
    """Inputs, including optional ones, and attributes by name, as ``spec.reference`` takes them.

    Parameters
    ----------
    spec : OpSpec
    variant : mapping
        One of the operator's variants.
    dims : mapping, optional
        Lengths that differ from those of `small_dims`.
    rng : numpy.random.Generator, optional
        By default one with a fixed seed.

    Returns
    -------
    dict
        Arrays for the inputs, then numbers for the attributes.
    """
    rng = rng or np.random.default_rng(0)
    lengths = small_dims(spec, dims)
    arguments: dict[str, Any] = {}
    integers: dict[tuple[str, ...], list[str]] = {}
    for tensor in spec.inputs:
        dtype = numpy_dtype(spec.dtype_of(tensor, variant))
        shape = tuple(lengths[d] for d in tensor.shape)
        if tensor.packs:
            numbers = rng.standard_normal((*shape[:-1], lengths[tensor.packs]))
            values: np.ndarray = pack_mla_rows(numbers, lengths["d_v"])
        elif dtype == np.int32:
            # Positions of keys or of rows of a cache, and one past the last of them.
            values = rng.integers(0, lengths.get("s_kv", lengths.get("capacity", 1)) + 1, shape)
            integers.setdefault(tensor.shape, []).append(tensor.name)
        elif dtype == np.int8:
            values = rng.integers(-4, 5, shape)
        else:
            values = rng.standard_normal(shape)
        arguments[tensor.name] = values.astype(dtype)
    for names in integers.values():
        # Integers of one shape are the ends of a range, in their order.
        ordered = np.sort([arguments[name] for name in names], axis=0)
        arguments |= dict(zip(names, ordered, strict=True))
    for attr in spec.attrs:
        arguments[attr.name] = lengths[attr.dim] if attr.dim else attr.kind(_FLOAT_ATTR)
    return arguments


@dataclass
class Argument:
    """One tensor argument of a call.

    Parameters
    ----------
    array : ndarray or object
        The tensor in its own memory. Any other object is passed unchanged to doors that take objects.
    form : str
        "strided", or another kind of tensor to turn the array into. A door knows which kinds it can make.
    raw : mapping
        Fields of the C structure to overwrite.
    """

    array: Any
    form: str = "strided"
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """All arguments of one call of an operator, independent of a door."""

    spec: OpSpec
    variant: Mapping[str, str]
    inputs: dict[str, Argument | None]
    attrs: dict[str, Any]
    outputs: dict[str, Argument | None]
    options: dict[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> Argument:
        """An input or output of the call."""
        found = self.inputs.get(name) or self.outputs.get(name)
        assert found is not None
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """The memory of every argument that has memory, by name."""
        arguments = {**self.inputs, **self.outputs}
        return {n: a.array for n, a in arguments.items() if a is not None and isinstance(a.array, np.ndarray)}

    def reference(self) -> tuple[np.ndarray, ...]:
        """The result of the operator's definition for these arguments."""
        inputs = {name: argument.array for name, argument in self.inputs.items() if argument is not None}
        with np.errstate(all="ignore"):
            return self.spec.reference(**inputs, **self.attrs)


def output_argument(
    spec: OpSpec, tensor: TensorSpec, variant: Mapping[str, str], lengths: Mapping[str, int]
) -> Argument:
    """Memory for one output."""
    return Argument(allocate([lengths[d] for d in tensor.shape], numpy_dtype(spec.dtype_of(tensor, variant))))


# What the fixed seed gave, by operator, types and lengths: there are thousands of cases to a handful of these.
_made: dict[tuple[object, ...], dict[str, Any]] = {}


def valid_call(
    spec: OpSpec,
    variant: Mapping[str, str],
    dims: Mapping[str, int] | None = None,
    rng: np.random.Generator | None = None,
) -> Call:
    """`valid_arguments` and outputs for them, each in its own memory."""
    lengths = small_dims(spec, dims)
    key = (spec.name, *variant.items(), *lengths.items())
    arguments = None if rng else _made.get(key)
    if arguments is None:
        arguments = valid_arguments(spec, variant, dims, rng)
        if rng is None:
            _made[key] = arguments
    return Call(
        spec,
        variant,
        {t.name: Argument(place(arguments[t.name])) for t in spec.inputs},
        {a.name: arguments[a.name] for a in spec.attrs},
        {t.name: output_argument(spec, t, variant, lengths) for t in spec.outputs},
    )
