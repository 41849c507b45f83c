"""The operators as Python functions over NumPy arrays, torch tensors and anything else with DLPack.

Inputs are never copied, at any alignment. All are on the CPU or all on one GPU. Outputs have the kind of the first
input: torch tensors for torch, NumPy arrays for everything else on the CPU; or they are written to `out`. Element types
that NumPy itself lacks (bfloat16, float8_e4m3fn) are those of the package ml_dtypes.

On a GPU the work is enqueued on torch's current stream, or on the default one where there is no torch tensor, and its
workspace comes from torch. Tensors of other libraries must live until the work is done, and whatever uses their
contents must come after it on that stream.

torch neither differentiates, traces nor transforms these functions; they refuse tensors for which it would have to.
``torch.ops.dsa_tvm.*`` (see `dsa_tvm.torch_ops`) work under `torch.compile`, `torch.export` and `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsFloat, SupportsIndex

from .ops import OPS
from .runtime.calls import call
from .runtime.tensors import refuse_transforms

#: A NumPy array, a torch tensor, or anything with ``__dlpack__``.
Tensor = Any


def _call(
    op: str, inputs: Mapping[str, Tensor | None], attrs: Mapping[str, Any], out: Any, num_threads: SupportsIndex
) -> tuple[Any, ...]:
    refuse_transforms(op, inputs)
    return call(OPS[op], inputs, attrs, out, num_threads)


def lightning_indexer(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    k_scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
    num_threads: SupportsIndex = 0,
) -> Tensor:
    """Score every key for every query: ``k_scale * sum_h weights * relu(q . k)``, ``-inf`` outside ``[ks, ke)``.

    DeepSeek-V3.2 technical report, equation 1.

    Parameters
    ----------
    q : tensor [s_q, h_idx, d_idx], float32, bfloat16, float16, float8_e4m3fn or int8
        Indexer queries; h_idx in 1..64, d_idx 32, 64 or 128.
    k : tensor [s_kv, d_idx], type of `q`, or float8_e4m3fn unless `q` is int8
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
        See `dsa_tvm.runtime.calls.call`.
    """
    inputs = {"q": q, "k": k, "weights": weights, "ks": ks, "ke": ke, "k_scale": k_scale}
    return _call("lightning_indexer", inputs, {}, out, num_threads)[0]


def topk(
    logits: Tensor,
    ks: Tensor,
    ke: Tensor,
    topk: SupportsIndex,
    *,
    out: Tensor | None = None,
    num_threads: SupportsIndex = 0,
) -> Tensor:
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
        See `dsa_tvm.runtime.calls.call`.
    """
    inputs = {"logits": logits, "ks": ks, "ke": ke}
    return _call("topk", inputs, {"topk": topk}, out, num_threads)[0]


def indexer_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    k_scale: Tensor | None = None,
    *,
    topk: SupportsIndex,
    out: Tensor | None = None,
    num_threads: SupportsIndex = 0,
) -> Tensor:
    """`lightning_indexer` and `topk` in one call.

    The logits are held for at most ``min(s_q, 32 * threads)`` queries at a time: ``4 * that * s_kv`` bytes.

    Parameters
    ----------
    q : tensor [s_q, h_idx, d_idx], float32, bfloat16, float16, float8_e4m3fn or int8
    k : tensor [s_kv, d_idx], type of `q`, or float8_e4m3fn unless `q` is int8
    weights : tensor [s_q, h_idx], float32
    ks, ke : tensor [s_q], int32
    k_scale : tensor [s_kv], float32, optional
        These as in `lightning_indexer`.
    topk : int
        1..4096.
    out : tensor [s_q, topk], int32, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    indices : tensor [s_q, topk], int32
        As `topk` returns them.

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.runtime.calls.call`.
    """
    inputs = {"q": q, "k": k, "weights": weights, "ks": ks, "ke": ke, "k_scale": k_scale}
    return _call("indexer_topk", inputs, {"topk": topk}, out, num_threads)[0]


def sparse_mla(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    sm_scale: SupportsFloat,
    d_v: SupportsIndex = 512,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    num_threads: SupportsIndex = 0,
) -> tuple[Tensor, Tensor, Tensor]:
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
    sm_scale : float
        Multiplies the scores. It has no default because it does not follow from d_qk: a model scales by the width that
        its heads have before absorption, ``(qk_nope_head_dim + qk_rope_head_dim)**-0.5``, times the square of YaRN's
        mscale if it uses YaRN. `dsa_tvm.presets` has the value of each model, and `mla_scale` to compute others.
    d_v : int
        512.
    out : tuple of three tensors, shaped like the results, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], type of `q`
    max_logits : tensor [s_q, h_q], float32
    lse : tensor [s_q, h_q], float32
        Natural logarithm. A query without a key has out 0, max_logits -inf and lse +inf.

    Notes
    -----
    Products are summed in float32. A CPU with AVX512-BF16 (`active_target` is then ``x86-64-v4-bf16``) multiplies
    bfloat16 by its bf16 dot products. The products of q and kv are exact, and `sm_scale` multiplies their sum, which
    has to be in the range of float32. A weight is the sum of two bfloat16, so that out is as precise as in float32.
    Subnormal bfloat16 numbers, those below 2**-126, count as 0. Infinities and NaN are as in float32, but where a sum
    overflows on the way, its parts may overflow in another order.

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.runtime.calls.call`.
    """
    inputs = {"q": q, "kv": kv, "indices": indices, "attn_sink": attn_sink, "topk_length": topk_length}
    results = _call("sparse_mla", inputs, {"sm_scale": sm_scale, "d_v": d_v}, out, num_threads)
    return results[0], results[1], results[2]


def sparse_mla_fp8(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    sm_scale: SupportsFloat,
    d_v: SupportsIndex = 512,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    num_threads: SupportsIndex = 0,
) -> tuple[Tensor, Tensor, Tensor]:
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
    indices : tensor [s_q, topk], int32
    attn_sink : tensor [h_q], float32, optional
    topk_length : tensor [s_q], int32, optional
    sm_scale : float
        These as in `sparse_mla`; `sm_scale` has no default for the reason given there.
    d_v : int
        512; a multiple of 128.
    out : tuple of three tensors, shaped like the results, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], bfloat16
    max_logits : tensor [s_q, h_q], float32
    lse : tensor [s_q, h_q], float32
        As of `sparse_mla` over those bfloat16; its notes hold here, too.

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.runtime.calls.call`.
    """
    inputs = {"q": q, "kv": kv, "indices": indices, "attn_sink": attn_sink, "topk_length": topk_length}
    results = _call("sparse_mla_fp8", inputs, {"sm_scale": sm_scale, "d_v": d_v}, out, num_threads)
    return results[0], results[1], results[2]


def dsa_attention(
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    q: Tensor,
    kv: Tensor,
    index_k_scale: Tensor | None = None,
    attn_sink: Tensor | None = None,
    *,
    topk: SupportsIndex,
    sm_scale: SupportsFloat,
    d_v: SupportsIndex = 512,
    out: tuple[Tensor, Tensor] | None = None,
    num_threads: SupportsIndex = 0,
) -> tuple[Tensor, Tensor]:
    """`indexer_topk`, then `sparse_mla` over what it selected.

    Parameters
    ----------
    index_q : tensor [s_q, h_idx, d_idx], float32, bfloat16 or float16
    index_k : tensor [s_kv, d_idx], type of `index_q`, or float8_e4m3fn
    weights : tensor [s_q, h_idx], float32
    ks, ke : tensor [s_q], int32
        These as q, k, weights, ks and ke of `indexer_topk`.
    q : tensor [s_q, h_q, d_qk], type of `index_q`
    kv : tensor [s_kv, d_qk], type of `index_q`
        These as in `sparse_mla`.
    index_k_scale : tensor [s_kv], float32, optional
        As k_scale of `indexer_topk`.
    attn_sink : tensor [h_q], float32, optional
    topk : int
        1..4096.
    sm_scale : float
        As in `sparse_mla`; it has no default for the reason given there.
    d_v : int
        512.
    out : tuple of two tensors, shaped like the results, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], type of `q`
    lse : tensor [s_q, h_q], float32

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.runtime.calls.call`.
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
    results = _call("dsa_attention", inputs, {"topk": topk, "sm_scale": sm_scale, "d_v": d_v}, out, num_threads)
    return results[0], results[1]


def write_rows(
    cache: Tensor, rows: Tensor, positions: Tensor, *, out: Tensor | None = None, num_threads: SupportsIndex = 0
) -> Tensor:
    """Write new rows into a cache of fixed capacity: ``out[b, positions[b, i]] = rows[b, i]``.

    With ``out=cache`` the rows are written where the cache lies, and nothing else is touched: a decode step costs its
    own rows, whatever the capacity. Otherwise the cache is copied first. The operators that read a cache take its
    length in use as `ke`, or by the indices, and what lies behind it does not count. Caches of several sequences are
    read as one, ``cache.reshape(batch * capacity, d_row)``: the rows of sequence b start at ``b * capacity``.

    Parameters
    ----------
    cache : tensor [batch, capacity, d_row], float32, bfloat16, float16, float8_e4m3fn, int8 or uint8
    rows : tensor [batch, s_new, d_row], type of `cache`
    positions : tensor [batch, s_new], int32
        Where each row goes in its sequence. Those outside ``[0, capacity)`` are skipped, such as those of padding. Of
        equal ones in a sequence the last one wins.
    out : tensor [batch, capacity, d_row], type of `cache`, optional
        `cache` itself, or memory that overlaps no input.
    num_threads : int
        0 for the process default.

    Returns
    -------
    out : tensor [batch, capacity, d_row], type of `cache`

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `dsa_tvm.runtime.calls.call`.
    """
    return _call("write_rows", {"cache": cache, "rows": rows, "positions": positions}, {}, out, num_threads)[0]
