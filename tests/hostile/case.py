"""A hostile call, in no door's own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dsa_tvm.spec import OpSpec, TensorSpec

from .samples import Call, valid_call


@dataclass(frozen=True)
class Case:
    """One hostile call.

    Parameters
    ----------
    argument : str
        What is made hostile: an input, output, attribute, dimension or "options".
    kind : str
        How, in a few words.
    apply : callable
        Turns a valid `Call` into the hostile one, in place.
    names : tuple of str
        The arguments of which the error must name one. Empty: the result is defined, and `Call.reference` tells it.
    needs : frozenset of str
        What a door must be able to pass: "outputs" (memory for them is the caller's), "strides", "negative strides",
        "bytes" (any address), "read-only", "raw" (the C structure), "objects" (of any Python type), "bool", "double",
        "missing" (attributes), "options", and every `Argument.form`.
    dims : mapping
        Lengths of the valid call that differ from `small_dims`.
    message : str
        What the error must say too.
    """

    argument: str
    kind: str
    apply: Callable[[Call], None]
    names: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    dims: Mapping[str, int] = field(default_factory=dict)
    message: str = ""

    def call(self, spec: OpSpec, variant: Mapping[str, str], rng: np.random.Generator | None = None) -> Call:
        """The hostile call."""
        call = valid_call(spec, variant, self.dims, rng)
        self.apply(call)
        return call


def needs_of(spec: OpSpec, tensor: TensorSpec, *needs: str) -> frozenset[str]:
    """`needs`, and "outputs" where the tensor is one."""
    return frozenset(needs) | ({"outputs"} if tensor in spec.outputs else set())


def replace(name: str, make: Callable[[np.ndarray], object]) -> Callable[[Call], None]:
    """Puts what `make` makes of an argument's array in its place."""

    def apply(call: Call) -> None:
        argument = call.tensor(name)
        argument.array = make(argument.array)

    return apply
