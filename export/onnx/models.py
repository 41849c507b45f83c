"""Models of one operator or of the whole attention, ready to run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from onnx import ModelProto

from ...ops import OPS
from .checks import check_optional, checked_attrs, fixed_lengths, known_spec, served_variant
from .nodes import make_model, operator_node, value_info


def build_model(
    op_name: str,
    variant: Mapping[str, str] | None = None,
    *,
    optional: Collection[str] = (),
    dims: Mapping[str, int] | None = None,
    **attrs: Any,
) -> ModelProto:
    """A model of one operator: one node and its body.

    Parameters
    ----------
    op_name : str
        Name of the operator in `dsa_tvm.ops.OPS`.
    variant : mapping, optional
        An element type for each type variable: one of the operator's `variants`, by default the first.
    optional : collection of str
        The optional inputs of the model.
    dims : mapping, optional
        Lengths to fix, by dimension name. All others are symbolic.
    **attrs
        The attributes of the operator, all required.

    Returns
    -------
    onnx.ModelProto
        Inputs, outputs, their order, shapes and types are those of the operator's `OpSpec`.

    Raises
    ------
    dsa_tvm.errors.ArgumentError
        There is no such operator, variant, optional input or dimension, or an attribute or a length is missing or out
        of range.
    """
    spec = known_spec(op_name)
    variant = served_variant(spec, variant)
    check_optional(spec, optional)
    used = [t for t in spec.inputs if not t.optional or t.name in optional]
    names = [t.name if t in used else "" for t in spec.inputs]
    node = operator_node(op_name, names, [t.name for t in spec.outputs], name=op_name, **attrs)
    lengths = fixed_lengths(spec, dims, checked_attrs(spec, attrs))
    inputs, outputs = ([value_info(spec, t, variant, lengths) for t in ts] for ts in (used, spec.outputs))
    return make_model(op_name, [node], inputs, outputs)


def build_attention_model(
    variant: Mapping[str, str] | None = None,
    *,
    topk: int,
    sm_scale: float,
    d_v: int,
    optional: Collection[str] = (),
    dims: Mapping[str, int] | None = None,
    fused: bool = True,
) -> ModelProto:
    """A model of the whole attention, with the inputs and outputs of `dsa_attention`.

    Parameters
    ----------
    variant : mapping, optional
        One of the variants of `dsa_attention`, by default the first.
    topk : int
        Keys that each query selects.
    sm_scale : float
        The scale of the model, such as ``dsa_tvm.presets.get("glm-5").sm_scale``. It does not follow from d_qk, see
        `dsa_tvm.sparse_mla`.
    d_v : int
        Width of the values.
    optional : collection of str
        The optional inputs of the model: ``index_k_scale``, ``attn_sink``.
    dims : mapping, optional
        Lengths to fix, by dimension name.
    fused : bool
        Whether to use one node, DsaAttention, instead of two, IndexerTopK and SparseMLA.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    dsa_tvm.errors.ArgumentError
        There is no such variant, optional input or dimension, or a length is out of range.
    """
    attrs = {"topk": topk, "sm_scale": sm_scale, "d_v": d_v}
    model = build_model("dsa_attention", variant, optional=optional, dims=dims, **attrs)
    if fused:
        return model
    key_scale = "index_k_scale" if "index_k_scale" in optional else None
    sink = "attn_sink" if "attn_sink" in optional else None
    nodes = [
        operator_node(
            "indexer_topk",
            ["index_q", "index_k", "weights", "ks", "ke", key_scale],
            ["indices"],
            name="indexer_topk",
            topk=topk,
        ),
        operator_node(
            "sparse_mla",
            ["q", "kv", "indices", sink],
            ["out", "max_logits", "lse"],
            name="sparse_mla",
            sm_scale=sm_scale,
            d_v=d_v,
        ),
    ]
    lengths = {"topk": topk, **(dims or {})}
    between = [value_info(OPS["indexer_topk"], OPS["indexer_topk"].outputs[0], {}, lengths)]
    return make_model("dsa_attention", nodes, model.graph.input, model.graph.output, between)
