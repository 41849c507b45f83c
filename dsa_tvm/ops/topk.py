"""Token selector: the positions of the topk largest logits of each row, exactly.

Larger values win. Of equal values (+0 and -0 are equal) the lower index wins. NaN is never selected. Only keys in
``[ks, ke)`` take part, and ``-inf`` among them is a value like any other. The positions are in ascending order, padded
with ``-1`` at the end, so a gather walks memory forward.

torch.topk and vLLM rank NaN first. But NaN has no place in an order. It means that the score of a token is broken, and
perhaps its cached row too, so it must not displace a token whose score is known.
"""

from __future__ import annotations

import numpy as np

from ..spec import OpSpec, TensorSpec
from .lightning_indexer import TOPK_ATTR

INDICES = TensorSpec("indices", "int32", ("s_q", "topk"))


def reference(logits: np.ndarray, ks: np.ndarray, ke: np.ndarray, topk: int) -> tuple[np.ndarray, ...]:
    """Select by a stable sort of each row.

    Parameters
    ----------
    logits : ndarray [s_q, s_kv]
    ks, ke : ndarray [s_q], int32
    topk : int

    Returns
    -------
    tuple of one ndarray [s_q, topk], int32
    """
    s_q, s_kv = logits.shape
    indices = np.full((s_q, topk), -1, np.int32)
    for m in range(s_q):
        start, stop = max(int(ks[m]), 0), min(int(ke[m]), s_kv)
        candidates = np.arange(start, max(start, stop))
        candidates = candidates[~np.isnan(logits[m, candidates])]
        best = candidates[np.argsort(-logits[m, candidates], kind="stable")[:topk]]
        indices[m, : len(best)] = np.sort(best)
    return (indices,)


SPEC = OpSpec(
    name="topk",
    onnx_name="TopKIndices",
    inputs=(
        TensorSpec("logits", "float32", ("s_q", "s_kv")),
        TensorSpec("ks", "int32", ("s_q",)),
        TensorSpec("ke", "int32", ("s_q",)),
    ),
    outputs=(INDICES,),
    attrs=(TOPK_ATTR,),
    variants=({},),
    tolerance={},
    reference=reference,
)
