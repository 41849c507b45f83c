"""A layer's experts as one `Scan` over their stacked weights, so that the graph does not grow with their number.

Transformers' own translation makes eight nodes and two weights of each expert. Here a layer's experts stay the two
tensors that they are in the model. ONNX Runtime hands a slice of these to each round of a `Scan` where it lies, copying
nothing, and a round whose expert no token has chosen does nothing with it.

While a model is traced, `traced` puts a node in the place of a layer's experts, and `as_scans` replaces it in the
finished graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import nn
from transformers.integrations import moe

#: A node that is never in a finished model.
_DOMAIN, _NAME = "dsa_tvm.export", "Experts"
_REPLACED = "grouped_mm"


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Let modules of experts whose implementation is "grouped_mm" become single nodes."""
    grouped = moe.ALL_EXPERTS_FUNCTIONS[_REPLACED]

    def forward(
        experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if not _served(experts):
            return grouped(experts, hidden_states, top_k_index, top_k_weights)
        inputs = (hidden_states, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj)
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_NAME}", inputs, dtype=hidden_states.dtype, shape=hidden_states.shape, version=1
        )

    moe.ALL_EXPERTS_FUNCTIONS[_REPLACED] = forward
    try:
        yield
    finally:
        del moe.ALL_EXPERTS_FUNCTIONS[_REPLACED]


def _served(experts: Any) -> bool:
    """Whether `_body` computes what this module does: ``down(silu(gate(x)) * up(x))`` without biases."""
    silu = isinstance(experts.act_fn, nn.SiLU) or type(experts.act_fn).__name__ == "SiLUActivation"
    plain = experts.has_gate and not (experts.has_bias or experts.is_transposed)
    return silu and plain and getattr(experts, "is_concatenated", True)


def as_scans(model: onnx.ModelProto) -> None:
    """Replace the nodes that `traced` made.

    Parameters
    ----------
    model : ModelProto
        With the stacked weights [experts, 2 * moe, hidden] and [experts, hidden, moe] as initializers.
    """
    graph = model.graph
    shapes = {x.name: (x.data_type, list(x.dims)) for x in graph.initializer}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if (node.domain, node.op_type) != (_DOMAIN, _NAME):
            graph.node.append(node)
            continue
        dtype, (experts, _, hidden) = shapes[node.input[3]]
        made = _nodes(node, dtype, experts, hidden)
        for new in made:
            new.metadata_props.extend(node.metadata_props)
        graph.node.extend(made)
    for imported in [x for x in model.opset_import if x.domain == _DOMAIN]:
        model.opset_import.remove(imported)


def _nodes(node: onnx.NodeProto, dtype: int, experts: int, hidden: int) -> list[onnx.NodeProto]:
    """The nodes that compute what `node` stands for.

    Choices and weights of tokens become matrices [experts, tokens]: a row says which tokens have chosen an expert, and
    how much each takes of it. Sums over experts are in float32, as those weights are.
    """
    x, index, weights, gate_up, down = node.input
    out = node.output[0]

    def name(part: str) -> str:
        return f"{out}.{part}"

    def make(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [name(output)], name(output), **attributes)

    zero, one = (helper.make_tensor("", TensorProto.FLOAT, [1], [x]) for x in (0.0, 1.0))
    return [
        make("Shape", [x], "tokens", start=0, end=1),
        make("Constant", [], "experts", value_ints=[experts]),
        make("Constant", [], "hidden", value_ints=[hidden]),
        make("Concat", [name("tokens"), name("experts")], "by_token", axis=0),
        make("ConstantOfShape", [name("by_token")], "zeros", value=zero),
        make("Shape", [index], "choices"),
        make("ConstantOfShape", [name("choices")], "ones", value=one),
        make("ScatterElements", [name("zeros"), index, name("ones")], "choice", axis=1),
        make("Transpose", [name("choice")], "choice_by_expert", perm=[1, 0]),
        make("Cast", [weights], "weights", to=TensorProto.FLOAT),
        make("ScatterElements", [name("zeros"), index, name("weights")], "weight", axis=1),
        make("Transpose", [name("weight")], "weight_by_expert", perm=[1, 0]),
        make("Constant", [], "second", value_ints=[1]),
        make("ReduceSum", [name("choice_by_expert"), name("second")], "times_chosen", keepdims=0),
        make("Cast", [name("times_chosen")], "chosen", to=TensorProto.BOOL),
        make("Concat", [name("tokens"), name("hidden")], "shape", axis=0),
        make("ConstantOfShape", [name("shape")], "nothing", value=zero),
        helper.make_node(
            "Scan",
            [name("nothing"), name("chosen"), name("choice_by_expert"), name("weight_by_expert"), gate_up, down],
            [name("sum")],
            name("experts_in_turn"),
            body=_body(x, dtype, hidden, name),
            num_scan_inputs=5,
        ),
        helper.make_node("Cast", [name("sum")], [out], name("output"), to=dtype),
    ]


def _body(x: str, dtype: int, hidden: int, name: Any) -> onnx.GraphProto:
    """A round of the Scan: the sum so far, and what an expert's tokens add to it."""

    def make(kind: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(
            kind, [i if i == x else name(i) for i in inputs], [name(o) for o in outputs], name(outputs[0]), **attributes
        )

    def value(part: str, kind: int, shape: Sequence[int | None]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name(part), kind, shape)

    f32 = TensorProto.FLOAT
    summed = [None, hidden]
    add = [
        make("NonZero", ["choices_here"], "at"),
        make("Constant", [], "axis_0", value_ints=[0]),
        make("Constant", [], "axis_1", value_ints=[1]),
        make("Squeeze", ["at", "axis_0"], "tokens_here"),
        make("Gather", [x, "tokens_here"], "x_here"),
        # Gemm reads the weights as they are stored; a MatMul would need them transposed, which is a copy.
        make("Gemm", ["x_here", "gate_up"], "gate_and_up", transB=1),
        make("Split", ["gate_and_up"], "gate", "up", axis=1, num_outputs=2),
        make("Sigmoid", ["gate"], "sigmoid"),
        make("Mul", ["gate", "sigmoid"], "silu"),
        make("Mul", ["silu", "up"], "inner"),
        make("Gemm", ["inner", "down"], "made", transB=1),
        make("Cast", ["made"], "made_f32", to=f32),
        make("Gather", ["weights_here", "tokens_here"], "weight_here"),
        make("Unsqueeze", ["weight_here", "axis_1"], "weight_column"),
        make("Mul", ["made_f32", "weight_column"], "weighted"),
        make("Gather", ["so_far", "tokens_here"], "before"),
        make("Add", ["before", "weighted"], "after"),
        make("Unsqueeze", ["tokens_here", "axis_1"], "where"),
        make("ScatterND", ["so_far", "where", "after"], "added"),
    ]
    none = [make("Identity", ["so_far"], "as_before")]
    branches = {
        "then_branch": helper.make_graph(add, name("add"), [], [value("added", f32, summed)]),
        "else_branch": helper.make_graph(none, name("none"), [], [value("as_before", f32, summed)]),
    }
    inputs = [
        value("so_far", f32, summed),
        value("chosen_here", TensorProto.BOOL, []),
        value("choices_here", f32, [None]),
        value("weights_here", f32, [None]),
        value("gate_up", dtype, [None, hidden]),
        value("down", dtype, [hidden, None]),
    ]
    choice = make("If", ["chosen_here"], "sum_so_far", **branches)
    return helper.make_graph([choice], name("body"), inputs, [value("sum_so_far", f32, summed)])
