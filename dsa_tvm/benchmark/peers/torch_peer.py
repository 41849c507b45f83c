"""The operators in plain torch, in the fastest form it offers, on a CPU and on a GPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from ...runtime.packing import unpack_mla_rows
from ..workload import Workload
from . import Skipped

#: Bytes that an intermediate result may have. Queries that need more are computed in groups.
LIMIT = 2**31


def prepare(work: Workload, capability: int | None = None, product: str = "") -> Callable[[], Any]:
    """The work of one call.

    Parameters
    ----------
    work : Workload
        torch tensors.
    capability : int, optional
        The GPU's; 90 for 9.0.
    product : str
        On a CPU, the type that queries and keys are multiplied in, one of `forms` of theirs; by default their own.

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
        # The logits are already -inf where a query may not look.
        return lambda: select(t["logits"])[1]
    if work.op in ("sparse_mla", "sparse_mla_fp8"):
        unused = t["indices"] < 0
        given = unused if bool(unused.any()) else None
        return lambda: _attend(work, t["indices"], given, product)
    unseen = hidden(work)
    index = _indexer(work, unseen, capability, product)
    if work.op == "lightning_indexer":
        return index
    if work.op == "indexer_topk":
        return lambda: select(index())[1]

    def attention() -> Any:
        values, indices = select(index())
        if unseen is None:
            return _attend(work, indices, None, product), indices
        unused = torch.isneginf(values)
        indices = indices.masked_fill(unused, -1)
        return _attend(work, indices, unused, product), indices

    return attention


def forms(dtype: str) -> tuple[str, ...]:
    """The types that numbers of a type can be multiplied in on a CPU, each as exact as the last but for its sums."""
    return {
        "float32": ("float32",),
        "bfloat16": ("bfloat16", "float32"),
        "float16": ("float16", "float32"),
        "float8_e4m3fn": ("bfloat16", "float32"),
        "int8": ("int8", "bfloat16", "float32"),
    }[dtype]


@functools.cache
def fastest_form(dtype: str, threads: int) -> str:
    """Which of `forms` this torch is fastest in on this CPU, with that many threads: the one that a user would keep."""
    import torch

    found = {}
    for form in forms(dtype):
        # Small integers, which every type can represent.
        keys = torch.randint(-8, 8, (4096, 128)).to(getattr(torch, dtype))
        queries = torch.randint(-8, 8, (512, 128)).to(getattr(torch, dtype))
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            _products(queries, keys, form)
            times.append(time.perf_counter() - begin)
        found[form] = min(times[1:])
    return min(found, key=found.__getitem__)


def _products(rows: Any, keys: Any, form: str) -> Any:
    """The products of rows and keys: of the form's type, or int32 for int8."""
    import torch

    if form == "int8":
        return torch._int_mm(rows, keys.T)
    dtype = getattr(torch, form)
    return torch.matmul(rows.to(dtype), keys.to(dtype).T)


def as_bf16(x: Any) -> Any:
    """fp8 and int8 as bfloat16, which represents all of their numbers. Other types are returned unchanged."""
    return x.bfloat16() if x.element_size() == 1 else x


def hidden(work: Workload) -> Any:
    """[s_q, s_kv] bool: the keys that a query may not see, or None if every query sees all keys."""
    import torch

    keys = torch.arange(work.lengths["s_kv"], device=work.inputs["ke"].device)
    found = keys >= work.inputs["ke"][:, None]
    return found if bool(found.any()) else None


def plain_indexer(q: Any, k: Any, weights: Any, unseen: Any, k_scale: Any) -> Any:
    """The formula. A compiler fuses everything after the product into one kernel."""
    scores = (q.reshape(-1, q.shape[-1]) @ k.T).view(q.shape[0], q.shape[1], -1)
    logits = (scores.relu().float() * weights[:, :, None]).sum(1)
    if k_scale is not None:
        logits = logits * k_scale
    return logits if unseen is None else logits.masked_fill(unseen, float("-inf"))


def _indexer(work: Workload, unseen: Any, capability: int | None, product: str) -> Callable[[], Any]:
    import torch

    t = work.inputs
    prefix = "index_" if work.op == "dsa_attention" else ""
    q, k, k_scale = t[f"{prefix}q"], t[f"{prefix}k"], t.get(f"{prefix}k_scale")
    s_q, h_idx, d_idx = q.shape
    on_cpu = capability is None
    if q.dtype is torch.int8 and not on_cpu:
        raise Skipped("torch has no int8 product whose result is float")
    fp8 = q.element_size() == 1 and not on_cpu
    if fp8 and (capability or 0) < 89:
        raise Skipped("torch has no fp8 product below compute capability 8.9")
    one = torch.ones((), device=q.device)
    form = product or str(q.dtype).removeprefix("torch.")
    # The sum over the heads is fastest as a matrix product, which takes one type only.
    kind = torch.bfloat16 if fp8 else torch.float32 if form == "int8" else getattr(torch, form)
    weights = t["weights"].to(kind)

    def scores(rows: Any, keys: Any) -> Any:
        if fp8:
            # Summed by the tensor cores, like ours.
            return torch._scaled_mm(rows, k.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return _products(rows, keys, form)

    def logits_of(part: slice) -> Any:
        heads = scores(q[part].reshape(-1, d_idx), k).relu_().to(kind).view(-1, h_idx, len(k))
        return torch.bmm(weights[part, None], heads)[:, 0]

    def logits_of_one() -> Any:
        # The products that a CPU does faster for a single query.
        return torch.matmul(scores(k, q[0]).relu_().to(kind), weights[0])[None]

    def index() -> Any:
        if s_q == 1 and on_cpu:
            logits = logits_of_one().float()
        else:
            logits = _in_groups(s_q, h_idx * len(k) * weights.element_size(), torch.float32, logits_of)
        if k_scale is not None:
            logits.mul_(k_scale)
        return logits if unseen is None else logits.masked_fill_(unseen, -torch.inf)

    return index


def _attend(work: Workload, indices: Any, unused: Any, product: str) -> Any:
    """`unused` [s_q, topk] bool: which indices are -1, or None if none is."""
    import torch

    q, kv, d_v = work.inputs["q"], work.inputs["kv"], work.attrs["d_v"]
    kind = getattr(torch, product) if product else q.dtype
    queries = q.to(kind)

    def out_of(part: slice) -> Any:
        rows = indices[part]
        found = rows if unused is None else rows.clamp(min=0)
        keys = kv.index_select(0, found.reshape(-1))
        keys = (unpack_mla_rows(keys, d_v) if work.op == "sparse_mla_fp8" else keys).to(kind).view(*rows.shape, -1)
        scores = torch.bmm(queries[part], keys.transpose(1, 2)).mul_(work.attrs["sm_scale"])
        if unused is not None:
            scores.masked_fill_(unused[part, None], -torch.inf)
        return torch.bmm(scores.softmax(-1), keys[:, :, :d_v])

    size = indices.shape[1] * (q.shape[2] + q.shape[1]) * queries.element_size()
    return _in_groups(len(q), size, q.dtype, out_of)


def _in_groups(queries: int, size: int, dtype: Any, result_of: Callable[[slice], Any]) -> Any:
    """The results of as many queries at a time as `LIMIT` allows, where each takes so many bytes."""
    import torch

    group = max(1, LIMIT // size)
    if group >= queries:
        return result_of(slice(0, queries)).to(dtype)
    first = result_of(slice(0, group))
    results = torch.empty((queries, *first.shape[1:]), dtype=dtype, device=first.device)
    results[:group] = first
    del first
    for m in range(group, queries, group):
        part = slice(m, min(m + group, queries))
        results[part] = result_of(part)
    return results
