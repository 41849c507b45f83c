"""What ``dsa-tvm bench --suite cuda`` measures: shapes, inputs made on the GPU, and how much work they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ArgumentError
from ...ops import OPS
from ...presets import Preset
from ...runtime.packing import pack_mla_rows
from ...spec import INT32_MAX, OpSpec, completed
from .. import workload
from ..workload import Workload

DTYPES = (*workload.DTYPES, "float8_e4m3fn", "int8")

#: What 1.0 is in int8: of normally distributed numbers few leave its range.
_INT8_SCALE = 1 / 40


@dataclass(frozen=True)
class Case:
    """One row of the results; `dtype` is the type of the keys."""

    op: str
    dtype: str
    s_q: int
    s_kv: int


def _lengths(first: int, last: int) -> tuple[int, ...]:
    """Powers of two times 1024."""
    return tuple(1024 << i for i in range(first.bit_length() - 1, last.bit_length()))


#: By operator: element types, query tokens, key tokens. The attention's few queries are decoding: one or two tokens
#: each of 1, 64 or 128 sequences.
SUITE: Mapping[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = {
    "lightning_indexer": (("bfloat16", "float8_e4m3fn"), (1, 64, 2048, 4096), _lengths(4, 128)),
    "topk": (("float32",), (1, 4, 64, 4096), _lengths(8, 128)),
    "indexer_topk": (("bfloat16", "float8_e4m3fn"), (1, 64, 4096), (8192, 32768, 131072)),
    "sparse_mla": (("bfloat16",), (1, 2, 64, 128, 256, 4096), _lengths(8, 128)),
    "sparse_mla_fp8": (("float8_e4m3fn",), (1, 2, 64, 128, 256), _lengths(8, 128)),
    "dsa_attention": (("bfloat16",), (1, 64, 4096), (8192, 32768, 131072)),
}


def cases(ops: Sequence[str], s_q: Sequence[int], s_kv: Sequence[int], dtype: str | None) -> list[Case]:
    """The cases of some operators, or of all; lengths and a type that are given replace the suite's.

    Raises
    ------
    ArgumentError
        An unknown type, or one that none of the operators has; a length that is out of range.
    """
    if max([*s_q, *s_kv], default=0) > INT32_MAX:
        raise ArgumentError(f"bench: s_q, s_kv: expected at most {INT32_MAX}, got {max([*s_q, *s_kv])}")
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"bench: dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    found = []
    for op in dict.fromkeys(ops or SUITE):
        dtypes, few, keys = SUITE[op]
        served = [x for x in ([dtype] if dtype else dtypes) if variant(OPS[op], x) is not None]
        found += [Case(op, *rest) for rest in itertools.product(served, s_q or few, s_kv or keys)]
    if not found:
        raise ArgumentError(f"bench: dtype: expected a type that {', '.join(ops)} takes, got {dtype!r}")
    return found


def variant(spec: OpSpec, dtype: str) -> Mapping[str, str] | None:
    """The operator's types for keys of that type: the queries' is the same, or bfloat16 where that is not served."""
    if not spec.variants[0]:
        return spec.variants[0] if dtype == "float32" else None
    if any(tensor.packs for tensor in spec.inputs):
        return spec.variants[0] if dtype == "float8_e4m3fn" else None
    for queries in (dtype, "bfloat16"):
        for served in spec.variants:
            if served["T"] == queries and served.get("K", served["T"]) == dtype:
                return served
    return None


def make(case: Case, preset: Preset, device: Any, seed: int = 0) -> Workload:
    """Random inputs: the last `s_q` tokens of a causal sequence of `s_kv`, as `workload.make` has them.

    Parameters
    ----------
    case : Case
    preset : Preset
    device : torch.device or str
    seed : int

    Returns
    -------
    Workload
        torch tensors. fp8 and int8 keys of the indexer have a scale each.
    """
    import torch

    spec = OPS[case.op]
    types = variant(spec, case.dtype) or {}
    lengths = completed({"s_q": case.s_q, "s_kv": case.s_kv, **preset.lengths})
    rng = torch.Generator(device).manual_seed(seed)
    ke = torch.from_numpy(workload.causal_ends(case.s_q, case.s_kv)).to(device)
    inputs: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = tuple(lengths[d] for d in tensor.shape)
        scale = tensor.name.endswith("k_scale")
        if tensor.optional and not (scale and types["K"] in ("float8_e4m3fn", "int8")):
            continue
        if tensor.name == "ks":
            value = torch.zeros_like(ke)
        elif tensor.name == "ke":
            value = ke
        elif tensor.name == "indices":
            value = _random_indices(rng, ke, case.s_kv, preset.topk)
        elif scale:
            value = torch.empty(shape, device=device).uniform_(0.5, 2, generator=rng)
        elif tensor.packs:
            numbers = torch.randn((*shape[:-1], lengths[tensor.packs]), device=device, generator=rng)
            value = pack_mla_rows(numbers, preset.d_v)
        else:
            value = torch.randn(shape, device=device, generator=rng)
        if tensor.name == "weights":
            value *= preset.h_idx**-0.5 * preset.d_idx**-0.5 * (_INT8_SCALE**2 if case.dtype == "int8" else 1)
        if "d_qk" in tensor.shape and "h_q" in tensor.shape:
            value *= preset.q_spread
        if spec.dtype_of(tensor, types) == "int8":
            value = (value / _INT8_SCALE).round_().clamp_(-128, 127)
        if tensor.name == "logits":
            value.masked_fill_(torch.arange(case.s_kv, device=device) >= ke[:, None], -torch.inf)
        inputs[tensor.name] = value.to(getattr(torch, spec.dtype_of(tensor, types)))
    values = {"topk": preset.topk, "sm_scale": preset.sm_scale, "d_v": preset.d_v}
    return Workload(case.op, inputs, {a.name: values[a.name] for a in spec.attrs}, lengths)


def _random_indices(rng: Any, ke: Any, s_kv: int, topk: int) -> Any:
    import torch

    parts = []
    count = min(topk, s_kv)
    for stop in ke.split(256):
        chance = torch.rand((len(stop), s_kv), device=ke.device, generator=rng)
        chance.masked_fill_(torch.arange(s_kv, device=ke.device) >= stop[:, None], -1)
        chosen = chance.topk(count)
        # Ascending, with those that may not be seen behind, as `topk` gives them.
        rows = chosen.indices.masked_fill(chosen.values < 0, INT32_MAX).sort().values.int()
        rows = rows.masked_fill(rows == INT32_MAX, -1)
        parts.append(torch.nn.functional.pad(rows, (0, topk - count), value=-1))
    return torch.cat(parts)


def ranges(work: Workload) -> tuple[np.ndarray, np.ndarray]:
    """ks, ke of `workload.flops`. The attention alone is not told what is visible: what it is to attend to counts."""
    if "ke" in work.inputs:
        return work.inputs["ks"].cpu().numpy(), work.inputs["ke"].cpu().numpy()
    selected = (work.inputs["indices"] >= 0).sum(1).cpu().numpy()
    return 0 * selected, selected


def traffic(work: Workload) -> int:
    """Bytes that any implementation must move: every input once, and every output once.

    Of the latent rows, those count that some query selects; of `topk`'s logits, those that are visible. Where the
    selection is not known yet, that of a single query stands for all.

    Parameters
    ----------
    work : Workload
        Of `make`.
    """
    lengths, (ks, ke) = work.lengths, ranges(work)
    total = 0
    for name, x in work.inputs.items():
        elements = x.numel()
        if name == "logits":
            elements = int(np.maximum(ke.astype(np.int64) - ks, 0).sum())
        elif name == "kv" and work.op in ("sparse_mla", "sparse_mla_fp8"):
            elements = x.shape[1] * int((work.inputs["indices"].unique() >= 0).sum())
        elif name == "kv":
            elements = x.shape[1] * min(len(x), lengths["topk"])
        total += elements * x.element_size()
    first = work.inputs[work.spec.inputs[0].name].element_size()
    sizes = {"float32": 4, "int32": 4, "T": first}
    return total + sum(math.prod(lengths[d] for d in t.shape) * sizes[t.dtype] for t in work.spec.outputs)


def to_numpy(x: Any) -> np.ndarray:
    """A tensor as an array, its type from ml_dtypes where NumPy has none."""
    import torch

    carriers = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    x = x.detach().contiguous().cpu()
    if x.dtype not in carriers:
        return x.numpy()
    import ml_dtypes

    return x.view(carriers[x.dtype]).numpy().view(getattr(ml_dtypes, str(x.dtype).removeprefix("torch.")))


def sampled(work: Workload, rows: Sequence[int]) -> Workload:
    """Some queries of a workload, as arrays on the CPU."""
    inputs = {t.name: t for t in work.spec.inputs}
    kept = {n: x[list(rows)] if inputs[n].shape[0] == "s_q" else x for n, x in work.inputs.items()}
    arrays = {n: to_numpy(x) for n, x in kept.items()}
    return Workload(work.op, arrays, work.attrs, {**work.lengths, "s_q": len(rows)})
