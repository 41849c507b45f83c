"""A hostile call, independent of a door."""

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
        What is done to it, in a few words.
    apply : callable
        Turns a valid `Call` into the hostile one, in place.
    names : tuple of str
        The error must name one of these arguments. If empty, the result is defined, and `Call.reference` has it.
    needs : frozenset of str
        What a door must be able to pass: "outputs" (memory from the caller), "strides", "negative strides",
        "bytes" (any address), "read-only", "raw" (the C structure), "objects" (of any Python type), "bool", "double",
        "missing" (attributes), "options", and every `Argument.form`.
    dims : mapping
        Lengths of the valid call that differ from `small_dims`.
    message : str
        Words that the error must also contain.
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
    """`needs`, and "outputs" if the tensor is an output."""
    return frozenset(needs) | ({"outputs"} if tensor in spec.outputs else set())


def replace(name: str, make: Callable[[np.ndarray], object]) -> Callable[[Call], None]:
    """Replaces the array of an argument by what `make` makes of it."""

    def apply(call: Call) -> None:
        argument = call.tensor(name)
        argument.array = make(argument.array)

    return apply
