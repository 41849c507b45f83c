"""The operators in ONNX: nodes of the domain ``ai.dsa`` together with their function bodies.

With the compiled library registered, ONNX Runtime prefers its kernels to the bodies of the same names. Without it, the
model still runs, more slowly, because the bodies compute the same with standard operators.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from onnx import FunctionProto, ModelProto, NodeProto, ValueInfoProto, helper

from ...errors import ArgumentError
from ...ops import OPS
from ...spec import ONNX_TYPES, OpSpec, TensorSpec
from .bodies import make_function
from .checks import check_optional, checked_attrs, known_spec, served_variant

#: The ONNX domain of the operators, and its version.
DOMAIN = "ai.dsa"
VERSION = 1
#: The versions of built models: old enough for ONNX Runtime 1.18, new enough for float8 tensors.
IR_VERSION = 9
OPSET = 20
_MIN_OPSET = 19  # the first whose Cast knows float8
_BY_ONNX_NAME = {spec.onnx_name: spec for spec in OPS.values()}


def function_body(
    op_name: str, variant: Mapping[str, str] | None = None, *, with_inputs: Collection[str] = (), opset: int = OPSET
) -> FunctionProto:
    """An operator as an ONNX function of standard operators.

    Parameters
    ----------
    op_name : str
        Name of the operator in `dsa_tvm.ops.OPS`, such as ``"sparse_mla"``.
    variant : mapping, optional
        An element type for each type variable. It is only checked, because one body serves all variants.
    with_inputs : collection of str
        The optional inputs that the calling nodes have.
    opset : int
        Version of the standard operators in the model that gets the function, at least 19.

    Returns
    -------
    onnx.FunctionProto
        In the domain ``ai.dsa``. It has all inputs of the operator, in order, and does not read absent ones.

    Raises
    ------
    dsa_tvm.errors.ArgumentError
        There is no such operator, variant or optional input, or the opset is too old.
    """
    spec = known_spec(op_name)
    served_variant(spec, variant)
    check_optional(spec, with_inputs)
    if opset < _MIN_OPSET:
        raise ArgumentError(f"{op_name}: opset: expected at least {_MIN_OPSET}, got {opset}")
    return make_function(spec, DOMAIN, with_inputs, opset)


def operator_node(
    op_name: str, inputs: Sequence[str | None], outputs: Sequence[str], *, name: str | None = None, **attrs: Any
) -> NodeProto:
    """One node of the domain ``ai.dsa``.

    Parameters
    ----------
    op_name : str
        Name of the operator in `dsa_tvm.ops.OPS`.
    inputs : sequence of str
        Names of the values, in the operator's order. None or ``""`` stands for an absent optional input. Absent inputs
        at the end may be left out.
    outputs : sequence of str
        Names of the results. Some at the end may be left out. A kernel writes them anyway, so the node names them
        after the first one, as in ``out.lse``.
    name : str, optional
        Name of the node.
    **attrs
        The attributes of the operator, all required.

    Returns
    -------
    onnx.NodeProto

    Raises
    ------
    dsa_tvm.errors.ArgumentError
        The number of inputs or outputs is wrong, a required input is absent, or an attribute is missing, unknown, of
        the wrong type or out of range.
    """
    spec = known_spec(op_name)
    names = [name or "" for name in inputs]
    required = sum(not t.optional for t in spec.inputs)
    if not required <= len(names) <= len(spec.inputs):
        expected = f"{required} to {len(spec.inputs)}" if required < len(spec.inputs) else str(required)
        raise ArgumentError(f"{op_name}: inputs: expected {expected}, got {len(names)}")
    for tensor, given in zip(spec.inputs, names, strict=False):
        if not given and not tensor.optional:
            raise ArgumentError(f"{op_name}: input {tensor.name}: expected the name of a value, got none")
    if not 1 <= len(outputs) <= len(spec.outputs) or not all(outputs):
        raise ArgumentError(f"{op_name}: outputs: expected 1 to {len(spec.outputs)} names, got {list(outputs)}")
    while not names[-1]:
        names.pop()
    results = [*outputs, *(f"{outputs[0]}.{t.name}" for t in spec.outputs[len(outputs) :])]
    return helper.make_node(spec.onnx_name, names, results, name=name, domain=DOMAIN, **checked_attrs(spec, attrs))


def attach_bodies(model: ModelProto) -> None:
    """Add the function bodies and the opset import that the operators in a model need. The model changes in place.

    Each operator's body is added once, and replaces an existing one. If ``onnx.compose.add_prefix`` or another tool
    has renamed bodies, their nodes get the original names back. ONNX Runtime would not find the kernels under other
    names and would run the bodies instead. A model without nodes of ``ai.dsa`` does not change.

    Parameters
    ----------
    model : onnx.ModelProto
        IR version 9 or later, standard operators of version 19 or later. Nodes in subgraphs and in other functions
        count too.

    Raises
    ------
    dsa_tvm.errors.ArgumentError
        The IR version or opset is too old, a node names an unknown operator, or two nodes of one operator have
        different optional inputs, which one body cannot serve. The model is then unchanged.
    """
    renamed = _renamed(model)
    nodes = list(_operator_nodes(model, renamed))
    present: dict[str, frozenset[str]] = {}
    for node in nodes:
        op_type = renamed.get(node.op_type, node.op_type)
        if op_type not in _BY_ONNX_NAME:
            raise ArgumentError(
                f"{op_type}: node {node.name!r}: expected one of {', '.join(_BY_ONNX_NAME)}, got {op_type!r}"
            )
        spec = _BY_ONNX_NAME[op_type]
        found = frozenset(t.name for t, given in zip(spec.inputs, node.input, strict=False) if given and t.optional)
        if present.setdefault(spec.name, found) != found:
            raise ArgumentError(
                f"{spec.name}: node {node.name!r}: expected the optional inputs of the model's other nodes "
                f"({', '.join(sorted(present[spec.name])) or 'none'}), got {', '.join(sorted(found)) or 'none'}"
            )
    if not present:
        return
    if model.ir_version < IR_VERSION:
        raise ArgumentError(f"model: ir_version: expected at least {IR_VERSION}, got {model.ir_version}")
    opset = next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), 0)
    functions = [function_body(op_name, with_inputs=inputs, opset=opset) for op_name, inputs in present.items()]
    for node in nodes:
        node.op_type = renamed.get(node.op_type, node.op_type)
    replaced = {*renamed, *(f.name for f in functions)}
    kept = [f for f in model.functions if f.domain != DOMAIN or f.name not in replaced]
    del model.functions[:]
    model.functions.extend([*kept, *functions])
    if all(i.domain != DOMAIN for i in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))


def detach_bodies(model: ModelProto) -> None:
    """Remove the bodies that `attach_bodies` has added, and give renamed nodes their names back, in place.

    Do this before tools that inline functions: ``onnx.inliner``, ``onnxscript.optimizer``, ONNX Runtime's preprocessing
    and saved optimized models. They would leave the bodies, which no kernel can replace any more. Attach the bodies
    again afterwards. The opset import stays.

    Parameters
    ----------
    model : onnx.ModelProto
    """
    renamed = _renamed(model)
    for node in _operator_nodes(model, renamed):
        node.op_type = renamed.get(node.op_type, node.op_type)
    kept = [f for f in model.functions if f.domain != DOMAIN or f.name not in {*_BY_ONNX_NAME, *renamed}]
    del model.functions[:]
    model.functions.extend(kept)


def _renamed(model: ModelProto) -> dict[str, str]:
    """The names of operators by the names that their bodies have in this model, if these differ."""
    found = {}
    for function in model.functions:
        if function.domain != DOMAIN or function.name in _BY_ONNX_NAME:
            continue
        for name, spec in _BY_ONNX_NAME.items():
            arguments = ([t.name for t in spec.inputs], [t.name for t in spec.outputs], {a.name for a in spec.attrs})
            own = arguments == (list(function.input), list(function.output), set(function.attribute))
            if own and function.name.endswith(name):
                found[function.name] = name
    return found


def _operator_nodes(model: ModelProto, renamed: Mapping[str, str]) -> Iterator[NodeProto]:
    """The nodes of ai.dsa outside its own functions."""
    own = {*_BY_ONNX_NAME, *renamed}
    graphs = [model.graph.node, *(f.node for f in model.functions if f.domain != DOMAIN or f.name not in own)]
    return (node for nodes in graphs for node in _walk(nodes) if node.domain == DOMAIN)


def make_model(
    name: str,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    between: Sequence[ValueInfoProto] = (),
) -> ModelProto:
    """A model of these nodes and the bodies that they need, in the versions that this package emits."""
    graph = helper.make_graph(nodes, name, inputs, outputs, value_info=between)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="dsa_tvm"
    )
    attach_bodies(model)
    return model


def value_info(
    spec: OpSpec, tensor: TensorSpec, variant: Mapping[str, str], lengths: Mapping[str, int]
) -> ValueInfoProto:
    """The type and shape of an argument. A dimension without a length keeps its name."""
    shape = [lengths.get(d, d) for d in tensor.shape]
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[spec.dtype_of(tensor, variant)], shape)


def _walk(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node)
