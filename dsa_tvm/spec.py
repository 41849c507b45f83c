"""What an operator is: its arguments, their symbolic shapes and types, its attributes and tolerances.

An `OpSpec` is the only description of an operator. The C argument checks, the ONNX schemas, the
`torch.library` schemas and the hostile-input tests are all generated from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

INT32_MAX = 2**31 - 1

#: DLPack (type code, bits) of every element type this package knows. DLPack's own numbering.
DLPACK_TYPES: Mapping[str, tuple[int, int]] = {
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "float16": (2, 16),
    "float8_e4m3fn": (10, 8),
    "int8": (0, 8),
    "int32": (0, 32),
    "uint8": (1, 8),
}

#: Bytes of an element, which are also the least alignment of its address.
ELEMENT_BYTES: Mapping[str, int] = {name: bits // 8 for name, (_, bits) in DLPACK_TYPES.items()}

#: DLPack (type code, bits) of types that no operator takes, so that an error can name them.
OTHER_DLPACK_TYPES: Mapping[str, tuple[int, int]] = {
    "float8_e3m4": (7, 8),
    "float8_e4m3": (8, 8),
    "float8_e4m3b11fnuz": (9, 8),
    "float8_e4m3fnuz": (11, 8),
    "float8_e5m2": (12, 8),
    "float8_e5m2fnuz": (13, 8),
    "float8_e8m0fnu": (14, 8),
}

#: ONNX TensorProto.DataType of the types in `DLPACK_TYPES`.
ONNX_TYPES: Mapping[str, int] = {
    "float32": 1,
    "bfloat16": 16,
    "float16": 10,
    "float8_e4m3fn": 17,
    "int8": 3,
    "int32": 6,
    "uint8": 2,
}


@dataclass(frozen=True)
class Part:
    """A term of a length that others determine: every `each` elements of `dim` add `adds` to it."""

    dim: str
    each: int
    adds: int


@dataclass(frozen=True)
class Dim:
    """A named length, and the values that the library serves.

    Parameters
    ----------
    name : str
        The usual name of the length in the field, such as ``s_kv``.
    minimum, maximum : int
        Inclusive bounds.
    values : tuple of int
        When not empty, the only values served. A library can be built with more.
    multiple : int
        Every value is a multiple of this.
    at_most : str, optional
        The dimension this one may not exceed.
    parts : tuple of Part
        When not empty, this length is the sum of what other dimensions add. Attributes or earlier inputs must give
        these. A length that is not a multiple of its part's `each` is not served.
    """

    name: str
    minimum: int = 0
    maximum: int = INT32_MAX
    values: tuple[int, ...] = ()
    multiple: int = 1
    at_most: str | None = None
    parts: tuple[Part, ...] = ()

    def serves(self, value: int) -> bool:
        """Whether this dimension may have the length `value`."""
        if self.values:
            return value in self.values
        return self.admits(value)

    def admits(self, value: int) -> bool:
        """Whether kernels can be built for this length."""
        return self.minimum <= value <= self.maximum and value % self.multiple == 0

    def determined(self, lengths: Mapping[str, int]) -> int | None:
        """The length that follows from `lengths` and the `parts`; None if it does not follow.

        Raises
        ------
        ValueError
            A length is not a multiple of its part's `each`.
        """
        if not self.parts or any(part.dim not in lengths for part in self.parts):
            return None
        for part in self.parts:
            if lengths[part.dim] % part.each:
                raise ValueError(f"{part.dim}: expected a multiple of {part.each}, got {lengths[part.dim]}")
        return sum(lengths[part.dim] // part.each * part.adds for part in self.parts)

    @property
    def range(self) -> str:
        """The lengths that `admits` accepts, for a message."""
        multiple = f"a multiple of {self.multiple} in " if self.multiple > 1 else ""
        return f"{multiple}{self.minimum}..{self.maximum}"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor argument.

    Parameters
    ----------
    name : str
    dtype : str
        A key of `DLPACK_TYPES`, or the name of a type variable of the operator.
    shape : tuple of str
        Names of dimensions.
    optional : bool
        Whether the argument may be left out.
    packs : str, optional
        Name of the dimension of the numbers that are packed into each row of bytes, where the tensor is one of those;
        `ops.packed_rows` has the format.
    may_be : str, optional
        For an output: the input of the same type and shape whose memory it may use, all of it. The operator then
        changes that input in place. Any other overlap is refused.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    optional: bool = False
    packs: str | None = None
    may_be: str | None = None


@dataclass(frozen=True)
class AttrSpec:
    """One scalar attribute. With `dim`, it gives the length of that dimension."""

    name: str
    kind: type
    dim: str | None = None


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the reference: ``|err| <= abs + rel * |reference|`` for each element, and a cosine
    difference of at most ``cos`` for the whole tensor.
    """

    abs: float
    rel: float
    cos: float


@dataclass(frozen=True)
class OpSpec:
    """One operator.

    Parameters
    ----------
    name : str
        Name in Python, PyTorch and C.
    onnx_name : str
        Name in the ONNX domain ``ai.dsa``.
    inputs, outputs : tuple of TensorSpec
    attrs : tuple of AttrSpec
    variants : tuple of mapping
        The served assignments of the type variables.
    tolerance : mapping
        By name of the output, then by element type of the first input: a `Tolerance`.
    reference : callable
        The operator in float64 NumPy. It takes inputs and attributes by name and returns the outputs in order.
    """

    name: str
    onnx_name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attrs: tuple[AttrSpec, ...]
    variants: tuple[Mapping[str, str], ...]
    tolerance: Mapping[str, Mapping[str, Tolerance]]
    reference: Callable = field(compare=False)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions that inputs and attributes give, in order of appearance."""
        names = [d for t in self.inputs for d in t.shape] + [a.dim for a in self.attrs if a.dim]
        return tuple(dict.fromkeys(names))

    def dtype_of(self, tensor: TensorSpec, variant: Mapping[str, str]) -> str:
        """Element type of `tensor` under one assignment of the type variables."""
        return variant.get(tensor.dtype, tensor.dtype)

    def dtypes_of(self, tensor: TensorSpec) -> tuple[str, ...]:
        """Element types of `tensor` under all assignments of the type variables."""
        return tuple(dict.fromkeys(self.dtype_of(tensor, variant) for variant in self.variants))


#: Every dimension of every operator. The listed values of d_idx, d_qk and d_v are those the shipped
#: library serves; `dsa-tvm build` makes a library that serves others.
DIMS: Mapping[str, Dim] = {
    d.name: d
    for d in (
        Dim("s_q"),
        Dim("s_kv"),
        Dim("h_idx", 1, 64),
        Dim("d_idx", 32, 1024, (32, 64, 128), multiple=32),
        Dim("topk", 1, 4096),
        Dim("h_q", 1, 128),
        Dim("d_qk", 32, 1024, (512, 576), multiple=32),
        Dim("d_v", 64, 1024, (512,), multiple=64, at_most="d_qk"),
        # Bytes: d_v e4m3, an f32 for each 128 of them, d_qk - d_v bf16.
        Dim("d_packed", 132, 1924, parts=(Part("d_qk", 1, 2), Part("d_v", 128, 128 + 4 - 256))),
        # Of a cache that grows: sequences, room for rows in each, new rows, elements of a row.
        Dim("batch"),
        Dim("capacity"),
        Dim("s_new"),
        Dim("d_row", 1),
    )
}


def completed(lengths: Mapping[str, int]) -> dict[str, int]:
    """`lengths`, and those that follow from them.

    Raises
    ------
    ValueError
        A length is not a multiple of what its part needs, see `Dim.determined`.
    """
    found = {name: dim.determined(lengths) for name, dim in DIMS.items() if name not in lengths}
    return {**lengths, **{name: length for name, length in found.items() if length is not None}}


def with_values(dims: Mapping[str, Dim], extra: Mapping[str, tuple[int, ...]]) -> dict[str, Dim]:
    """`dims`, with more served values for some of them.

    Raises
    ------
    ValueError
        A value is out of the bounds of its dimension, or not a multiple of what kernels need.
    """
    widened = dict(dims)
    for name, values in extra.items():
        dim = dims[name]
        for value in values:
            if not dim.admits(value):
                raise ValueError(f"{name}: expected {dim.range}, got {value}")
        widened[name] = replace(dim, values=tuple(sorted({*dim.values, *values})))
    return widened
