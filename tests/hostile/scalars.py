"""Attributes and options out of range or of the wrong type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dsa_tvm.spec import DIMS, OpSpec

from .case import Case
from .samples import Call, small_dims
from .tensors import unserved

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def attributes(spec: OpSpec) -> Iterator[Case]:
    """Every attribute out of range, of another type, or left out."""
    for attr in spec.attrs:
        hostile: list[tuple[object, tuple[str, ...], str]] = [
            (value, ("objects",), "") for value in ("text", [1], 1j, object(), np.array([1, 2]))
        ]
        hostile.append((True, ("objects", "bool"), ""))
        if attr.kind is float:
            hostile += [(value, (), "") for value in (float("nan"), float("inf"), float("-inf"))]
            # Beyond float32, in which the kernels compute.
            hostile += [(value, ("double",), "") for value in (3.5e38, -1e300, 1.7976931348623157e308)]
            hostile.append((10**400, ("objects",), ""))
        else:
            hostile += [(value, ("objects",), "") for value in (1.5, float("nan"), _INT64_MAX + 1, _INT64_MIN - 1)]
            hostile += [(value, (), "") for value in (-1, _INT64_MIN, _INT64_MAX)]
        if attr.dim:
            dim, valid = DIMS[attr.dim], small_dims(spec)[attr.dim]
            bounds = {0, dim.minimum - 1, dim.maximum + 1, 2**32 + valid}
            hostile += [(value, (), "") for value in sorted(bounds) if not dim.serves(value)]
            if dim.values:
                hostile.append((unserved(attr.dim), (), "dsa-tvm build"))
        for value, needs, message in hostile:

            def apply(call: Call, name: str = attr.name, value: object = value) -> None:
                call.attrs[name] = value

            kind = f"{type(value).__name__} {value!s:.24}"
            yield Case(attr.name, kind, apply, (attr.name,), frozenset(needs), message=message)

        def drop(call: Call, name: str = attr.name) -> None:
            del call.attrs[name]

        yield Case(attr.name, "missing", drop, (attr.name,), frozenset({"missing"}))


def options() -> Iterator[Case]:
    """The options of a call."""
    hostile: list[tuple[dict[str, object], tuple[str, ...], str]] = [
        ({"num_threads": n}, (), "num_threads") for n in (-1, -(2**31))
    ]
    hostile += [({"num_threads": n}, ("objects",), "") for n in ("text", 1.5, [1], 2**31, 2**40, -(2**63))]
    hostile += [({"size": n}, ("raw",), "size") for n in (0, 1, 4, 7)]
    for options, needs, message in hostile:

        def apply(call: Call, options: dict[str, object] = options) -> None:
            call.options = dict(options)

        names = ("options", *options)
        yield Case("options", str(options), apply, names, frozenset({"options", *needs}), message=message)
