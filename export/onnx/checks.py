"""Checks of the arguments of model builders against the `OpSpec`."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ArgumentError
from ...ops import OPS
from ...spec import DIMS, OpSpec

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def known_spec(op_name: str) -> OpSpec:
    """The operator of a name. Raises `ArgumentError` if there is none."""
    if op_name not in OPS:
        raise ArgumentError(f"{op_name}: operator: expected one of {', '.join(OPS)}, got {op_name!r}")
    return OPS[op_name]


def served_variant(spec: OpSpec, variant: Mapping[str, str] | None) -> Mapping[str, str]:
    """`variant`, or the first one of the operator for None. Raises `ArgumentError` if it is not served."""
    if variant is None:
        return spec.variants[0]
    if dict(variant) not in [dict(v) for v in spec.variants]:
        expected = ", ".join(str(dict(v)) for v in spec.variants)
        raise ArgumentError(f"{spec.name}: variant: expected one of {expected}, got {dict(variant)}")
    return variant


def check_optional(spec: OpSpec, names: Collection[str]) -> None:
    """Raise `ArgumentError` unless every name is an optional input of the operator."""
    known = [t.name for t in spec.inputs if t.optional]
    if isinstance(names, str):
        raise ArgumentError(f"{spec.name}: optional inputs: expected a collection of names, got {names!r}")
    for name in names:
        if name not in known:
            raise ArgumentError(
                f"{spec.name}: optional inputs: expected any of {', '.join(known) or 'none'}, got {name!r}"
            )


def checked_attrs(spec: OpSpec, attrs: Mapping[str, object]) -> dict[str, Any]:
    """The attributes as Python numbers. Raises `ArgumentError` unless all are given and in range."""
    known = [a.name for a in spec.attrs]
    for name in attrs:
        if name not in known:
            raise ArgumentError(
                f"{spec.name}: attribute {name}: expected any of {', '.join(known) or 'none'}, got {name!r}"
            )
    checked: dict[str, Any] = {}
    for attr in spec.attrs:
        where = f"{spec.name}: attribute {attr.name}"
        if attr.name not in attrs:
            raise ArgumentError(f"{where}: expected {attr.kind.__name__}, as it is required, got none")
        value = attrs[attr.name]
        if attr.kind is float:
            checked[attr.name] = _real(where, value)
        else:
            checked[attr.name] = _length(where, attr.dim, value) if attr.dim else _integer(where, value)
    return checked


def fixed_lengths(spec: OpSpec, dims: Mapping[str, int] | None, attrs: Mapping[str, object]) -> dict[str, int]:
    """The length of every dimension that `dims` or an attribute fixes. Raises `ArgumentError` if they disagree."""
    lengths = {a.dim: value for a in spec.attrs if a.dim and isinstance(value := attrs.get(a.name), int)}
    for name, value in (dims or {}).items():
        where = f"{spec.name}: dimension {name}"
        if name not in spec.dims:
            raise ArgumentError(f"{where}: expected one of {', '.join(spec.dims)}, got {name!r}")
        value = _length(where, name, value)
        if lengths.setdefault(name, value) != value:
            raise ArgumentError(f"{where}: expected {lengths[name]}, the attribute's value, got {value}")
    for name, value in lengths.items():
        limit = DIMS[name].at_most
        if limit in lengths and value > lengths[limit]:
            raise ArgumentError(
                f"{spec.name}: {name}: expected at most {limit}, which is {lengths[limit]}, got {value}"
            )
    return lengths | _determined(spec, lengths)


def _determined(spec: OpSpec, lengths: Mapping[str, int]) -> dict[str, int]:
    """The lengths that others determine. Raises `ArgumentError` if one is fixed to something else."""
    found = {}
    for name in spec.dims:
        try:
            length = DIMS[name].determined(lengths)
        except ValueError as error:
            raise ArgumentError(f"{spec.name}: {error}") from None
        if length is None:
            continue
        if lengths.get(name, length) != length:
            raise ArgumentError(f"{spec.name}: {name}: expected {length}, which others determine, got {lengths[name]}")
        found[name] = length
    return found


def _integer(where: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(f"{where}: expected int, got {value!r}") from None


def _length(where: str, name: str, value: object) -> int:
    # The default library serves only some of these. A body serves all, and so can a library that is built for them.
    value, dim = _integer(where, value), DIMS[name]
    if not dim.admits(value):
        raise ArgumentError(f"{where}: expected {dim.range}, got {value}")
    return value


def _real(where: str, value: object) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{where}: expected float, got {value!r}") from None
    # A float attribute is float32, so a larger number would become infinite in the model.
    if not abs(number) <= _FLOAT32_MAX:
        raise ArgumentError(f"{where}: expected a finite float32, got {value!r}")
    return number
