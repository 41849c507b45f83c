"""Odd values, lengths and layouts that are valid: each has a defined result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from dsa_tvm.benchmark.workload import repeated_keys
from dsa_tvm.spec import DIMS, INT32_MAX, OpSpec

from .case import Case, needs_of, replace
from .samples import Argument, Call, memory_of, place, small_dims

INT32_MIN = -INT32_MAX - 1


def cases(spec: OpSpec, variant: Mapping[str, str]) -> Iterator[Case]:
    """The cases with a defined result, for one operator and one choice of element types."""
    yield Case("none", "valid", lambda call: None)
    yield from _lengths(spec)
    yield from _integers(spec, variant)
    yield from _reals(spec, variant)
    yield from _repetitions(spec)
    yield from _passing(spec, variant)
    yield from _attributes(spec)


def _lengths(spec: OpSpec) -> Iterator[Case]:
    valid = small_dims(spec)
    hostile: list[dict[str, int]] = []
    for name in spec.dims:
        dim = DIMS[name]
        if dim.parts:
            continue
        if dim.values:
            hostile += [{name: value} for value in dim.values]
        else:
            lengths = {dim.minimum, 1, valid[name] + 1, *([dim.maximum] if dim.maximum < INT32_MAX else [])}
            hostile += [{name: length} for length in sorted(lengths)]
    unbounded = [d for d in spec.dims if not DIMS[d].values and DIMS[d].minimum == 0]
    hostile += [dict.fromkeys(unbounded, length) for length in (0, 1)]
    for dims in hostile:
        yield Case(", ".join(dims), f"length {dims}", lambda call: None, dims=dims)


def _fill(name: str, value: float) -> Case:
    def apply(call: Call) -> None:
        call.tensor(name).array[...] = value

    return Case(name, f"all {value}", apply)


def _integers(spec: OpSpec, variant: Mapping[str, str]) -> Iterator[Case]:
    integers = [t for t in spec.inputs if np.dtype(np.int32).name == spec.dtype_of(t, variant)]
    lengths = small_dims(spec)
    # Every length is the first position that is out of range, for some input.
    values = sorted({INT32_MIN, INT32_MIN + 1, -1, 0, INT32_MAX - 1, INT32_MAX} | {*lengths.values()})
    for tensor in integers:
        name = tensor.name
        for value in values:
            yield _fill(name, value)

        def mix(call: Call, name: str = name) -> None:
            array = call.tensor(name).array
            array[...] = np.resize([INT32_MIN, 0, INT32_MAX, -1, lengths.get("s_kv", 0), 1, -2], array.shape)

        def scatter(call: Call, name: str = name) -> None:
            array = call.tensor(name).array
            array[...] = np.random.default_rng(1).integers(INT32_MIN, INT32_MAX, array.shape, endpoint=True)

        yield Case(name, "extremes mixed with positions", mix)
        yield Case(name, "any integers", scatter)
    for first, second in itertools.pairwise(integers):
        if first.shape != second.shape:
            continue
        for low, high in ((INT32_MIN, INT32_MAX), (INT32_MAX, INT32_MIN), (-1, INT32_MAX), (INT32_MIN, -1)):

            def both(call: Call, a: str = first.name, b: str = second.name, low: int = low, high: int = high) -> None:
                call.tensor(a).array[...] = low
                call.tensor(b).array[...] = high

            yield Case(f"{first.name}, {second.name}", f"all {low}, {high}", both)

        def swap(call: Call, a: str = first.name, b: str = second.name) -> None:
            x, y = call.tensor(a), call.tensor(b)
            x.array, y.array = y.array, x.array

        yield Case(f"{first.name}, {second.name}", "reversed", swap)


def _reals(spec: OpSpec, variant: Mapping[str, str]) -> Iterator[Case]:
    for tensor in spec.inputs:
        dtype = spec.dtype_of(tensor, variant)
        if dtype == "int32":
            continue
        if dtype == "uint8":
            # As e4m3: zero and NaN. The largest scales are no numbers, so that no score is near an end of f32.
            for byte in (0, 0x7F, 0xFF):
                yield _fill(tensor.name, byte)
            continue
        if dtype == "int8":
            values = [-128.0, -1.0, 0.0, 127.0]
        else:
            # e4m3fn has no infinity.
            values = [0.0, -0.0, float("nan")] + ([] if "fn" in dtype else [float("inf"), float("-inf")])
        for value in values:
            yield _fill(tensor.name, value)
            for where in (0, -1):

                def one(call: Call, name: str = tensor.name, value: float = value, where: int = where) -> None:
                    call.tensor(name).array.reshape(-1)[where] = value

                yield Case(tensor.name, f"{value} at {where}", one)


def _repetitions(spec: OpSpec) -> Iterator[Case]:
    """Repetitive tokens, in each input and in all inputs."""
    # With that many keys and all of them selected, a sum has thousands of equal addends.
    many = {"s_kv": 2100} | ({"topk": 2100} if "topk" in spec.dims else {})
    tokens = {t.name: [i for i, d in enumerate(t.shape) if d in ("s_q", "s_kv")] for t in spec.inputs}
    repeating = [[name] for name, axes in tokens.items() if axes]
    for names in (*repeating, [name for name, axes in tokens.items() if axes]):

        def repeat(call: Call, names: list[str] = names) -> None:
            for name in names:
                array = call.tensor(name).array
                for axis in tokens[name]:
                    array[...] = np.take(array, [0], axis)

        yield Case(", ".join(names), "the same for every token", repeat)
    if "s_kv" in spec.dims:
        keys = [t.name for t in spec.inputs if "s_kv" in t.shape]
        for period in (1, 3):

            def recur(call: Call, period: int = period) -> None:
                inputs = {name: call.tensor(name).array for name in keys}
                for name, array in repeated_keys(spec, inputs, period).items():
                    call.tensor(name).array[...] = array

            yield Case(", ".join(keys), f"{many['s_kv']} keys with a period of {period}", recur, dims=many)


def _passing(spec: OpSpec, variant: Mapping[str, str]) -> Iterator[Case]:
    """Odd ways to pass valid arguments."""
    for tensor in (*spec.inputs, *spec.outputs):
        name = tensor.name
        if tensor.optional:

            def leave_out(call: Call, name: str = name) -> None:
                call.inputs[name] = None

            yield Case(name, "left out", leave_out)
        if tensor in spec.inputs:

            def freeze(call: Call, name: str = name) -> None:
                call.tensor(name).array.flags.writeable = False

            yield Case(name, "read-only", freeze, needs=frozenset({"read-only"}))
        for axis, dim in enumerate(tensor.shape):
            # An axis of length 0 or 1 may have any stride.
            for length in {DIMS[dim].minimum, 1}:
                if length <= 1 and DIMS[dim].serves(length):
                    needs = needs_of(spec, tensor, "strides")
                    kind = f"odd stride, axis {axis} of length {length}"
                    yield Case(name, kind, replace(name, _odd_stride(axis)), needs=needs, dims={dim: length})
        odd: tuple[dict[str, object], ...] = ({"strides": None}, {"device_id": 7}, {"data": 64, "byte_offset": 64})
        for raw in odd:

            def override(call: Call, name: str = name, raw: dict[str, object] = raw) -> None:
                _override(call.tensor(name), raw)

            yield Case(name, ", ".join(raw), override, needs=needs_of(spec, tensor, "raw"))
    for threads in (0, 1, 2, INT32_MAX):

        def ask(call: Call, threads: int = threads) -> None:
            call.options = {"num_threads": threads}

        yield Case("options", f"{threads} threads", ask, needs=frozenset({"options"}))
    if sum(t.optional for t in spec.inputs) > 1:

        def leave_out_all(call: Call) -> None:
            call.inputs.update({t.name: None for t in spec.inputs if t.optional})

        yield Case("optional", "left out", leave_out_all)


def _override(argument: Argument, raw: dict[str, object]) -> None:
    if "data" in raw:
        raw = raw | {"data": argument.array.ctypes.data - 64}
    argument.raw.update(raw)


def _odd_stride(axis: int):
    def make(array: np.ndarray) -> np.ndarray:
        if not array.size:
            wide = place(np.zeros([max(n, 1) * 3 for n in array.shape], array.dtype))
            return wide[tuple(slice(0, 3 * n, 3) for n in array.shape)]
        strides = [s * (7 if i == axis else 1) for i, s in enumerate(array.strides)]
        memory = memory_of(array)
        return np.ndarray(array.shape, array.dtype, memory, array.ctypes.data - memory.ctypes.data, strides)

    return make


def _attributes(spec: OpSpec) -> Iterator[Case]:
    for attr in spec.attrs:
        values: list[tuple[object, tuple[str, ...]]] = []
        if attr.kind is float:
            values += [(v, ()) for v in (0.0, -0.0, -0.125, 1e-30)]
            values += [(v, ("objects",)) for v in (0, np.float32(0.125))]
        elif attr.dim:
            values.append((np.int64(small_dims(spec)[attr.dim]), ("objects",)))
        for value, needs in values:

            def apply(call: Call, name: str = attr.name, value: object = value) -> None:
                call.attrs[name] = value

            yield Case(attr.name, f"{type(value).__name__} {value}", apply, needs=frozenset(needs))
