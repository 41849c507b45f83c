"""Sparse attention over a packed fp8 cache: `sparse_mla` in bfloat16 over rows that are stored as bytes.

`packed_rows` describes a row of kv. What is computed with are bf16: e4m3 times scale, rounded to f32 and then to bf16,
to nearest even. All backends multiply the same bits, so the tolerances are those of bf16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..spec import TensorSpec
from . import packed_rows, sparse_mla

#: Element types that the kernels are made for: K stands for the packed rows.
KERNEL = {"T": packed_rows.KEY_ONLY, "K": packed_rows.SCALED}


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
    """Compute float64 attention over the unpacked rows.

    Parameters
    ----------
    q : ndarray [s_q, h_q, d_qk], bfloat16
    kv : ndarray [s_kv, d_packed], uint8
    indices : ndarray [s_q, topk], int32
    attn_sink : ndarray [h_q], optional
    topk_length : ndarray [s_q], int32, optional
    sm_scale : float
    d_v : int

    Returns
    -------
    out [s_q, h_q, d_v], max_logits [s_q, h_q], lse [s_q, h_q] : ndarray, float64
    """
    rows = packed_rows.unpack(np.asarray(kv), d_v)
    return sparse_mla.reference(q, rows, indices, attn_sink, topk_length, sm_scale=sm_scale, d_v=d_v)


def _input(tensor: TensorSpec) -> TensorSpec:
    return TensorSpec("kv", "uint8", ("s_kv", "d_packed"), packs="d_qk") if tensor.name == "kv" else tensor


SPEC = replace(
    sparse_mla.SPEC,
    name="sparse_mla_fp8",
    onnx_name="SparseMLAFp8",
    inputs=tuple(map(_input, sparse_mla.SPEC.inputs)),
    variants=({"T": "bfloat16"},),
    tolerance={name: {"bfloat16": of["bfloat16"]} for name, of in sparse_mla.TOLERANCE.items()},
    reference=reference,
)
