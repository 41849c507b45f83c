"""The operators as C tables, for the library's argument checks and its ONNX Runtime door."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..ops import OPS
from ..spec import DLPACK_TYPES, ONNX_TYPES, AttrSpec, Dim, OpSpec, TensorSpec

_UNSIGNED = 1  # DLPack's code
_DTYPES = tuple(DLPACK_TYPES)
#: The type variables of operators, in the order of the C tables.
TYPE_VARS = ("T", "K")


def write(directory: Path, dims: Mapping[str, Dim], version: str) -> None:
    """Write specs.h and specs.c into a directory."""
    (directory / "specs.h").write_text(header(dims, version))
    (directory / "specs.c").write_text(source(dims))


def _enum(prefix: str, names: Iterable[str], count: str) -> str:
    return "enum { " + ", ".join(f"{prefix}_{n.upper()}" for n in names) + f", {count} }};\n"


def _maxima(dims: Mapping[str, Dim]) -> dict[str, int]:
    """The lengths of the arrays in the C structs."""
    tensors = [t for op in OPS.values() for t in (*op.inputs, *op.outputs)]
    return {
        "INPUTS": max(len(op.inputs) for op in OPS.values()),
        "OUTPUTS": max(len(op.outputs) for op in OPS.values()),
        "ATTRS": max(len(op.attrs) for op in OPS.values()),
        "NDIM": max(len(t.shape) for t in tensors),
        "TYPE_VARS": len(TYPE_VARS),
        "PARTS": max(len(dim.parts) for dim in dims.values()),
    }


def header(dims: Mapping[str, Dim], version: str) -> str:
    """``specs.h``: numbers of operators, dimensions and element types, and the most that an operator has of each."""
    maxima = ", ".join(f"MAX_{name} = {number}" for name, number in _maxima(dims).items())
    return (
        "/* Generated from the OpSpecs. */\n#ifndef DSA_TVM_SPECS_H_\n#define DSA_TVM_SPECS_H_\n"
        f'#define PACKAGE_VERSION "{version}"\n'
        + _enum("DTYPE", _DTYPES, "NUM_DTYPES")
        + _enum("DIM", dims, "NUM_DIMS")
        + _enum("OP", OPS, "NUM_OPS")
        + f"enum {{ {maxima} }};\n"
        + "#endif\n"
    )


def _tensor(op: OpSpec, tensor: TensorSpec) -> str:
    dtype = f"-1 - {TYPE_VARS.index(tensor.dtype)}" if tensor.dtype in TYPE_VARS else f"DTYPE_{tensor.dtype.upper()}"
    shape = ", ".join(f"DIM_{d.upper()}" for d in tensor.shape)
    may_be = [t.name for t in op.inputs].index(tensor.may_be) if tensor.may_be else -1
    return f'{{"{tensor.name}", {dtype}, {len(tensor.shape)}, {{{shape}}}, {int(tensor.optional)}, {may_be}}}'


def _attr(attr: AttrSpec) -> str:
    dim = f"DIM_{attr.dim.upper()}" if attr.dim else "-1"
    return f'{{"{attr.name}", {int(attr.kind is float)}, {dim}}}'


def _op(op: OpSpec) -> str:
    def rows(items):
        return "{" + ",\n    ".join(items) + "}" if items else "{{0}}"

    return (
        f'  {{"{op.name}", "{op.onnx_name}",\n'
        f"   {len(op.inputs)}, {len(op.outputs)}, {len(op.attrs)}, {len(op.variants)},\n"
        f"   {rows([_tensor(op, t) for t in op.inputs])},\n   {rows([_tensor(op, t) for t in op.outputs])},\n"
        f"   {rows([_attr(a) for a in op.attrs])},\n   variants_{op.name}}}"
    )


def _variants(op: OpSpec) -> str:
    rows = []
    for variant in op.variants:
        types = (f"DTYPE_{variant[v].upper()}" if v in variant else "-1" for v in TYPE_VARS)
        rows.append("{" + ", ".join(types) + "}")
    return f"static const int8_t variants_{op.name}[][MAX_TYPE_VARS] = {{{', '.join(rows)}}};\n"


def _dim(dim: Dim, dims: Mapping[str, Dim]) -> str:
    values = f"values_{dim.name}" if dim.values else "NULL"
    at_most = list(dims).index(dim.at_most) if dim.at_most else -1
    flag = f"--{dim.name.replace('_', '-')}"
    parts = ", ".join(f"{{DIM_{part.dim.upper()}, {part.each}, {part.adds}}}" for part in dim.parts) or "{0}"
    bounds = f"{dim.minimum}LL, {dim.maximum}LL"
    served = f"{values}, {len(dim.values)}, {dim.multiple}"
    return f'  {{"{dim.name}", {bounds}, {served}, {at_most}, "{flag}", {len(dim.parts)}, {{{parts}}}}}'


def _array(declaration: str, rows: Iterable[str]) -> str:
    return f"\nconst {declaration} = {{\n" + ",\n".join(rows) + "};\n"


def source(dims: Mapping[str, Dim]) -> str:
    """``specs.c``: the tables."""
    dtypes = [
        f'  {{"{name}", {code}, {bits}, {_UNSIGNED if bits < 32 else code}, {ONNX_TYPES[name]}}}'
        for name, (code, bits) in DLPACK_TYPES.items()
    ]
    values = [
        f"static const int64_t values_{d.name}[] = {{{', '.join(map(str, d.values))}}};\n"
        for d in dims.values()
        if d.values
    ]
    return "".join(
        [
            '/* Generated from the OpSpecs. */\n#include "common/internal.h"\n\n',
            *values,
            *map(_variants, OPS.values()),
            _array("struct dtype_spec dsa_dtypes[NUM_DTYPES]", dtypes),
            _array("struct dim_spec dsa_dims[NUM_DIMS]", [_dim(d, dims) for d in dims.values()]),
            _array("struct op_spec dsa_ops[NUM_OPS]", [_op(op) for op in OPS.values()]),
        ]
    )
