"""The operators as Python functions over NumPy arrays, torch tensors and anything else with DLPack.

Inputs are never copied, at any alignment. All are on the CPU or all on one GPU. Outputs come as the first input does:
torch tensors for torch, NumPy arrays for everything else on the CPU; or are written to `out`. Element types of NumPy
that NumPy itself lacks (bfloat16, float8_e4m3fn) are those of the package ml_dtypes. On a GPU the work is enqueued on
torch's current stream, or on the default one where there is no torch tensor, and its workspace is torch's. Tensors of
other libraries have to live until it is done, and what uses their contents then has to come behind it on that stream.
"""

from __future__ import annotations

from typing import Any

from .calls import call
from .ops import OPS


def lightning_indexer(q, k, weights, ks, ke, k_scale=None, *, out=None, num_threads=0):
    """Score every key for every query: ``k_scale * sum_h weights * relu(q . k)``, ``-inf`` outside ``[ks, ke)``.

    DeepSeek-V3.2 technical report, equation 1.

    Parameters
    ----------
    q : tensor [s_q, h_idx, d_idx], float32, bfloat16, float16, float8_e4m3fn or int8
        Indexer queries; h_idx in 1..64, d_idx 32, 64 or 128.
    k : tensor [s_kv, d_idx], type of `q`, or float8_e4m3fn where that is no int8
        Indexer keys.
    weights : tensor [s_q, h_idx], float32
        Head weights; they already hold ``h_idx**-0.5 * d_idx**-0.5 * q_scale``.
    ks, ke : tensor [s_q], int32
        First key, and one past the last key, each query may see.
    k_scale : tensor [s_kv], float32, optional
        Scale of each fp8 or int8 key; multiplies after the head sum.
    out : tensor [s_q, s_kv], float32, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    logits : tensor [s_q, s_kv], float32

    Notes
    -----
    Products are summed in float32. A CPU with AVX512-BF16 (`active_target` is then ``x86-64-v4-bf16``) multiplies
    bfloat16, fp8 and int8 by its bf16 dot products: exact products, and sums as precise as those of float32, but
    subnormal bfloat16 numbers, those below 2**-126, count as 0. Infinities and NaN are as in float32,
    but where a sum overflows on the way, its parts may overflow in another order.

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.calls.call`.
    """
    inputs = {"q": q, "k": k, "weights": weights, "ks": ks, "ke": ke, "k_scale": k_scale}
    return call(OPS["lightning_indexer"], inputs, {}, out, num_threads)[0]


def topk(logits, ks, ke, topk, *, out=None, num_threads=0):
    """Positions of the `topk` largest logits of each row, exactly and deterministically.

    Larger first, equal values by lower index, ``-inf`` like any other value. NaN is never selected, where torch.topk
    ranks it first: a token whose score is broken must not displace one whose score is known.

    Parameters
    ----------
    logits : tensor [s_q, s_kv], float32
    ks, ke : tensor [s_q], int32
        Only keys in ``[ks, ke)`` take part.
    topk : int
        1..4096.
    out : tensor [s_q, topk], int32, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    indices : tensor [s_q, topk], int32
        In ascending order, -1 behind where there are fewer.

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.calls.call`.
    """
    inputs = {"logits": logits, "ks": ks, "ke": ke}
    return call(OPS["topk"], inputs, {"topk": topk}, out, num_threads)[0]


def indexer_topk(q, k, weights, ks, ke, k_scale=None, *, topk, out=None, num_threads=0):
    """`lightning_indexer` and `topk` in one call.

    The logits are held for at most ``min(s_q, 32 * threads)`` queries at a time: ``4 * that * s_kv`` bytes.
    Arguments, result and errors as there.
    """
    inputs = {"q": q, "k": k, "weights": weights, "ks": ks, "ke": ke, "k_scale": k_scale}
    return call(OPS["indexer_topk"], inputs, {"topk": topk}, out, num_threads)[0]


def sparse_mla(q, kv, indices, attn_sink=None, topk_length=None, *, sm_scale=None, d_v=512, out=None, num_threads=0):
    """Attention of every head to the selected rows of the latent cache.

    DeepSeek-V2, section 2.1, in the absorbed form: a row's first d_qk entries are the key, its first d_v the value.

    Parameters
    ----------
    q : tensor [s_q, h_q, d_qk], float32, bfloat16 or float16
        h_q in 1..128, d_qk 512 or 576.
    kv : tensor [s_kv, d_qk], type of `q`
    indices : tensor [s_q, topk], int32
        Rows of `kv`; those outside ``[0, s_kv)`` are skipped.
    attn_sink : tensor [h_q], float32, optional
        Its exponential joins the denominator of `out`; the other outputs do not change.
    topk_length : tensor [s_q], int32, optional
        Only that many leading indices of each query are used.
    sm_scale : float, optional
        Multiplies the scores; by default ``d_qk**-0.5``.
    d_v : int
        512.
    out : tuple of three tensors, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], type of `q`
    max_logits : tensor [s_q, h_q], float32
    lse : tensor [s_q, h_q], float32
        Natural logarithm. A query without a key has out 0, max_logits -inf and lse +inf.

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.calls.call`.
    """
    inputs = {"q": q, "kv": kv, "indices": indices, "attn_sink": attn_sink, "topk_length": topk_length}
    attrs = {"sm_scale": _default_scale(q) if sm_scale is None else sm_scale, "d_v": d_v}
    return call(OPS["sparse_mla"], inputs, attrs, out, num_threads)


def sparse_mla_fp8(
    q, kv, indices, attn_sink=None, topk_length=None, *, sm_scale=None, d_v=512, out=None, num_threads=0
):
    """`sparse_mla` over a cache of 656 bytes a token, which `pack_mla_rows` makes.

    A row is d_v float8_e4m3fn, d_v / 128 float32 that scale 128 of them each, and d_qk - d_v bfloat16 that are key
    only: the layout of FlashMLA and vLLM. It stands for bfloat16: fp8 times scale, rounded, then the others as they
    are.

    Parameters
    ----------
    q : tensor [s_q, h_q, d_qk], bfloat16
        h_q in 1..128, d_qk 512 or 576.
    kv : tensor [s_kv, d_packed], uint8
        d_packed is ``d_v + d_v / 32 + 2 * (d_qk - d_v)``: 528 or 656. Fastest at an address that is a multiple of 16.
    indices, attn_sink, topk_length, sm_scale, d_v, out, num_threads
        As in `sparse_mla`; d_v is a multiple of 128.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], bfloat16
    max_logits : tensor [s_q, h_q], float32
    lse : tensor [s_q, h_q], float32
        As of `sparse_mla` over those bfloat16.

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.calls.call`.
    """
    inputs = {"q": q, "kv": kv, "indices": indices, "attn_sink": attn_sink, "topk_length": topk_length}
    attrs = {"sm_scale": _default_scale(q) if sm_scale is None else sm_scale, "d_v": d_v}
    return call(OPS["sparse_mla_fp8"], inputs, attrs, out, num_threads)


def dsa_attention(
    index_q,
    index_k,
    weights,
    ks,
    ke,
    q,
    kv,
    index_k_scale=None,
    attn_sink=None,
    *,
    topk,
    sm_scale=None,
    d_v=512,
    out=None,
    num_threads=0,
):
    """`indexer_topk`, then `sparse_mla` over what it selected.

    Parameters
    ----------
    index_q, index_k, weights, ks, ke, index_k_scale, topk
        As q, k, weights, ks, ke, k_scale and topk of `indexer_topk`; `index_q` has the type of `q`.
    q, kv, attn_sink, sm_scale, d_v
        As in `sparse_mla`.
    out : tuple of two tensors, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], type of `q`
    lse : tensor [s_q, h_q], float32

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.calls.call`.
    """
    inputs = {
        "index_q": index_q,
        "index_k": index_k,
        "weights": weights,
        "ks": ks,
        "ke": ke,
        "q": q,
        "kv": kv,
        "index_k_scale": index_k_scale,
        "attn_sink": attn_sink,
    }
    attrs = {"topk": topk, "sm_scale": _default_scale(q) if sm_scale is None else sm_scale, "d_v": d_v}
    return call(OPS["dsa_attention"], inputs, attrs, out, num_threads)


def _default_scale(q: Any) -> float:
    shape = list(getattr(q, "shape", []))
    # Any number will do where the shape is wrong: the library says so.
    return float(shape[-1]) ** -0.5 if shape and shape[-1] > 0 else 1.0
