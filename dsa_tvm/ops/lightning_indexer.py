"""Lightning indexer: a cheap score of every key for every query.

``logits[m, n] = k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n])`` for ``ks[m] <= n < ke[m]``, else ``-inf``
(DeepSeek-V3.2 technical report, equation 1). The weights already hold ``h_idx**-0.5 * d_idx**-0.5 * q_scale``.
"""

from __future__ import annotations

import numpy as np

from ..spec import AttrSpec, OpSpec, TensorSpec, Tolerance

INPUTS = (
    TensorSpec("q", "T", ("s_q", "h_idx", "d_idx")),
    TensorSpec("k", "K", ("s_kv", "d_idx")),
    TensorSpec("weights", "float32", ("s_q", "h_idx")),
    TensorSpec("ks", "int32", ("s_q",)),
    TensorSpec("ke", "int32", ("s_q",)),
    TensorSpec("k_scale", "float32", ("s_kv",), optional=True),
)

#: Keys are stored like the queries or as fp8 with a scale each.
VARIANTS = (
    {"T": "float32", "K": "float32"},
    {"T": "bfloat16", "K": "bfloat16"},
    {"T": "float16", "K": "float16"},
    {"T": "float32", "K": "float8_e4m3fn"},
    {"T": "bfloat16", "K": "float8_e4m3fn"},
    {"T": "float16", "K": "float8_e4m3fn"},
    {"T": "float8_e4m3fn", "K": "float8_e4m3fn"},
)

# The products are exact or f32 in every variant, and the sum is f32: one bound serves all element types.
# abs covers cancellation in the head sum, where the reference is near 0 and the terms are of order 1.
TOLERANCE = dict.fromkeys(("float32", "bfloat16", "float16", "float8_e4m3fn"), Tolerance(abs=2e-5, rel=1e-5, cos=5e-6))


def in_range(ks: np.ndarray, ke: np.ndarray, s_kv: int) -> np.ndarray:
    """[s_q, s_kv] bool: which keys each query may see."""
    keys = np.arange(s_kv)
    return (ks[:, None] <= keys) & (keys < ke[:, None])


def reference(q, k, weights, ks, ke, k_scale=None):
    """float64 logits, by the formula above.

    Parameters
    ----------
    q : ndarray [s_q, h_idx, d_idx]
    k : ndarray [s_kv, d_idx]
    weights : ndarray [s_q, h_idx]
    ks, ke : ndarray [s_q], int32
    k_scale : ndarray [s_kv], optional

    Returns
    -------
    tuple of one ndarray [s_q, s_kv], float64
    """
    q, k, weights = (np.asarray(x).astype(np.float64) for x in (q, k, weights))
    scores = np.einsum("mhd,nd->mhn", q, k, optimize=True)
    # A NaN score stays NaN: np.maximum propagates it.
    logits = np.einsum("mhn,mh->mn", np.maximum(scores, 0.0), weights)
    if k_scale is not None:
        logits = logits * np.asarray(k_scale).astype(np.float64)
    return (np.where(in_range(ks, ke, k.shape[0]), logits, -np.inf),)


SPEC = OpSpec(
    name="lightning_indexer",
    onnx_name="LightningIndexer",
    inputs=INPUTS,
    outputs=(TensorSpec("logits", "float32", ("s_q", "s_kv")),),
    attrs=(),
    variants=VARIANTS,
    tolerance={"logits": TOLERANCE},
    reference=reference,
)

#: Shared by the operators that end in a selection.
TOPK_ATTR = AttrSpec("topk", int, dim="topk")
