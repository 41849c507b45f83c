"""Token selector: the positions of the topk largest logits of each row, exactly.

Larger first, equal values (+0 and -0 are equal) by lower index, NaN never. Only keys in ``[ks, ke)`` take part, and a
``-inf`` in there is a value like any other. Emitted in ascending index order, ``-1`` behind: a gather then walks memory
forward.

torch.topk and vLLM rank NaN first. A NaN has no place in an order, and it means that the score of its token is broken,
perhaps the token's cached row too, so it must not displace a token whose score is known.
"""

from __future__ import annotations

import numpy as np

from ..spec import OpSpec, TensorSpec
from .lightning_indexer import TOPK_ATTR

INDICES = TensorSpec("indices", "int32", ("s_q", "topk"))


def reference(logits, ks, ke, topk):
    """Selection by a stable sort of each row.

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
