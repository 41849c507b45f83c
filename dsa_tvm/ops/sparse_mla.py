"""Sparse multi-head latent attention over the selected keys.

Every head attends to the same latent rows ``kv[indices[m]]``. All d_qk entries of a row are the key, and its first d_v
are also the value (DeepSeek-V2, section 2.1, in the absorbed form).

The caller has to pass `sm_scale`, because it does not follow from d_qk: models scale by the width that their heads have
before absorption, ``(qk_nope_head_dim + qk_rope_head_dim)**-0.5``, times the square of YaRN's mscale (see `presets`).

``s = sm_scale * q . kv``, ``max_logits = max s``, ``lse = ln sum exp(s)``, ``out = sum exp(s - lse) v``. With
attn_sink, ``exp(attn_sink)`` is added to the denominator of `out`. Indices outside ``[0, s_kv)`` are skipped, and so
are all from position ``topk_length`` on. A query without a key gives out 0, max_logits -inf and lse +inf.
"""

from __future__ import annotations

import numpy as np

from ..spec import AttrSpec, OpSpec, TensorSpec, Tolerance

ATTN_SINK = TensorSpec("attn_sink", "float32", ("h_q",), optional=True)
ATTRS = (AttrSpec("sm_scale", float), AttrSpec("d_v", int, dim="d_v"))
OUT = TensorSpec("out", "T", ("s_q", "h_q", "d_v"))
LSE = TensorSpec("lse", "float32", ("s_q", "h_q"))

_LSE = Tolerance(abs=1e-6, rel=2.01 / 65536, cos=7e-6)
TOLERANCE = {
    "out": {
        "float32": Tolerance(abs=1e-5, rel=1e-5, cos=5e-6),
        "bfloat16": Tolerance(abs=8e-4, rel=3.01 / 128, cos=7e-6),
        "float16": Tolerance(abs=1e-4, rel=3.01 / 1024, cos=7e-6),
    },
    "max_logits": dict.fromkeys(("float32", "bfloat16", "float16"), _LSE),
    "lse": dict.fromkeys(("float32", "bfloat16", "float16"), _LSE),
}


def reference(
    q: np.ndarray,
    kv: np.ndarray,
    indices: np.ndarray,
    attn_sink: np.ndarray | None = None,
    topk_length: np.ndarray | None = None,
    *,
    sm_scale: float,
    d_v: int,
) -> tuple[np.ndarray, ...]:
    """float64 attention, one query at a time.

    Parameters
    ----------
    q : ndarray [s_q, h_q, d_qk]
    kv : ndarray [s_kv, d_qk]
    indices : ndarray [s_q, topk], int32
    attn_sink : ndarray [h_q], optional
    topk_length : ndarray [s_q], int32, optional
    sm_scale : float
    d_v : int

    Returns
    -------
    out [s_q, h_q, d_v], max_logits [s_q, h_q], lse [s_q, h_q] : ndarray, float64
    """
    q = np.asarray(q).astype(np.float64)
    s_q, h_q, _ = q.shape
    out = np.zeros((s_q, h_q, d_v))
    max_logits = np.full((s_q, h_q), -np.inf)
    lse = np.full((s_q, h_q), np.inf)
    for m in range(s_q):
        row = indices[m] if topk_length is None else indices[m, : max(int(topk_length[m]), 0)]
        row = row[(row >= 0) & (row < kv.shape[0])]
        if not len(row):
            continue
        keys = np.asarray(kv[row]).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            scores = sm_scale * (q[m] @ keys.T)
            max_logits[m] = scores.max(-1)
            # If all scores are -inf, the sum is 0 and lse is -inf. Without this, -inf - -inf would be NaN.
            shift = np.where(np.isneginf(max_logits[m]), 0.0, max_logits[m])
            weights = np.exp(scores - shift[:, None])
            total = weights.sum(-1)
            lse[m] = max_logits[m] + np.log(total)
            if attn_sink is not None:
                total = total + np.exp(np.asarray(attn_sink).astype(np.float64) - shift)
            out[m] = weights @ keys[:, :d_v] / total[:, None]
    return out, max_logits, lse


SPEC = OpSpec(
    name="sparse_mla",
    onnx_name="SparseMLA",
    inputs=(
        TensorSpec("q", "T", ("s_q", "h_q", "d_qk")),
        TensorSpec("kv", "T", ("s_kv", "d_qk")),
        TensorSpec("indices", "int32", ("s_q", "topk")),
        ATTN_SINK,
        TensorSpec("topk_length", "int32", ("s_q",), optional=True),
    ),
    outputs=(OUT, TensorSpec("max_logits", "float32", ("s_q", "h_q")), LSE),
    attrs=ATTRS,
    variants=({"T": "float32"}, {"T": "bfloat16"}, {"T": "float16"}),
    tolerance=TOLERANCE,
    reference=reference,
)
