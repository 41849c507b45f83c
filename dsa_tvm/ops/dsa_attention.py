"""All of DeepSeek Sparse Attention: `indexer_topk`, then `sparse_mla` over the selected rows."""

from __future__ import annotations

import numpy as np

from ..spec import OpSpec, TensorSpec
from . import indexer_topk, lightning_indexer, sparse_mla


def reference(
    index_q: np.ndarray,
    index_k: np.ndarray,
    weights: np.ndarray,
    ks: np.ndarray,
    ke: np.ndarray,
    q: np.ndarray,
    kv: np.ndarray,
    index_k_scale: np.ndarray | None = None,
    attn_sink: np.ndarray | None = None,
    *,
    topk: int,
    sm_scale: float,
    d_v: int,
) -> tuple[np.ndarray, ...]:
    """float64 attention, with the arguments of `indexer_topk.reference` and `sparse_mla.reference`.

    Returns
    -------
    out [s_q, h_q, d_v], lse [s_q, h_q] : ndarray, float64
    """
    (indices,) = indexer_topk.reference(index_q, index_k, weights, ks, ke, index_k_scale, topk=topk)
    out, _, lse = sparse_mla.reference(q, kv, indices, attn_sink, sm_scale=sm_scale, d_v=d_v)
    return out, lse


SPEC = OpSpec(
    name="dsa_attention",
    onnx_name="DsaAttention",
    inputs=(
        TensorSpec("index_q", "T", ("s_q", "h_idx", "d_idx")),
        TensorSpec("index_k", "K", ("s_kv", "d_idx")),
        TensorSpec("weights", "float32", ("s_q", "h_idx")),
        TensorSpec("ks", "int32", ("s_q",)),
        TensorSpec("ke", "int32", ("s_q",)),
        TensorSpec("q", "T", ("s_q", "h_q", "d_qk")),
        TensorSpec("kv", "T", ("s_kv", "d_qk")),
        TensorSpec("index_k_scale", "float32", ("s_kv",), optional=True),
        sparse_mla.ATTN_SINK,
    ),
    outputs=(sparse_mla.OUT, sparse_mla.LSE),
    attrs=(lightning_indexer.TOPK_ATTR, *sparse_mla.ATTRS),
    # The queries of the attention have the type T too, so T is never fp8 or int8.
    variants=tuple(v for v in lightning_indexer.VARIANTS if v["T"] not in ("float8_e4m3fn", "int8")),
    tolerance={name: sparse_mla.TOLERANCE[name] for name in ("out", "lse")},
    reference=reference,
)
