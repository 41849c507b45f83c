"""The operators as Python functions over NumPy arrays, torch tensors and anything else with DLPack.

Inputs are never copied, at any alignment. Outputs come as the first input does: torch tensors for torch, NumPy arrays
for everything else; or are written to `out`. Element types of NumPy that NumPy itself lacks (bfloat16, float8_e4m3fn)
are those of the package ml_dtypes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from . import library
from .errors import ArgumentError, KernelError, LibraryError
from .ops import OPS
from .spec import AttrSpec, OpSpec
from .tensors import Tensor, as_tensor, is_torch

_MAX_NDIM = 3
_STATUS_ERRORS = {1: ArgumentError, 3: LibraryError}


class _Attr(ctypes.Union):
    _fields_ = (("i", ctypes.c_int64), ("f", ctypes.c_double))


class _Options(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint32), ("num_threads", ctypes.c_int32))


def _attribute(op: str, attr: AttrSpec, value: Any) -> _Attr:
    if isinstance(value, bool) or not hasattr(value, "__index__" if attr.kind is int else "__float__"):
        raise ArgumentError(f"{op}: {attr.name}: expected {attr.kind.__name__}, got {type(value).__name__}")
    if attr.kind is float:
        return _Attr(f=float(value))
    number = value.__index__()
    if not -(2**63) <= number < 2**63:
        raise ArgumentError(f"{op}: {attr.name}: expected a 64-bit integer, got {number}")
    return _Attr(i=number)


def _raise(lib: ctypes.CDLL, status: int) -> None:
    raise _STATUS_ERRORS.get(status, KernelError)(lib.dsa_tvm_last_error().decode())


def _empty(like: Any, dtype: str, shape: Sequence[int]) -> Any:
    """An output tensor of the kind of `like`, whose own element type is used where `dtype` is "T"."""
    if is_torch(like):
        import torch

        return torch.empty(shape, dtype=like.dtype if dtype == "T" else getattr(torch, dtype))
    import numpy as np

    if dtype != "T":
        return np.empty(shape, dtype)
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype)
    raise ArgumentError(f"out: expected tensors to write to, because {type(like).__name__} inputs have no type to follow")


def call(
    spec: OpSpec,
    inputs: Mapping[str, Any],
    attrs: Mapping[str, Any],
    out: Any = None,
    num_threads: int = 0,
) -> tuple[Any, ...]:
    """Run one operator.

    Parameters
    ----------
    spec : OpSpec
    inputs, attrs : mapping
        By name; an optional input may be None.
    out : tensor or tuple of tensors, optional
        Where the outputs go, one for each; by default they are made.
    num_threads : int
        Threads of this call; 0 for the process default.

    Returns
    -------
    tuple
        The outputs, in the operator's order.

    Raises
    ------
    ArgumentError
        An argument does not fit the operator; no output has been touched.
    KernelError
        No memory for the workspace.
    LibraryError
        The library is missing, damaged or has no kernels for this CPU.
    """
    lib = library.load()
    keep: list[Any] = []
    tensors = [
        None if inputs[t.name] is None and t.optional else as_tensor(spec.name, t.name, inputs[t.name], keep)
        for t in spec.inputs
    ]
    input_array = (ctypes.POINTER(Tensor) * len(tensors))(*(ctypes.pointer(t) if t is not None else None for t in tensors))
    attr_array = (_Attr * max(len(spec.attrs), 1))(*(_attribute(spec.name, a, attrs[a.name]) for a in spec.attrs))
    arguments = (spec.name.encode(), input_array, len(tensors), attr_array, len(spec.attrs))
    if out is None:
        # The shapes come from the library, so that nothing is allocated for arguments that are refused.
        shapes = (ctypes.c_int64 * _MAX_NDIM * len(spec.outputs))()
        status = lib.dsa_tvm_output_shapes(*arguments, shapes, len(spec.outputs))
        if status:
            _raise(lib, status)
        typed = next(t.name for t in reversed(spec.inputs) if t.dtype in ("T", spec.outputs[0].dtype))
        outputs = tuple(
            _empty(inputs[typed], t.dtype, list(shape[: len(t.shape)]))
            for t, shape in zip(spec.outputs, shapes, strict=True)
        )
    else:
        outputs = out if isinstance(out, tuple) else (out,)
        if len(outputs) != len(spec.outputs):
            raise ArgumentError(f"{spec.name}: out: expected {len(spec.outputs)} tensors, got {len(outputs)}")
    output_tensors = [
        as_tensor(spec.name, t.name, x, keep, writable=True) for t, x in zip(spec.outputs, outputs, strict=True)
    ]
    output_array = (ctypes.POINTER(Tensor) * len(outputs))(*map(ctypes.pointer, output_tensors))
    options = _Options(ctypes.sizeof(_Options), num_threads)
    status = lib.dsa_tvm_call(*arguments, output_array, len(outputs), ctypes.byref(options))
    if status:
        _raise(lib, status)
    return outputs


def lightning_indexer(q, k, weights, ks, ke, k_scale=None, *, out=None, num_threads=0):
    """Score every key for every query: ``k_scale * sum_h weights * relu(q . k)``, ``-inf`` outside ``[ks, ke)``.

    DeepSeek-V3.2 technical report, equation 1.

    Parameters
    ----------
    q : tensor [s_q, h_idx, d_idx], float32, bfloat16, float16 or float8_e4m3fn
        Indexer queries; h_idx in 1..64, d_idx 32, 64 or 128.
    k : tensor [s_kv, d_idx], type of `q`, or float8_e4m3fn
        Indexer keys.
    weights : tensor [s_q, h_idx], float32
        Head weights; they already hold ``h_idx**-0.5 * d_idx**-0.5 * q_scale``.
    ks, ke : tensor [s_q], int32
        First key, and one past the last key, each query may see.
    k_scale : tensor [s_kv], float32, optional
        Scale of each fp8 key; multiplies after the head sum.
    out : tensor [s_q, s_kv], float32, optional
    num_threads : int
        0 for the process default.

    Returns
    -------
    logits : tensor [s_q, s_kv], float32

    Raises
    ------
    ArgumentError, KernelError, LibraryError
        See `call`.
    """
    inputs = {"q": q, "k": k, "weights": weights, "ks": ks, "ke": ke, "k_scale": k_scale}
    return call(OPS["lightning_indexer"], inputs, {}, out, num_threads)[0]


def topk(logits, ks, ke, topk, *, out=None, num_threads=0):
    """Positions of the `topk` largest logits of each row, exactly and deterministically.

    Larger first, equal values by lower index, NaN never, ``-inf`` like any other value.

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
        See `call`.
    """
    inputs = {"logits": logits, "ks": ks, "ke": ke}
    return call(OPS["topk"], inputs, {"topk": topk}, out, num_threads)[0]


def indexer_topk(q, k, weights, ks, ke, k_scale=None, *, topk, out=None, num_threads=0):
    """`lightning_indexer` and `topk` in one call.

    The logits are held for ``min(s_q, 8 * threads)`` queries at a time: ``4 * that * s_kv`` bytes of workspace.
    Arguments, result and errors as there.
    """
    inputs = {"q": q, "k": k, "weights": weights, "ks": ks, "ke": ke, "k_scale": k_scale}
    return call(OPS["indexer_topk"], inputs, {"topk": topk}, out, num_threads)[0]


def sparse_mla(
    q, kv, indices, attn_sink=None, topk_length=None, *, sm_scale=None, d_v=512, out=None, num_threads=0
):
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
        See `call`.
    """
    inputs = {"q": q, "kv": kv, "indices": indices, "attn_sink": attn_sink, "topk_length": topk_length}
    attrs = {"sm_scale": _default_scale(q) if sm_scale is None else sm_scale, "d_v": d_v}
    return call(OPS["sparse_mla"], inputs, attrs, out, num_threads)


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
        See `call`.
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
    shape = getattr(q, "shape", ())
    # Any number will do where the shape is wrong: the library says so.
    return float(shape[-1]) ** -0.5 if len(shape) and shape[-1] > 0 else 1.0
