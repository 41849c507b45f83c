"""`lightning_indexer` and `topk` in one call; the logits are never held whole."""

from __future__ import annotations

import numpy as np

from ..spec import OpSpec
from . import lightning_indexer, topk


def reference(
    q: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    ks: np.ndarray,
    ke: np.ndarray,
    k_scale: np.ndarray | None = None,
    *,
    topk: int,
) -> tuple[np.ndarray, ...]:
    """Select from float64 logits; the arguments are those of `lightning_indexer.reference` and `topk`.

    Returns
    -------
    tuple of one ndarray [s_q, topk], int32
    """
    (logits,) = lightning_indexer.reference(q, k, weights, ks, ke, k_scale)
    return _select(logits, ks, ke, topk)


_select = topk.reference

SPEC = OpSpec(
    name="indexer_topk",
    onnx_name="IndexerTopK",
    inputs=lightning_indexer.INPUTS,
    outputs=(topk.INDICES,),
    attrs=(lightning_indexer.TOPK_ATTR,),
    variants=lightning_indexer.VARIANTS,
    tolerance={},
    reference=reference,
)
