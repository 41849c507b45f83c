"""ONNX schemas of the operators, for the checker, shape inference and onnxscript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from onnx import TensorProto, TensorShapeProto, defs, helper
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceError

from ...ops import OPS
from ...spec import DIMS, ONNX_TYPES, OpSpec, TensorSpec, completed
from .nodes import DOMAIN, VERSION

#: The names of element types in an ONNX schema.
_TYPE_STRINGS: Mapping[str, str] = {
    **{"float32": "tensor(float)", "bfloat16": "tensor(bfloat16)", "float16": "tensor(float16)"},
    **{"float8_e4m3fn": "tensor(float8e4m3fn)", "int8": "tensor(int8)", "int32": "tensor(int32)"},
    "uint8": "tensor(uint8)",
}
_ATTRIBUTE_TYPES = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT}


def register_schemas() -> None:
    """Register an ``onnx.defs.OpSchema`` for every operator, in the domain ``ai.dsa``.

    With them ``onnx.checker`` checks our nodes, ``onnx.shape_inference`` infers their types and shapes, symbolic ones
    too, and ``onnxscript.values.Opset("ai.dsa", 1)`` has the operators. The schemas are registered for this process.
    Another call changes nothing.

    The checker then refuses a model with a *function* that has the name of an operator but disagrees with its schema.
    The bodies of `attach_bodies` agree.
    """
    for spec in OPS.values():
        if not defs.has(spec.onnx_name, VERSION, DOMAIN):
            defs.register_schema(make_schema(spec))


def make_schema(spec: OpSpec) -> OpSchema:
    """The schema of one operator."""
    variables = dict.fromkeys(t.dtype for t in (*spec.inputs, *spec.outputs) if t.dtype not in ONNX_TYPES)
    constraints = []
    for variable in variables:
        types = dict.fromkeys(_TYPE_STRINGS[variant[variable]] for variant in spec.variants)
        constraints.append((variable, list(types), f"Element type {variable}."))
    schema = OpSchema(
        spec.onnx_name,
        DOMAIN,
        VERSION,
        f"{spec.name} of dsa_tvm.",
        inputs=[_parameter(t) for t in spec.inputs],
        outputs=[_parameter(t) for t in spec.outputs],
        type_constraints=constraints,
        attributes=[OpSchema.Attribute(a.name, _ATTRIBUTE_TYPES[a.kind], required=True) for a in spec.attrs],
    )
    if hasattr(schema, "set_type_and_shape_inference_function"):  # from onnx 1.17 on
        schema.set_type_and_shape_inference_function(lambda context: _infer(spec, context))
    return schema


def _parameter(tensor: TensorSpec) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption
    return OpSchema.FormalParameter(
        tensor.name,
        _TYPE_STRINGS.get(tensor.dtype, tensor.dtype),
        f"[{', '.join(tensor.shape)}]",
        param_option=option.Optional if tensor.optional else option.Single,
    )


def _infer(spec: OpSpec, context: Any) -> None:
    """Set the types and, as far as known, the shapes of the outputs. Refuse inputs that do not go together."""
    lengths: dict[str, int | str] = {}
    types: dict[str, int] = {}
    for attr in spec.attrs:
        value = context.get_attribute(attr.name) if attr.dim else None
        if attr.dim and value is not None:
            lengths[attr.dim] = value.i
    for i, tensor in enumerate(spec.inputs):
        given = context.get_input_type(i) if i < context.get_num_inputs() and context.has_input(i) else None
        if given is None or not given.HasField("tensor_type"):
            continue
        types.setdefault(tensor.dtype, given.tensor_type.elem_type)
        if not any(_goes_with(types, variant) for variant in spec.variants):
            # Each type is allowed by itself, but they do not go together.
            _fail(spec, tensor, "a type that is served with the others", TensorProto.DataType.Name(types[tensor.dtype]))
        if given.tensor_type.HasField("shape"):
            _learn(spec, tensor, given.tensor_type.shape.dim, lengths)
    for i, tensor in enumerate(spec.outputs[: context.get_num_outputs()]):
        element = ONNX_TYPES.get(tensor.dtype) or types.get(tensor.dtype)
        if element:
            context.set_output_type(i, helper.make_tensor_type_proto(element, [lengths.get(d) for d in tensor.shape]))


def _goes_with(types: Mapping[str, int], variant: Mapping[str, str]) -> bool:
    return all(ONNX_TYPES[dtype] == types.get(variable, ONNX_TYPES[dtype]) for variable, dtype in variant.items())


def _learn(
    spec: OpSpec, tensor: TensorSpec, dims: Sequence[TensorShapeProto.Dimension], lengths: dict[str, int | str]
) -> None:
    if len(dims) != len(tensor.shape):
        _fail(spec, tensor, f"rank {len(tensor.shape)} [{', '.join(tensor.shape)}]", f"rank {len(dims)}")
    known = {name: length for name, length in lengths.items() if isinstance(length, int)}
    try:
        known = completed(known)
    except ValueError as error:
        _fail(spec, tensor, "lengths that go together", str(error))
    for name, dim in zip(tensor.shape, dims, strict=True):
        if dim.HasField("dim_value"):
            if known.get(name, dim.dim_value) != dim.dim_value:
                _fail(spec, tensor, f"{name} of {known[name]}", str(dim.dim_value))
            if not DIMS[name].admits(dim.dim_value):
                _fail(spec, tensor, f"{name} in {DIMS[name].range}", str(dim.dim_value))
            lengths[name] = dim.dim_value
        elif dim.dim_param:
            # A symbol is only the model's name for the length. A number says more.
            lengths.setdefault(name, dim.dim_param)


def _fail(spec: OpSpec, tensor: TensorSpec, expected: str, got: str) -> NoReturn:
    raise InferenceError(f"{spec.name}: {tensor.name}: expected {expected}, got {got}")
