"""The operators as standard ONNX nodes that compute the same as the references.

ONNX Runtime runs these if the compiled library is absent. They agree with the references on every input. That takes a
few more passes than a graph that is written for speed alone; `plain` has such graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
from onnx import FunctionProto, TensorProto, ValueInfoProto, helper

from ...spec import OpSpec
from .body import Body
from .packed_rows import unpack

_INT32_MAX = np.iinfo(np.int32).max
_NEG_INF = np.float32(-np.inf)
#: Stands for a -inf logit: below every finite float32, above the -inf that marks what may not be selected.
_LOWEST = np.float64(-1e300)


def scores(b: Body, q: str, k: str, weights: str, k_scale: str | None) -> str:
    """Logits [s_q, s_kv] float32 of all pairs of query and key, in range or not."""
    q, k = b.cast(q, TensorProto.FLOAT), b.cast(k, TensorProto.FLOAT)
    rows = b("Reshape", q, b("Concat", b.const([-1]), b.length(q, 2), axis=0))
    heads = b("Relu", b("Gemm", rows, k, transB=1))
    shape = b("Concat", b("Shape", q, start=0, end=2), b.length(k, 0), axis=0)
    # Without allowzero, a length of 0 would mean "the length of the input".
    heads = b("Reshape", heads, shape, allowzero=1)
    logits = b("Squeeze", b("MatMul", b.unsqueeze(weights, 1), heads), b.const([1]))
    return logits if k_scale is None else b("Mul", logits, k_scale)


def visible(b: Body, logits: str) -> str:
    """[s_q, s_kv] bool: the keys that each query may see according to ks and ke."""
    keys = b.positions(logits)
    return b("And", b("LessOrEqual", b.unsqueeze("ks", 1), keys), b("Less", keys, b.unsqueeze("ke", 1)))


def select(b: Body, logits: str, topk: str) -> str:
    """Indices [s_q, topk] int32 of the largest visible logits, ascending, then -1. `topk` is int64 of shape [1]."""
    s_q = b.length(logits, 0)
    candidates = b("And", visible(b, logits), b("Not", b("IsNaN", logits)))
    # float64 has values below the lowest float32. They tell a -inf logit from an entry that may not be selected.
    rank = b("Clip", b.cast(logits, TensorProto.DOUBLE), b.const(_LOWEST))
    never = b.const(np.float64(-np.inf))
    rank = b("Where", candidates, rank, never)
    # In ONNX Runtime 1.28 and before, TopK on zero rows divides by zero and kills the process. Give it one row.
    zero = b.const([0])
    rank = b("Pad", rank, b("Concat", zero, zero, _missing_row(b, s_q), zero, axis=0), never)
    count = b("Min", topk, b.length(logits, 1))
    # In every version, TopK prefers the lower index among equal values.
    values, found = b("TopK", rank, count, axis=1, largest=1, sorted=0, outputs=2)
    behind = b.const(np.int32(_INT32_MAX))
    found = b("Where", b("Greater", values, never), b.cast(found, TensorProto.INT32), behind)
    found, _ = b("TopK", found, count, axis=1, largest=0, sorted=1, outputs=2)
    none = b.const(np.int32(-1))
    found = b("Where", b("Less", found, behind), found, none)
    found = b("Slice", found, zero, s_q, zero)
    return b("Pad", found, b("Concat", zero, zero, zero, b("Sub", topk, count), axis=0), none)


def attend(
    b: Body, q: str, kv: str, indices: str, attn_sink: str | None, topk_length: str | None, packed: bool = False
) -> tuple[str, str, str]:
    """Sparse attention as `sparse_mla` defines it: out like q, max_logits, lse. Rows of kv may be packed."""
    nan, infinity = b.const(np.float32(np.nan)), b.const(np.float32(np.inf))
    zero, last, s_q = b.const([0]), b.const([-1]), b.length(q, 0)
    # ONNX Runtime 1.22 and before reduces zero rows to a wrong shape. Compute one row instead, and cut it off.
    row = _missing_row(b, s_q)
    rows = b("Concat", zero, zero, row, zero, axis=0)
    queries = b("Mul", b.cast(q, TensorProto.FLOAT), b.attribute("sm_scale", float))
    queries = b("Pad", queries, b("Concat", zero, zero, zero, row, zero, zero, axis=0))
    indices = b("Pad", indices, rows)

    s_kv = b.length(kv, 0)
    valid = b("GreaterOrEqual", indices, b.const(np.int32(0)))
    valid = b("And", valid, b("Less", indices, b.cast(s_kv, TensorProto.INT32)))
    if topk_length is not None:
        topk_length = b("Pad", topk_length, b("Concat", zero, row, axis=0))
        valid = b("And", valid, b("Less", b.positions(indices), b.unsqueeze(topk_length, 1)))
    # A skipped position reads a key that its row selects anyway. So no other key can affect the row.
    stand_in = b("ReduceMax", b("Where", valid, indices, b.const(np.int32(-1))), last)
    any_valid = b.unsqueeze(b("GreaterOrEqual", stand_in, b.const(np.int32(0))), 2)
    indices = b("Where", valid, indices, b("Max", stand_in, b.const(np.int32(0))))

    keys = _gather(b, kv, indices, s_kv)
    d_v = b.vector(b.attribute("d_v", int))
    # Outside the subgraph, ONNX Runtime drops the cast for float32. Inside, it would copy.
    keys = unpack(b, keys, d_v) if packed else b.cast(keys, TensorProto.FLOAT)
    logits = b("MatMul", queries, b("Transpose", keys, perm=[0, 2, 1]))
    logits = b("Where", b.unsqueeze(valid, 1), logits, b.const(_NEG_INF))
    # ONNX Runtime's ReduceMax ignores a NaN that is not the first element.
    is_nan = b("ReduceMax", b.cast(b("IsNaN", logits), TensorProto.UINT8), last)
    largest = b("Where", b.cast(is_nan, TensorProto.BOOL), nan, b("ReduceMax", logits, last))
    # If all scores are -inf, the sum is 0 and lse is -inf, not the NaN of -inf - -inf.
    shift = b("Where", b("Equal", largest, b.const(_NEG_INF)), b.const(np.float32(0)), largest)
    weights = b("Exp", b("Sub", logits, shift))
    total = b("ReduceSum", weights, last)
    lse = b("Where", any_valid, b("Add", largest, b("Log", total)), infinity)
    if attn_sink is not None:
        total = b("Add", total, b("Exp", b("Sub", b.unsqueeze(attn_sink, 0, 2), shift)))
    # The values are the first part of the keys. Slicing the product is cheaper than slicing (copying) the keys.
    ends = b("Concat", s_q, d_v, axis=0)
    out = b("Slice", b("MatMul", weights, keys), b.const([0, 0]), ends, b.const([0, 2]))
    total, any_valid, largest, lse = (b("Slice", x, zero, s_q, zero) for x in (total, any_valid, largest, lse))
    out = b("Where", any_valid, b("Div", out, total), b.const(np.float32(0)))
    return b("CastLike", out, q), b("Squeeze", largest, last), b("Squeeze", lse, last)


def _missing_row(b: Body, s_q: str) -> str:
    """int64 [1]: 1 if there are no rows, else 0."""
    return b.cast(b("Equal", s_q, b.const([0])), TensorProto.INT64)


def _gather(b: Body, kv: str, indices: str, s_kv: str) -> str:
    """Rows [s_q, topk, their width] of kv, of which only selected ones are read; zeros if kv is empty."""
    # Gather refuses an empty kv, hence the If. A subgraph must not reuse names of the outer graph.
    some, none = Body("some_"), Body("none_")
    gathered = some("Gather", kv, indices, axis=0)
    zeros = none("ConstantOfShape", none("Concat", none("Shape", indices), none.length(kv, 1), axis=0))
    zeros = none("CastLike", zeros, kv)
    then_branch, else_branch = (
        # Without an element type, which is inferred: it is up to the caller.
        helper.make_graph(part.nodes, name, [], [ValueInfoProto(name=result)])
        for part, name, result in ((some, "some_keys", gathered), (none, "no_keys", zeros))
    )
    condition = b("Squeeze", b("Greater", s_kv, b.const([0])))
    return b("If", condition, then_branch=then_branch, else_branch=else_branch)


def _lightning_indexer(b: Body, has: Callable[[str], str | None]) -> tuple[str, ...]:
    logits = scores(b, "q", "k", "weights", has("k_scale"))
    return (b("Where", visible(b, logits), logits, b.const(_NEG_INF)),)


def _topk(b: Body, has: Callable[[str], str | None]) -> tuple[str, ...]:
    return (select(b, "logits", b.vector(b.attribute("topk", int))),)


def _indexer_topk(b: Body, has: Callable[[str], str | None]) -> tuple[str, ...]:
    return (_indices(b, "q", "k", has("k_scale")),)


def _indices(b: Body, q: str, k: str, k_scale: str | None) -> str:
    return select(b, scores(b, q, k, "weights", k_scale), b.vector(b.attribute("topk", int)))


def _sparse_mla(b: Body, has: Callable[[str], str | None]) -> tuple[str, ...]:
    return attend(b, "q", "kv", "indices", has("attn_sink"), has("topk_length"))


def _sparse_mla_fp8(b: Body, has: Callable[[str], str | None]) -> tuple[str, ...]:
    return attend(b, "q", "kv", "indices", has("attn_sink"), has("topk_length"), packed=True)


def _dsa_attention(b: Body, has: Callable[[str], str | None]) -> tuple[str, ...]:
    indices = _indices(b, "index_q", "index_k", has("index_k_scale"))
    out, _, lse = attend(b, "q", "kv", indices, has("attn_sink"), None)
    return out, lse


def _write_rows(b: Body, has: Callable[[str], str | None]) -> tuple[str, ...]:
    """Gathers every row of the result, from the cache or from the new rows.

    ScatterND would leave open which of several rows with one position stays. The largest row number of each position
    is well defined. The rows are moved as float32, which holds all types exactly, because the operators that move them
    do not take float8.
    """
    cache, rows = (b.cast(name, TensorProto.FLOAT) for name in ("cache", "rows"))
    batch, capacity, s_new = b.length(cache, 0), b.length(cache, 1), b.length(rows, 1)
    width, one, none = b.length(cache, 2), b.const([1]), b.const(np.int64(-1))
    at = b.cast("positions", TensorProto.INT64)
    inside = b("And", b("GreaterOrEqual", at, b.const(np.int64(0))), b("Less", at, capacity))
    # Rows with a position outside go to an extra column, which is cut off.
    at = b("Where", inside, at, capacity)
    count = b("Range", b.const(0), b("Squeeze", s_new), b.const(1))
    count = b("Expand", count, b("Concat", batch, s_new, axis=0))
    last = b("Expand", none, b("Concat", batch, b("Add", capacity, one), axis=0))
    last = b("ScatterElements", last, at, count, axis=1, reduction="max")
    last = b("Slice", last, b.const([0]), capacity, one)

    # Among all rows, those of the cache come first, then those of `rows`.
    sequence = b.unsqueeze(b("Range", b.const(0), b("Squeeze", batch), b.const(1)), 1)
    old = b("Add", b("Mul", sequence, capacity), b("Range", b.const(0), b("Squeeze", capacity), b.const(1)))
    new = b("Add", b("Add", b("Mul", batch, capacity), b("Mul", sequence, s_new)), last)
    chosen = b("Where", b("Less", last, b.const(np.int64(0))), old, new)
    # Gather refuses an empty input even if it takes nothing from it. So there is an unused row at the end.
    spare = b("ConstantOfShape", b("Concat", one, width, axis=0))
    flat = [
        b("Reshape", x, b("Concat", b("Mul", batch, length), width, axis=0), allowzero=1)
        for x, length in ((cache, capacity), (rows, s_new))
    ]
    return (b("CastLike", b("Gather", b("Concat", *flat, spare, axis=0), chosen, axis=0), "cache"),)


_BODIES: Mapping[str, Callable[[Body, Callable[[str], str | None]], tuple[str, ...]]] = {
    "lightning_indexer": _lightning_indexer,
    "topk": _topk,
    "indexer_topk": _indexer_topk,
    "sparse_mla": _sparse_mla,
    "sparse_mla_fp8": _sparse_mla_fp8,
    "dsa_attention": _dsa_attention,
    "write_rows": _write_rows,
}


def make_function(spec: OpSpec, domain: str, present: Collection[str], opset: int) -> FunctionProto:
    """The function of one operator, for nodes that have the optional inputs named in `present`.

    It has all inputs of the operator, in order. A node may omit absent ones at the end, and pass an empty name for
    others. One body serves all element types.
    """
    b = Body()
    results = _BODIES[spec.name](b, lambda name: name if name in present else None)
    for result, output in zip(results, spec.outputs, strict=True):
        b.rename(result, output.name)
    return helper.make_function(
        domain,
        spec.onnx_name,
        [t.name for t in spec.inputs],
        [t.name for t in spec.outputs],
        b.nodes,
        [helper.make_opsetid("", opset)],
        [a.name for a in spec.attrs],
    )
