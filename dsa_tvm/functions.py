"""The operators as Python functions over NumPy arrays, torch tensors and anything else with DLPack.

Inputs are never copied, whatever their alignment. They are all on the CPU, or all on one GPU. Results are torch tensors
if the first input is one, otherwise NumPy arrays; with `out` they are written there. Element types that NumPy lacks
(bfloat16, float8_e4m3fn) come from the package ml_dtypes.

A call on a GPU is enqueued on torch's current stream, or on the default stream if no argument is a torch tensor. Its
workspace comes from torch. Tensors of other libraries must live until the work is done, and whoever uses their contents
must do so later on that stream.

torch cannot differentiate, trace or transform these functions, so they refuse tensors for which it would have to. Use
``torch.ops.dsa_tvm.*`` (see `dsa_tvm.torch_ops`) under `torch.compile`, `torch.export` and `torch.func.vmap`.
"""

from __future__ import annotations

from typing import Any, SupportsFloat, SupportsIndex

from .ops import OPS
from .runtime import frames
from .runtime.calls import call
from .runtime.tensors import refuse_transforms

#: A NumPy array, a torch tensor, or anything with ``__dlpack__``.
Tensor = Any


def _call(
    op: str, inputs: tuple[Tensor | None, ...], attrs: tuple[Any, ...], out: Any, num_threads: SupportsIndex
) -> tuple[Any, ...]:
    spec = OPS[op]
    results = frames.call(spec, inputs, attrs, out, num_threads)
    if results is not None:
        return results
    named = {t.name: x for t, x in zip(spec.inputs, inputs, strict=True)}
    refuse_transforms(op, named)
    return call(spec, named, {a.name: x for a, x in zip(spec.attrs, attrs, strict=True)}, out, num_threads)


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
        Each query sees the keys ``ks[i]`` to ``ke[i] - 1``.
    k_scale : tensor [s_kv], float32, optional
        Scale of each fp8 or int8 key. It multiplies the sum over the heads.
    out : tensor [s_q, s_kv], float32, optional
        Where to write the logits.
    num_threads : int
        The most threads of this call; 0 for the process default, see `set_num_threads`.

    Returns
    -------
    logits : tensor [s_q, s_kv], float32

    Notes
    -----
    Products are summed in float32. A CPU with AVX512-BF16 or AMX (`active_target` is then ``x86-64-v4-bf16`` or
    ``x86-64-v4-amx``) multiplies bfloat16 and fp8 with its bf16 products. These products are exact and their sums are
    as precise as those of float32, but subnormal bfloat16 numbers, those below 2**-126, count as 0. Infinities and NaN
    are as in float32, except that a sum that overflows on the way may overflow at another of its terms.
    ``aarch64-bf16`` does the same with ``bfmmla``, and rounds each of its sums to odd.

    Raises
    ------
    ArgumentError
        An argument has the wrong rank, shape, type, device, layout or value. No output has been touched.
    KernelError
        There is no memory for the workspace.
    LibraryError
        The library is missing or damaged, or has no kernels for this CPU or GPU; or there is no CUDA driver.
    """
    return _call("lightning_indexer", (q, k, weights, ks, ke, k_scale), (), out, num_threads)[0]


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

    Larger values win, and of equal values the lower index. ``-inf`` is a value like any other. NaN is never selected,
    whereas torch.topk ranks it first: a token whose score is broken must not displace one whose score is known.

    Parameters
    ----------
    logits : tensor [s_q, s_kv], float32
    ks, ke : tensor [s_q], int32
        Only keys in ``[ks, ke)`` take part.
    topk : int
        1..4096.
    out : tensor [s_q, topk], int32, optional
        Where to write the indices.
    num_threads : int
        The most threads of this call; 0 for the process default, see `set_num_threads`.

    Returns
    -------
    indices : tensor [s_q, topk], int32
        In ascending order, padded with -1 at the end.

    Raises
    ------
    ArgumentError
        An argument has the wrong rank, shape, type, device, layout or value. No output has been touched.
    KernelError
        There is no memory for the workspace.
    LibraryError
        The library is missing or damaged, or has no kernels for this CPU or GPU; or there is no CUDA driver.
    """
    return _call("topk", (logits, ks, ke), (topk,), out, num_threads)[0]


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
        Indexer queries; h_idx in 1..64, d_idx 32, 64 or 128.
    k : tensor [s_kv, d_idx], type of `q`, or float8_e4m3fn unless `q` is int8
        Indexer keys.
    weights : tensor [s_q, h_idx], float32
        Head weights, as for `lightning_indexer`.
    ks, ke : tensor [s_q], int32
        Each query sees the keys ``ks[i]`` to ``ke[i] - 1``.
    k_scale : tensor [s_kv], float32, optional
        Scale of each fp8 or int8 key.
    topk : int
        1..4096.
    out : tensor [s_q, topk], int32, optional
        Where to write the indices.
    num_threads : int
        The most threads of this call; 0 for the process default, see `set_num_threads`.

    Returns
    -------
    indices : tensor [s_q, topk], int32
        In ascending order, padded with -1 at the end.

    Raises
    ------
    ArgumentError
        An argument has the wrong rank, shape, type, device, layout or value. No output has been touched.
    KernelError
        There is no memory for the workspace.
    LibraryError
        The library is missing or damaged, or has no kernels for this CPU or GPU; or there is no CUDA driver.
    """
    return _call("indexer_topk", (q, k, weights, ks, ke, k_scale), (topk,), out, num_threads)[0]


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
        Absorbed queries; h_q in 1..128, d_qk 512 or 576.
    kv : tensor [s_kv, d_qk], type of `q`
        Latent rows.
    indices : tensor [s_q, topk], int32
        Rows of `kv`; those outside ``[0, s_kv)`` are skipped.
    attn_sink : tensor [h_q], float32, optional
        Its exponential is added to the denominator of `out`; the other outputs do not change.
    topk_length : tensor [s_q], int32, optional
        Only that many leading indices of each query are used.
    sm_scale : float
        Multiplies the scores. It has no default because it does not follow from d_qk: a model scales by the width that
        its heads have before absorption, ``(qk_nope_head_dim + qk_rope_head_dim)**-0.5``, times the square of YaRN's
        mscale if it uses YaRN. `dsa_tvm.presets` has the value of each model, and `mla_scale` to compute others.
    d_v : int
        512.
    out : tuple of tensors [s_q, h_q, d_v], [s_q, h_q] and [s_q, h_q], optional
        Where to write the results, in their types.
    num_threads : int
        The most threads of this call; 0 for the process default, see `set_num_threads`.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], type of `q`
    max_logits : tensor [s_q, h_q], float32
    lse : tensor [s_q, h_q], float32
        Natural logarithm of the sum of the exponentials. A query without a key has out 0, max_logits -inf, lse +inf.

    Notes
    -----
    Products are summed in float32. A CPU with AVX512-BF16 or AMX (`active_target` is then ``x86-64-v4-bf16`` or
    ``x86-64-v4-amx``) multiplies bfloat16 by its bf16 products. The products of q and kv are exact, and `sm_scale`
    multiplies their sum, which has to be in the range of float32. A weight is the sum of two bfloat16, so that out is
    as precise as in float32. Subnormal bfloat16 numbers, those below 2**-126, count as 0. Infinities and NaN are as in
    float32, but where a sum overflows on the way, its parts may overflow in another order.
    ``aarch64-bf16`` does the same with ``bfmmla``, and rounds each of its sums to odd.

    Raises
    ------
    ArgumentError
        An argument has the wrong rank, shape, type, device, layout or value. No output has been touched.
    KernelError
        There is no memory for the workspace.
    LibraryError
        The library is missing or damaged, or has no kernels for this CPU or GPU; or there is no CUDA driver.
    """
    inputs = (q, kv, indices, attn_sink, topk_length)
    results = _call("sparse_mla", inputs, (sm_scale, d_v), out, num_threads)
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

    A row holds d_v float8_e4m3fn, then d_v / 128 float32 that each scale 128 of these, then d_qk - d_v bfloat16 that
    are part of the key only. This is the layout of FlashMLA and vLLM. The row stands for bfloat16 numbers: fp8 times
    scale, rounded to bfloat16, and the last ones as they are.

    Parameters
    ----------
    q : tensor [s_q, h_q, d_qk], bfloat16
        Absorbed queries; h_q in 1..128, d_qk 512 or 576.
    kv : tensor [s_kv, d_packed], uint8
        d_packed is ``d_v + d_v / 32 + 2 * (d_qk - d_v)``: 528 or 656. Fastest at an address that is a multiple of 16.
    indices : tensor [s_q, topk], int32
        Rows of `kv`; those outside ``[0, s_kv)`` are skipped.
    attn_sink : tensor [h_q], float32, optional
        Its exponential is added to the denominator of `out`.
    topk_length : tensor [s_q], int32, optional
        Only that many leading indices of each query are used.
    sm_scale : float
        Multiplies the scores; the model's own, as `sparse_mla` explains.
    d_v : int
        512; a multiple of 128.
    out : tuple of tensors [s_q, h_q, d_v], [s_q, h_q] and [s_q, h_q], optional
        Where to write the results, in their types.
    num_threads : int
        The most threads of this call; 0 for the process default, see `set_num_threads`.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], bfloat16
    max_logits : tensor [s_q, h_q], float32
    lse : tensor [s_q, h_q], float32
        As of `sparse_mla` over those bfloat16; its notes hold here, too.

    Raises
    ------
    ArgumentError
        An argument has the wrong rank, shape, type, device, layout or value. No output has been touched.
    KernelError
        There is no memory for the workspace.
    LibraryError
        The library is missing or damaged, or has no kernels for this CPU or GPU; or there is no CUDA driver.
    """
    inputs = (q, kv, indices, attn_sink, topk_length)
    results = _call("sparse_mla_fp8", inputs, (sm_scale, d_v), out, num_threads)
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
        Indexer queries; h_idx in 1..64, d_idx 32, 64 or 128.
    index_k : tensor [s_kv, d_idx], type of `index_q`, or float8_e4m3fn
        Indexer keys.
    weights : tensor [s_q, h_idx], float32
        Head weights of the indexer, as for `lightning_indexer`.
    ks, ke : tensor [s_q], int32
        Each query sees the keys ``ks[i]`` to ``ke[i] - 1``.
    q : tensor [s_q, h_q, d_qk], type of `index_q`
        Absorbed queries of the attention; h_q in 1..128, d_qk 512 or 576.
    kv : tensor [s_kv, d_qk], type of `index_q`
        Latent rows.
    index_k_scale : tensor [s_kv], float32, optional
        Scale of each fp8 key of the indexer.
    attn_sink : tensor [h_q], float32, optional
        Its exponential is added to the denominator of `out`.
    topk : int
        Keys that a query attends to, 1..4096.
    sm_scale : float
        Multiplies the scores of the attention; the model's own, as `sparse_mla` explains.
    d_v : int
        512.
    out : tuple of tensors [s_q, h_q, d_v] and [s_q, h_q], optional
        Where to write the results, in their types.
    num_threads : int
        The most threads of this call; 0 for the process default, see `set_num_threads`.

    Returns
    -------
    out : tensor [s_q, h_q, d_v], type of `q`
    lse : tensor [s_q, h_q], float32

    Raises
    ------
    ArgumentError
        An argument has the wrong rank, shape, type, device, layout or value. No output has been touched.
    KernelError
        There is no memory for the workspace.
    LibraryError
        The library is missing or damaged, or has no kernels for this CPU or GPU; or there is no CUDA driver.
    """
    inputs = (index_q, index_k, weights, ks, ke, q, kv, index_k_scale, attn_sink)
    results = _call("dsa_attention", inputs, (topk, sm_scale, d_v), out, num_threads)
    return results[0], results[1]


def write_rows(
    cache: Tensor, rows: Tensor, positions: Tensor, *, out: Tensor | None = None, num_threads: SupportsIndex = 0
) -> Tensor:
    """Write new rows into a cache of fixed capacity: ``out[b, positions[b, i]] = rows[b, i]``.

    With ``out=cache`` the rows are written in place and nothing else is touched, so the cost does not grow with the
    capacity. Otherwise the cache is copied first. The operators that read a cache learn its length in use from `ke`,
    or from the indices, and ignore the rows after it. Caches of several sequences are read as one,
    ``cache.reshape(batch * capacity, d_row)``: the rows of sequence b start at ``b * capacity``.

    Parameters
    ----------
    cache : tensor [batch, capacity, d_row], float32, bfloat16, float16, float8_e4m3fn, int8 or uint8
    rows : tensor [batch, s_new, d_row], type of `cache`
    positions : tensor [batch, s_new], int32
        Where each row goes in its sequence. Positions outside ``[0, capacity)`` are skipped, so padding can have any
        of these. Of equal positions in a sequence the last one wins.
    out : tensor [batch, capacity, d_row], type of `cache`, optional
        `cache` itself, or memory that overlaps no input.
    num_threads : int
        The most threads of this call; 0 for the process default, see `set_num_threads`.

    Returns
    -------
    out : tensor [batch, capacity, d_row], type of `cache`

    Raises
    ------
    ArgumentError
        An argument has the wrong rank, shape, type, device, layout or value. No output has been touched.
    KernelError
        There is no memory for the workspace.
    LibraryError
        The library is missing or damaged, or has no kernels for this CPU or GPU; or there is no CUDA driver.
    """
    return _call("write_rows", (cache, rows, positions), (), out, num_threads)[0]
