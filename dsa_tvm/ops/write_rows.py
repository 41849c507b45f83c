"""Write new rows into a cache of fixed capacity: latent rows, rope keys, indexer keys, packed rows or scales.

``out[b, positions[b, i]] = rows[b, i]``, and elsewhere `out` is `cache`. A position outside ``[0, capacity)`` is
skipped. Of equal positions in a sequence the last one wins. Bytes are copied, so a NaN keeps its bits. `out` may be
`cache` itself. Then only the rows are written, however large the cache is.

A cache does not know how many of its rows are in use. The operators that read it learn that from `ke` or the indices.
"""

from __future__ import annotations

import numpy as np

from ..spec import OpSpec, TensorSpec, Tolerance


def reference(cache: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the cache with the rows in it.

    Parameters
    ----------
    cache : ndarray [batch, capacity, d_row]
    rows : ndarray [batch, s_new, d_row], type of `cache`
    positions : ndarray [batch, s_new], int32

    Returns
    -------
    tuple of one ndarray [batch, capacity, d_row], type of `cache`
    """
    out = np.array(cache)
    for b, i in np.ndindex(*positions.shape):
        if 0 <= positions[b, i] < out.shape[1]:
            out[b, positions[b, i]] = rows[b, i]
    return (out,)


_TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint8")

SPEC = OpSpec(
    name="write_rows",
    onnx_name="WriteRows",
    inputs=(
        TensorSpec("cache", "T", ("batch", "capacity", "d_row")),
        TensorSpec("rows", "T", ("batch", "s_new", "d_row")),
        TensorSpec("positions", "int32", ("batch", "s_new")),
    ),
    outputs=(TensorSpec("out", "T", ("batch", "capacity", "d_row"), may_be="cache"),),
    attrs=(),
    variants=tuple({"T": dtype} for dtype in _TYPES),
    tolerance={"out": dict.fromkeys(_TYPES, Tolerance(abs=0.0, rel=0.0, cos=0.0))},
    reference=reference,
)
