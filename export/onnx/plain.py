"""The same attention in fast standard ONNX, as an engineer would write it by hand today.

These models are the baselines of the benchmark, in float32 only. They differ from the operators where that is faster.
There are at most as many indices as keys, in no order. A row without a valid key gives NaN, and the rules for NaN do
not hold. Empty inputs are not served. Sparse attention computes only `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ...errors import ArgumentError
from .bodies import scores, visible
from .body import Body
from .checks import checked_attrs, fixed_lengths, known_spec
from .nodes import make_model, value_info

_NEG_INF = np.float32(-np.inf)


def build_plain_model(op_name: str, *, dims: Mapping[str, int] | None = None, **attrs: Any) -> ModelProto:
    """A float32 model of one operator in its fastest standard form.

    Parameters
    ----------
    op_name : str
        ``"lightning_indexer"``, ``"topk"``, ``"sparse_mla"`` or ``"dsa_attention"``.
    dims : mapping, optional
        Lengths to fix, by dimension name. With ``s_q`` 1 the indexer takes a form that is faster for one query.
    **attrs
        The attributes of the operator, all required.

    Returns
    -------
    onnx.ModelProto
        It has the required inputs and the first output of the operator. ``indices`` are int32
        ``[s_q, min(topk, s_kv)]``, in no order. If too few keys are in range, the rest are indices out of range. In
        ``sparse_mla`` a negative index is skipped, and one at or above s_kv is an error at run time.

    Raises
    ------
    dsa_tvm.errors.ArgumentError
        There is no such operator or dimension, or an attribute or a length is missing or out of range.
    """
    spec = known_spec(op_name)
    if op_name not in _PLAIN:
        raise ArgumentError(f"{op_name}: operator: expected one of {', '.join(_PLAIN)}, got {op_name!r}")
    attrs = checked_attrs(spec, attrs)
    lengths = fixed_lengths(spec, dims, attrs)
    b, output = Body(), spec.outputs[0]
    b.rename(_PLAIN[op_name](b, one_query=lengths.get("s_q") == 1, **attrs), output.name)
    inputs = [value_info(spec, t, spec.variants[0], lengths) for t in spec.inputs if not t.optional]
    result = value_info(spec, output, spec.variants[0], lengths)
    if output.name == "indices":
        result = helper.make_tensor_value_info("indices", TensorProto.INT32, [lengths.get("s_q", "s_q"), "selected"])
    return make_model(f"plain_{op_name}", b.nodes, inputs, [result])


def build_plain_attention_model(
    *, topk: int, sm_scale: float, d_v: int, dims: Mapping[str, int] | None = None
) -> ModelProto:
    """The whole attention in its fastest standard form, with the inputs of `dsa_attention` and the output `out`.

    Parameters
    ----------
    topk : int
        Keys that each query selects.
    sm_scale : float
        The scale of the model. It does not follow from d_qk.
    d_v : int
        Width of the values.
    dims : mapping, optional
        Lengths to fix, by dimension name.

    Returns
    -------
    onnx.ModelProto
        In float32, without optional inputs.

    Raises
    ------
    dsa_tvm.errors.ArgumentError
        There is no such dimension, or an attribute or a length is out of range.
    """
    return build_plain_model("dsa_attention", dims=dims, topk=topk, sm_scale=sm_scale, d_v=d_v)


def _logits(b: Body, q: str, k: str, one_query: bool) -> str:
    if one_query:
        # With the keys as the long side of the product, this is about a tenth faster than the general form.
        rows = b("Reshape", q, b("Concat", b.const([-1]), b.length(q, 2), axis=0))
        heads = b("Relu", b("MatMul", k, b("Transpose", rows, perm=[1, 0])))
        logits = b("MatMul", heads, b("Transpose", "weights", perm=[1, 0]))
        logits = b("Reshape", logits, b.const([1, -1]))
    else:
        logits = scores(b, q, k, "weights", None)
    return b("Where", visible(b, logits), logits, b.const(_NEG_INF))


def _largest(b: Body, logits: str, topk: int) -> tuple[str, str]:
    count = b("Min", b.const([topk]), b.length(logits, 1))
    return b("TopK", logits, count, axis=1, largest=1, sorted=0, outputs=2)


def _attend(b: Body, indices: str, skipped: str, sm_scale: float, d_v: int) -> str:
    bias = b.unsqueeze(b("Where", skipped, b.const(_NEG_INF), b.const(np.float32(0))), 1)
    keys = b("Gather", "kv", indices, axis=0)
    logits = b("MatMul", b("Mul", "q", b.const(np.float32(sm_scale))), b("Transpose", keys, perm=[0, 2, 1]))
    weights = b("Softmax", b("Add", logits, bias), axis=-1)
    # Multiplying by whole keys and slicing the product is faster than slicing the keys, which is a copy.
    return b("Slice", b("MatMul", weights, keys), b.const([0]), b.const([d_v]), b.const([2]))


def _lightning_indexer(b: Body, one_query: bool) -> str:
    return _logits(b, "q", "k", one_query)


def _topk(b: Body, one_query: bool, topk: int) -> str:
    seen = b("Where", visible(b, "logits"), "logits", b.const(_NEG_INF))
    return b.cast(_largest(b, seen, topk)[1], TensorProto.INT32)


def _sparse_mla(b: Body, one_query: bool, sm_scale: float, d_v: int) -> str:
    return _attend(b, "indices", b("Less", "indices", b.const(np.int32(0))), sm_scale, d_v)


def _dsa_attention(b: Body, one_query: bool, topk: int, sm_scale: float, d_v: int) -> str:
    values, indices = _largest(b, _logits(b, "index_q", "index_k", one_query), topk)
    return _attend(b, indices, b("Equal", values, b.const(_NEG_INF)), sm_scale, d_v)


_PLAIN: Mapping[str, Callable[..., str]] = {
    "lightning_indexer": _lightning_indexer,
    "topk": _topk,
    "sparse_mla": _sparse_mla,
    "dsa_attention": _dsa_attention,
}
