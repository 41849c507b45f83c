"""Tensors of the wrong rank, shape or element type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from dsa_tvm.spec import DIMS, DLPACK_TYPES, INT32_MAX, OpSpec, TensorSpec

from .case import Case, needs_of, replace
from .samples import allocate, numpy_dtype, place, small_dims

_OTHER_TYPES = ("float64", "int64", "int16", "int8", "bool", "complex64")


def shapes(spec: OpSpec, tensor: TensorSpec) -> Iterator[Case]:
    """Another rank, or another length of one axis."""
    name, needs, lengths = tensor.name, needs_of(spec, tensor), small_dims(spec)
    ranks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "rank + 1": lambda a: place(a[..., None]),
        "rank - 1": lambda a: place(a[..., 0]),
        "rank 0": lambda a: place(a.reshape(-1)[0]),
        "rank 9": lambda a: place(a.reshape(a.shape + (1,) * (9 - a.ndim))),
    }
    for kind, make in ranks.items():
        yield Case(name, kind, replace(name, make), (name,), needs)
    for axis, dim_name in enumerate(tensor.shape):
        dim, length = DIMS[dim_name], lengths[dim_name]
        hostile = {"length + 1": length + 1, "length - 1": length - 1, "zero length": 0}
        if dim.maximum < INT32_MAX:
            hostile["length above maximum"] = dim.maximum + 1
        for kind, other in hostile.items():
            blamed = _to_blame(spec, tensor, dim_name, other)
            if blamed:
                yield Case(name, f"{kind}, axis {axis}", replace(name, _resized(axis, other)), blamed, needs)
        if dim.values and _to_blame(spec, tensor, dim_name, unserved(dim_name)) == (name,):
            make = _resized(axis, unserved(dim_name))
            first = next((t for t in spec.inputs if dim_name in t.shape), None) is tensor
            message = "dsa-tvm build" if first else ""
            yield Case(name, f"unserved length, axis {axis}", replace(name, make), (name,), needs, message=message)

        def endless(array: np.ndarray, axis: int = axis) -> np.ndarray:
            shape = (*array.shape[:axis], INT32_MAX + 1, *array.shape[axis + 1 :])
            strides = (*array.strides[:axis], 0, *array.strides[axis + 1 :])
            return np.ndarray(shape, array.dtype, allocate(array.shape, array.dtype), 0, strides)

        yield Case(name, f"length of 2**31, axis {axis}", replace(name, endless), (name,), needs | {"strides"})


def _resized(axis: int, length: int) -> Callable[[np.ndarray], np.ndarray]:
    def make(array: np.ndarray) -> np.ndarray:
        return place(np.resize(array, (*array.shape[:axis], length, *array.shape[axis + 1 :])))

    return make


def _to_blame(spec: OpSpec, tensor: TensorSpec, dim: str, length: int) -> tuple[str, ...]:
    """The argument that the error names if one tensor has another length; none if that makes another valid call.

    Attributes bind dimensions first, then inputs in order, then outputs.
    """
    holders = [t.name for t in (*spec.inputs, *spec.outputs) if any(dim in (d, *parts_of(d)) for d in t.shape)]
    bound = any(a.dim == dim for a in spec.attrs) or parts_of(dim)
    if bound or tensor.name != holders[0] or not DIMS[dim].serves(length):
        return (tensor.name,)
    return tuple(n for n in holders[1:] if n in {t.name for t in spec.inputs})


def parts_of(dim: str) -> tuple[str, ...]:
    """The dimensions that determine a length."""
    return tuple(part.dim for part in DIMS[dim].parts)


def unserved(dim: str) -> int:
    """A length within the bounds of a dimension that the library was not built for."""
    spec = DIMS[dim]
    return next(v for v in range(spec.multiple, spec.maximum, spec.multiple) if v not in spec.values)


def types(spec: OpSpec, variant: Mapping[str, str], tensor: TensorSpec) -> Iterator[Case]:
    """Every other element type, and the right one in the wrong byte order."""
    for dtype in dict.fromkeys((*DLPACK_TYPES, *_OTHER_TYPES)):
        blamed = _type_to_blame(spec, variant, tensor, dtype)
        # An output is blamed only where the caller passes it.
        needs = needs_of(spec, tensor) | ({"outputs"} if blamed in {t.name for t in spec.outputs} else set())
        if blamed:
            make = replace(tensor.name, lambda a, d=dtype: allocate(a.shape, numpy_dtype(d)))  # type: ignore[misc]
            yield Case(tensor.name, f"dtype {dtype}", make, (blamed,), needs)
    swapped = replace(tensor.name, lambda a: a.view(a.dtype.newbyteorder(">")))
    dtype_here = numpy_dtype(spec.dtype_of(tensor, variant))
    if dtype_here.kind in "if" and dtype_here.itemsize > 1:
        yield Case(tensor.name, "dtype big-endian", swapped, (tensor.name,), needs_of(spec, tensor, "bytes", "objects"))


def _type_to_blame(spec: OpSpec, variant: Mapping[str, str], tensor: TensorSpec, dtype: str) -> str | None:
    """If one tensor has another type: the first argument that no variant allows with those before it."""
    bound: dict[str, str] = {}
    for t in (*spec.inputs, *spec.outputs):
        actual = dtype if t is tensor else spec.dtype_of(t, variant)
        if t.dtype in DLPACK_TYPES:
            if actual != t.dtype:
                return t.name
            continue
        fitting = [v for v in spec.variants if all(v[name] == value for name, value in bound.items())]
        if actual not in {v[t.dtype] for v in fitting}:
            return t.name
        bound[t.dtype] = actual
    return None
