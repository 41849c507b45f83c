"""The operators in plain torch, in the fastest form it offers, for a GPU; and FlashMLA's pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...runtime.packing import unpack_mla_rows
from ..peers import Skipped
from ..workload import Workload

#: Bytes of an intermediate result: more queries than these allow go one group after another.
LIMIT = 2**31

_CACHE_PAGE = 64


def prepare(work: Workload, capability: int) -> Callable[[], Any]:
    """The work of one call.

    Parameters
    ----------
    work : Workload
        torch tensors.
    capability : int
        The GPU's; 90 for 9.0.

    Returns
    -------
    callable
        Takes nothing; returns the operator's first output. Selections are in no order, and that of `dsa_attention`
        comes behind its output.

    Raises
    ------
    Skipped
        torch has no fp8 product for this card.
    """
    import torch

    t, lengths = work.inputs, work.lengths
    count = min(lengths["topk"], lengths["s_kv"])

    def select(logits: Any) -> Any:
        return torch.topk(logits, count, sorted=False)

    if work.op == "topk":
        return lambda: select(t["logits"])[1]
    if work.op in ("sparse_mla", "sparse_mla_fp8"):
        return lambda: _attend(work, t["indices"])
    index = _indexer(work, capability)
    if work.op == "lightning_indexer":
        return index
    if work.op == "indexer_topk":
        return lambda: select(index())[1]

    def attention() -> Any:
        values, indices = select(index())
        indices = indices.int().masked_fill(torch.isneginf(values), -1)
        return _attend(work, indices), indices

    return attention


def as_bf16(x: Any) -> Any:
    """fp8 and int8 as bfloat16, which holds all of them; everything else as it is."""
    return x.bfloat16() if x.element_size() == 1 else x


def hidden(work: Workload) -> Any:
    """[s_q, s_kv] bool: which keys a query may not see; None where each sees all."""
    import torch

    keys = torch.arange(work.lengths["s_kv"], device=work.inputs["ke"].device)
    found = keys >= work.inputs["ke"][:, None]
    return found if bool(found.any()) else None


def plain_indexer(q: Any, k: Any, weights: Any, unseen: Any, k_scale: Any) -> Any:
    """The formula; a compiler makes one kernel of everything behind the product."""
    scores = (q.reshape(-1, q.shape[-1]) @ k.T).view(q.shape[0], q.shape[1], -1)
    logits = (scores.relu().float() * weights[:, :, None]).sum(1)
    if k_scale is not None:
        logits = logits * k_scale
    return logits if unseen is None else logits.masked_fill(unseen, float("-inf"))


def _indexer(work: Workload, capability: int) -> Callable[[], Any]:
    import torch

    t = work.inputs
    prefix = "index_" if work.op == "dsa_attention" else ""
    q, k, k_scale = t[f"{prefix}q"], t[f"{prefix}k"], t.get(f"{prefix}k_scale")
    s_q, h_idx, d_idx = q.shape
    if q.dtype is torch.int8:
        raise Skipped("torch has no int8 product whose result is float")
    fp8 = q.element_size() == 1
    if fp8 and capability < 89:
        raise Skipped("torch has no fp8 product below compute capability 8.9")
    one = torch.ones((), device=q.device)
    group = max(1, LIMIT // (h_idx * len(k) * 2))
    # The sum over the heads as a product, which is the fastest; it wants one type.
    weights = t["weights"].to(torch.bfloat16 if fp8 else q.dtype)
    unseen = hidden(work)

    def scores(rows: Any) -> Any:
        if fp8:
            # With the sums that the tensor cores make, as ours are.
            return torch._scaled_mm(rows, k.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return torch.matmul(rows, k.T)

    def index() -> Any:
        logits = torch.empty((s_q, len(k)), device=q.device)
        for m in range(0, s_q, group):
            part = slice(m, min(m + group, s_q))
            heads = scores(q[part].reshape(-1, d_idx)).relu_().view(-1, h_idx, len(k))
            logits[part] = torch.bmm(weights[part, None], heads)[:, 0]
        if k_scale is not None:
            logits.mul_(k_scale)
        return logits if unseen is None else logits.masked_fill_(unseen, -torch.inf)

    return index


def _attend(work: Workload, indices: Any) -> Any:
    import torch

    q, kv, d_v = work.inputs["q"], work.inputs["kv"], work.attrs["d_v"]
    out = torch.empty((*q.shape[:2], d_v), dtype=q.dtype, device=q.device)
    group = max(1, LIMIT // (indices.shape[1] * (q.shape[2] + q.shape[1]) * q.element_size()))
    for m in range(0, len(q), group):
        part = slice(m, min(m + group, len(q)))
        rows = indices[part]
        keys = kv.index_select(0, rows.clamp(min=0).reshape(-1))
        keys = (unpack_mla_rows(keys, d_v) if work.op == "sparse_mla_fp8" else keys).view(*rows.shape, -1)
        scores = torch.bmm(q[part], keys.transpose(1, 2)).mul_(work.attrs["sm_scale"])
        scores.masked_fill_((rows < 0)[:, None], -torch.inf)
        out[part] = torch.bmm(scores.softmax(-1), keys[:, :, :d_v])
    return out


def indices_like(work: Workload) -> Any:
    """Memory for `topk`'s output."""
    import torch

    shape = (work.lengths["s_q"], work.lengths["topk"])
    return torch.full(shape, -1, dtype=torch.int32, device=work.inputs["logits"].device)


def bytes_like(work: Workload, size: int) -> Any:
    """Zeroed memory."""
    import torch

    return torch.zeros(size, dtype=torch.uint8, device=work.inputs["logits"].device)


def flash_mla_cache(rows: Any) -> Any:
    """Packed rows of 576 as FlashMLA takes them: tensor [pages, 64, 1, 656], float8_e4m3fn."""
    import torch

    pages = -(-len(rows) // _CACHE_PAGE)
    cache = rows.new_zeros((pages * _CACHE_PAGE, rows.shape[1]))
    cache[: len(rows)] = rows
    return cache.view(pages, _CACHE_PAGE, 1, -1).view(torch.float8_e4m3fn)
