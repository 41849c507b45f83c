"""Correct tensors at odd addresses and with odd layouts, and objects that are not tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from dsa_tvm.spec import INT32_MAX, OpSpec, TensorSpec

from .case import Case, needs_of, replace
from .samples import Argument, Call, allocate, numpy_dtype, place, small_dims

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_OBJECTS = (0, 1.5, "text", [1.0, 2.0], object(), np.float32(1), np.array(["a"]), np.array([None]))


def layouts(spec: OpSpec, variant: Mapping[str, str], tensor: TensorSpec) -> Iterator[Case]:
    """Strides and addresses."""
    name, lengths = tensor.name, small_dims(spec)
    strided = needs_of(spec, tensor, "strides")
    long_axes = [axis for axis, dim in enumerate(tensor.shape) if lengths[dim] > 1]
    for axis in long_axes:

        def doubled(a: np.ndarray, axis: int = axis) -> np.ndarray:
            memory = allocate([n * (1 + (i == axis)) for i, n in enumerate(a.shape)], a.dtype)
            return memory[tuple(slice(None, None, 1 + (i == axis)) for i in range(a.ndim))]

        def constant(a: np.ndarray, axis: int = axis) -> np.ndarray:
            strides = tuple(0 if i == axis else s for i, s in enumerate(a.strides))
            return np.ndarray(a.shape, a.dtype, allocate(a.shape, a.dtype), 0, strides)

        yield Case(name, f"strides doubled, axis {axis}", replace(name, doubled), (name,), strided)
        yield Case(name, f"strides 0, axis {axis}", replace(name, constant), (name,), strided)
        reverse = replace(name, lambda a, axis=axis: np.flip(a, axis))  # type: ignore[misc]
        yield Case(name, f"strides negative, axis {axis}", reverse, (name,), strided | {"negative strides"})
    for i, j in itertools.combinations(long_axes, 2):
        # With the axes' lengths as they should be.
        swap = replace(name, lambda a, i=i, j=j: place(a.swapaxes(i, j)).swapaxes(i, j))  # type: ignore[misc]
        yield Case(name, f"axes {i} and {j} swapped", swap, (name,), strided)
    itemsize = numpy_dtype(spec.dtype_of(tensor, variant)).itemsize
    for offset in range(1, itemsize):
        shift = replace(name, lambda a, offset=offset: place(a, offset=offset))  # type: ignore[misc]
        yield Case(name, f"misaligned by {offset}", shift, (name,), needs_of(spec, tensor, "bytes"))


def forms(spec: OpSpec, variant: Mapping[str, str], tensor: TensorSpec) -> Iterator[Case]:
    """Tensors of other kinds, other objects, and missing arguments."""
    name = tensor.name
    differentiable = "float" in spec.dtype_of(tensor, variant)
    capsules = ("no capsule", "other capsule", "used capsule")
    for form in ("device", "sparse", *(["requires grad"] if differentiable else []), *capsules):

        def apply(call: Call, form: str = form) -> None:
            call.tensor(name).form = form

        message = "capsule" if form in capsules else ""
        yield Case(name, form, apply, (name,), needs_of(spec, tensor, form), message=message)
    for value in _OBJECTS:
        kind = f"{type(value).__name__} {value!r:.12}"
        apply_object = replace(name, lambda a, value=value: value)  # type: ignore[misc]
        yield Case(name, kind, apply_object, (name,), needs_of(spec, tensor, "objects"))
    if tensor in spec.outputs:
        frozen = replace(name, _read_only)
        yield Case(name, "read-only", frozen, (name,), needs_of(spec, tensor, "read-only"))

        def leave_out(call: Call) -> None:
            call.outputs[name] = None

        yield Case(name, "null", leave_out, (name,), needs_of(spec, tensor))
    elif not tensor.optional:

        def drop(call: Call) -> None:
            call.inputs[name] = None

        yield Case(name, "null", drop, (name,))


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def structures(spec: OpSpec, variant: Mapping[str, str], tensor: TensorSpec) -> Iterator[Case]:
    """Values of fields in the C structure that no array can have."""
    name, ndim = tensor.name, len(tensor.shape)
    shape = [small_dims(spec).get(d, 1) for d in tensor.shape]
    fields: list[dict[str, object]] = [{"data": None}, {"shape": None}, {"data": None, "byte_offset": 2**64 - 64}]
    # Those that wrap around, to the memory before the tensor: all of it, or its end alone.
    fields += [
        {"byte_offset": n} for n in (*range(1, numpy_dtype(spec.dtype_of(tensor, variant)).itemsize), 2**64 - 64)
    ]
    fields += [{"data": 2**64 - 64, "byte_offset": 56}]
    fields += [{"ndim": n} for n in (-1, -(2**31), INT32_MAX, 0)]
    fields += [{"device_type": n} for n in (0, 2, 7, -1, -(2**31), INT32_MAX)]
    fields += [{"lanes": n} for n in (0, 2, 65535)]
    fields += [{"bits": n} for n in (0, 1, 255)]
    fields += [{"code": 255}]
    for axis, length in itertools.product(range(ndim), (-1, _INT64_MIN, _INT64_MAX, None, 2**61)):
        length = 2**32 + shape[axis] if length is None else length  # the right one in its lower half
        fields.append({"shape": [*shape[:axis], length, *shape[axis + 1 :]]})
    fields += [{"strides": [n] * ndim} for n in (_INT64_MIN, _INT64_MAX, -1, 0)]
    for raw in fields:

        def apply(call: Call, raw: dict[str, object] = raw) -> None:
            call.tensor(name).raw.update(raw)

        yield Case(name, ", ".join(f"{k}={v}" for k, v in raw.items()), apply, (name,), needs_of(spec, tensor, "raw"))


def shared_memory(spec: OpSpec) -> Iterator[Case]:
    """Outputs that share memory with an input or another output."""
    for i, output in enumerate(spec.outputs):
        for other in (*spec.inputs, *spec.outputs[:i]):
            for kind in ("same memory", "last element", "first element"):

                def apply(call: Call, pair: tuple[str, str] = (output.name, other.name), kind: str = kind) -> None:
                    _overlap(call.tensor(pair[0]), call.tensor(pair[1]), kind)

                # What may be in place has a result.
                blamed = () if kind == "same memory" and other.name == output.may_be else (output.name,)
                yield Case(output.name, f"{kind} as {other.name}", apply, blamed, frozenset({"outputs"}))


def _overlap(output: Argument, other: Argument, kind: str) -> None:
    """Puts both into one memory, so that they share all of it or one element."""
    a, b = output.array, other.array
    item = max(a.itemsize, b.itemsize)
    # Where the output starts, counted from the start of the other.
    start = {"same memory": 0, "last element": b.nbytes - 1, "first element": 1 - a.nbytes}[kind]
    start = start // item * item if start > 0 else -(-start // item * item)
    memory = allocate((a.nbytes + b.nbytes + 2 * item,), np.dtype(np.uint8))
    base = max(0, -start)
    output.array, other.array = (np.ndarray(x.shape, x.dtype, memory, at) for x, at in ((a, base + start), (b, base)))
    other.array[...] = b
