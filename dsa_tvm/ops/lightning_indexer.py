"""Lightning indexer: a cheap score of every key for every query.

``logits[m, n] = k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n])`` for ``ks[m] <= n < ke[m]``, else ``-inf``
(DeepSeek-V3.2 technical report, equation 1). The weights already contain ``h_idx**-0.5 * d_idx**-0.5 * q_scale``.
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

#: Keys have the type of the queries, or are fp8. Each key of 8 bits may have a scale.
VARIANTS = (
    {"T": "float32", "K": "float32"},
    {"T": "bfloat16", "K": "bfloat16"},
    {"T": "float16", "K": "float16"},
    {"T": "float32", "K": "float8_e4m3fn"},
    {"T": "bfloat16", "K": "float8_e4m3fn"},
    {"T": "float16", "K": "float8_e4m3fn"},
    {"T": "float8_e4m3fn", "K": "float8_e4m3fn"},
    {"T": "int8", "K": "int8"},
)

# In every variant the products are exact or f32, and so are the sums: one bound serves all element types. abs covers
# cancellation in the sum over the heads, where the reference is near 0 and the terms are of order 1.
_OF_F32_SUMS = Tolerance(abs=2e-5, rel=1e-5, cos=5e-6)

# The fp8 tensor cores of Ada and Hopper are less precise. They keep 13 binary places behind the leading one of the
# largest addend and cut off the rest of each of the 33 addends of an instruction (DeepSeek-V3 technical report, section
# 3.5.2; SageAttention2 for Ada). Others keep 24 or 25 (MMA-Sim, arXiv:2511.10909). In a model of these tensor cores,
# sums of 128 products of one sign lose 1e-3 to 1.6e-3 of their value: rel covers that. With both signs the losses
# partly cancel, but so does the sum. For normally distributed numbers, logits whose largest terms are 2 differ by 1e-3,
# and logits whose only term reaches 15 differ by 3.7e-3: abs covers these. The cosine difference stays below 1e-7, or
# below 4e-6 if one product is 5 times the sum.
_OF_E4M3_SUMS = Tolerance(abs=2e-3, rel=2e-3, cos=5e-6)

TOLERANCE = {
    **dict.fromkeys(("float32", "bfloat16", "float16", "int8"), _OF_F32_SUMS),
    "float8_e4m3fn": _OF_E4M3_SUMS,
}


def in_range(ks: np.ndarray, ke: np.ndarray, s_kv: int) -> np.ndarray:
    """Which keys each query may see: bool [s_q, s_kv]."""
    keys = np.arange(s_kv)
    return (ks[:, None] <= keys) & (keys < ke[:, None])


def reference(
    q: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    ks: np.ndarray,
    ke: np.ndarray,
    k_scale: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """Compute float64 logits by the formula above.

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
    # np.maximum keeps a NaN score.
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

#: For the operators that end in a selection.
TOPK_ATTR = AttrSpec("topk", int, dim="topk")
