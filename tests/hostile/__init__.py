"""Hostile calls of any operator, made only from its `OpSpec`.

Each `Case` turns a valid call into one that must be refused with an error that names an argument, or that still has a
defined result. Cases do not depend on a door. They state what a door must be able to express. This needs only NumPy,
and ml_dtypes for the element types that NumPy lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dsa_tvm.spec import OpSpec

from . import layouts, scalars, tensors, values
from .case import Case
from .samples import Argument, Call, valid_arguments, valid_call

__all__ = ["Argument", "Call", "Case", "cases", "valid_arguments", "valid_call"]


def cases(spec: OpSpec, variant: Mapping[str, str]) -> Iterator[Case]:
    """All cases of one operator and one choice of element types.

    Cases that do not depend on element types come only with the first choice of the operator.
    """
    first = variant == spec.variants[0]
    for tensor in (*spec.inputs, *spec.outputs):
        yield from tensors.shapes(spec, tensor)
        yield from tensors.types(spec, variant, tensor)
        yield from layouts.layouts(spec, variant, tensor)
        if first:
            yield from layouts.forms(spec, variant, tensor)
            yield from layouts.structures(spec, variant, tensor)
    yield from layouts.shared_memory(spec)
    if first:
        yield from scalars.attributes(spec)
        yield from scalars.options()
    yield from values.cases(spec, variant)
