"""Seeded inputs of the operators, the work that they cause, and the memory that they need.

The inputs are arrays, or torch tensors on the device that is measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..errors import ArgumentError
from ..ops import OPS
from ..presets import Preset
from ..runtime import machine
from ..runtime.packing import pack_mla_rows
from ..spec import INT32_MAX, OpSpec, TensorSpec, completed

#: The memory that a call and its check take at any size.
_SLACK_BYTES = 32 << 20
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
#: 1.0 in int8. Few normally distributed numbers leave the range then.
_INT8_SCALE = 1 / 40

#: The operators that are measured. They all compute something for queries.
OPERATORS = tuple(op for op, spec in OPS.items() if "s_q" in spec.dims)


class SizeError(ArgumentError):
    """The inputs do not fit into memory.

    Parameters
    ----------
    message : str
    needed : int
        Bytes that the call and its check take.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class Workload:
    """One call of one operator.

    Parameters
    ----------
    op : str
        Name of the operator.
    inputs : mapping
        The inputs by name: C-contiguous arrays, or torch tensors.
    attrs : mapping
        The attributes by name.
    lengths : mapping
        Length of every dimension by name.
    """

    op: str
    inputs: Mapping[str, Any]
    attrs: Mapping[str, Any]
    lengths: Mapping[str, int]

    @property
    def spec(self) -> OpSpec:
        """The operator."""
        return OPS[self.op]


def make(
    op: str,
    preset: Preset,
    s_q: int,
    s_kv: int,
    seed: int = 0,
    *,
    types: Mapping[str, str] | None = None,
    device: Any = None,
) -> Workload:
    """Random inputs: the last `s_q` tokens of a causal sequence of `s_kv`.

    Parameters
    ----------
    op : str
        Name of an operator.
    preset : Preset
    s_q, s_kv : int
        Query and key tokens, at least 1.
    seed : int
        Arrays and tensors of the same seed differ.
    types : mapping, optional
        Element types by type variable, one of the operator's variants; float32 by default. float8_e4m3fn and int8 keys
        of the indexer get a scale each.
    device : torch.device or str, optional
        Where to make torch tensors; arrays by default.

    Returns
    -------
    Workload
        Query m sees the keys ``[0, s_kv - s_q + m + 1)``.

    Raises
    ------
    SizeError
        As `expect_memory`, for arrays.
    ArgumentError
        A type that NumPy lacks, without the package ml_dtypes.
    """
    if device is None:
        expect_memory(op, preset, s_q, s_kv)
    source: _Source = _Arrays(seed) if device is None else _Tensors(seed, device)
    types = types or {}
    spec = OPS[op]
    lengths = completed({"s_q": s_q, "s_kv": s_kv, **preset.lengths})
    ends = source.put(causal_ends(s_q, s_kv))
    inputs: dict[str, Any] = {}
    for tensor in spec.inputs:
        scales_keys = tensor.name.endswith("k_scale")
        if tensor.optional and not (scales_keys and types.get("K") in ("float8_e4m3fn", "int8")):
            continue
        shape = tuple(lengths[d] for d in tensor.shape)
        dtype = spec.dtype_of(tensor, types)
        value: Any
        if tensor.name == "ks":
            value = source.put(np.zeros(shape, np.int32))
        elif tensor.name == "ke":
            value = ends
        elif tensor.name == "indices":
            value = source.indices(ends, s_kv, preset.topk)
        elif scales_keys:
            value = source.uniform(0.5, 2, shape)
        elif tensor.packs:
            value = pack_mla_rows(source.normal((*shape[:-1], lengths[tensor.packs])), preset.d_v)
        else:
            value = source.normal(shape)
        if tensor.name == "weights":
            value *= preset.h_idx**-0.5 * preset.d_idx**-0.5 * (_INT8_SCALE**2 if types.get("K") == "int8" else 1)
        if "d_qk" in tensor.shape and "h_q" in tensor.shape:
            value *= preset.q_spread
        if dtype == "int8":
            value = (value / _INT8_SCALE).round().clip(-128, 127)
        if tensor.name == "logits":
            source.hide(value, ends)
        inputs[tensor.name] = source.cast(value, dtype)
    values = {"topk": preset.topk, "sm_scale": preset.sm_scale, "d_v": preset.d_v}
    return Workload(op, inputs, {a.name: values[a.name] for a in spec.attrs}, lengths)


def expect_memory(op: str, preset: Preset, s_q: int, s_kv: int) -> None:
    """Find out whether a call of that size fits into memory: its inputs, its outputs and the check against float64.

    Raises
    ------
    SizeError
        The message says what is needed, what there is, and what limits it.
    """
    spec = OPS[op]
    lengths = completed({"s_q": s_q, "s_kv": s_kv, **preset.lengths})

    def size(tensors: Iterable[TensorSpec]) -> int:
        return 4 * sum(math.prod(lengths[d] for d in t.shape) for t in tensors)

    inputs = [t for t in spec.inputs if not t.optional]
    # The generator holds a tensor twice, and the reference converts all keys to float64.
    needed = _SLACK_BYTES + 2 * size(inputs) + size(spec.outputs) + 2 * size(t for t in inputs if t.shape[0] == "s_kv")
    if op in ("lightning_indexer", "indexer_topk", "dsa_attention"):
        # Three times the float64 scores of every head, for the sampled queries at a time or for one.
        needed += 3 * 8 * (min(s_q, 3) if op == "lightning_indexer" else 1) * lengths["h_idx"] * s_kv
    if op in ("indexer_topk", "dsa_attention"):
        # The logits that the indexer holds for the selector.
        needed += 4 * min(s_q, 32 * machine.usable_cpus()) * s_kv
    left = machine.memory()
    if max(s_q, s_kv) > INT32_MAX or needed > left.bytes:
        raise SizeError(
            f"{op}: s_q, s_kv: expected inputs that fit into memory, got {s_q} and {s_kv}, which take "
            f"{machine.in_units(needed)} of {left}",
            needed,
        )


def causal_ends(s_q: int, s_kv: int) -> np.ndarray:
    """How many keys each of the last `s_q` tokens of a sequence of `s_kv` sees, itself included: ke, [s_q] int32."""
    return np.clip(np.arange(s_q) + (s_kv - s_q + 1), 0, s_kv).astype(np.int32)


def repeated_keys(spec: OpSpec, inputs: Mapping[str, Any], period: int) -> dict[str, Any]:
    """Inputs of whose keys only the first `period` differ: the others repeat them, as they do for a repetitive text.

    Parameters
    ----------
    spec : OpSpec
    inputs : mapping
        Arrays by name, None for an optional one that is left out; others than the operator's inputs stay as they are.
    period : int
        At least 1.
    """
    found = dict(inputs)
    for tensor in spec.inputs:
        x = found.get(tensor.name)
        if "s_kv" in tensor.shape and x is not None:
            axis = tensor.shape.index("s_kv")
            found[tensor.name] = np.take(x, np.arange(x.shape[axis]) % period, axis)
    return found


def variant(spec: OpSpec, dtype: str) -> Mapping[str, str] | None:
    """The operator's types for keys of that type: the queries' is the same, or bfloat16 where that is not served.

    None if the operator has none for them, and where it has no choice of types, unless `dtype` is float32.
    """
    if not spec.variants[0]:
        return spec.variants[0] if dtype == "float32" else None
    if any(tensor.packs for tensor in spec.inputs):
        return spec.variants[0] if dtype == "float8_e4m3fn" else None
    for queries in (dtype, "bfloat16"):
        for served in spec.variants:
            if served["T"] == queries and served.get("K", served["T"]) == dtype:
                return served
    return None


def types_on_cpu(op: str, dtype: str) -> Mapping[str, str] | None:
    """As `variant`, but with operators that have no choice, or queries of that type: a CPU has one table for a type."""
    spec = OPS[op]
    queries = next((served for served in spec.variants if served.get("T", dtype) == dtype), None)
    found = variant(spec, dtype)
    return queries if found is None else found


def serves(op: str, dtype: str) -> bool:
    """Whether a CPU's table for a type has an operator."""
    return types_on_cpu(op, dtype) is not None


def widened(work: Workload) -> Workload:
    """The same numbers in float32, for peers that take nothing else. Keys are multiplied by their scales."""
    names = {t.name for t in work.spec.inputs if t.dtype in ("T", "K")}
    inputs = {n: to_numpy(x).astype(np.float32, copy=False) if n in names else x for n, x in work.inputs.items()}
    for scales in [n for n in inputs if n.endswith("k_scale")]:
        keys = scales.removesuffix("_scale")
        inputs[keys] = inputs[keys] * inputs.pop(scales)[:, None]
    return replace(work, inputs=inputs)


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in ("T", "K") or str(x.dtype) == dtype:  # float32 where the caller names no types
        return x
    if dtype not in ("bfloat16", "float8_e4m3fn"):
        return x.astype(dtype)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ArgumentError(f"dtype: {dtype}: expected the package ml_dtypes, got none; pip install it") from error
    return x.astype(getattr(ml_dtypes, dtype))


def flops(op: str, lengths: Mapping[str, int], ks: np.ndarray, ke: np.ndarray) -> int:
    """Floating-point operations that the formula asks for: visible keys in the indexer, selected ones in the attention.

    Parameters
    ----------
    op : str
        Name of the operator; `topk` has none.
    lengths : mapping
        Head sizes and topk by dimension name.
    ks, ke : ndarray [s_q], int32

    Returns
    -------
    int
        A multiplication and an addition count as two.
    """
    visible = np.maximum(ke.astype(np.int64) - ks, 0)
    count = 0
    if op in ("lightning_indexer", "indexer_topk", "dsa_attention"):
        count += 2 * lengths["h_idx"] * lengths["d_idx"] * int(visible.sum())
    if op in ("sparse_mla", "sparse_mla_fp8", "dsa_attention"):
        selected = int(np.minimum(visible, lengths["topk"]).sum())
        count += 2 * lengths["h_q"] * (lengths["d_qk"] + lengths["d_v"]) * selected
    return count


def ranges(work: Workload) -> tuple[np.ndarray, np.ndarray]:
    """First and last visible keys for `flops`: ks and ke, [s_q] int32 each.

    The attention alone is not told what is visible: what it is given to attend to counts.
    """
    if "ke" in work.inputs:
        return to_numpy(work.inputs["ks"]), to_numpy(work.inputs["ke"])
    selected = to_numpy((work.inputs["indices"] >= 0).sum(1))
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
        elements = math.prod(x.shape)
        if name == "logits":
            elements = int(np.maximum(ke.astype(np.int64) - ks, 0).sum())
        elif name == "kv":
            elements = x.shape[1] * (
                _selected(to_numpy(work.inputs["indices"]), len(x))
                if "indices" in work.inputs
                else min(len(x), lengths["topk"])
            )
        total += elements * x.itemsize
    first = work.inputs[work.spec.inputs[0].name].itemsize
    sizes = {"float32": 4, "int32": 4, "T": first}
    return total + sum(math.prod(lengths[d] for d in t.shape) * sizes[t.dtype] for t in work.spec.outputs)


def _selected(indices: np.ndarray, rows: int) -> int:
    """The number of rows that at least one query selects."""
    found = np.zeros(rows, bool)
    found[indices[indices >= 0]] = True
    return int(found.sum())


def to_numpy(x: Any) -> np.ndarray:
    """A torch tensor as an array, with a type of ml_dtypes where NumPy has none. Arrays are returned unchanged."""
    if isinstance(x, np.ndarray):
        return x
    import torch

    carriers = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    x = x.detach().contiguous().cpu()
    if x.dtype not in carriers:
        return x.numpy()
    import ml_dtypes

    return x.view(carriers[x.dtype]).numpy().view(getattr(ml_dtypes, str(x.dtype).removeprefix("torch.")))


def load_notes() -> list[str]:
    """A line for a report of times if other processes keep the CPUs busy, otherwise nothing."""
    load, cpus = os.getloadavg()[0], machine.usable_cpus()
    if load < cpus / 2:
        return []
    return [f"the load average was {load:.1f} on {cpus} CPUs before this began: the times may be disturbed"]


class _Source(Protocol):
    """What `make` needs of NumPy and of torch."""

    def put(self, x: np.ndarray) -> Any:
        """The same numbers there."""

    def normal(self, shape: tuple[int, ...]) -> Any:
        """float32 of mean 0 and variance 1."""

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> Any:
        """float32."""

    def indices(self, ends: Any, s_kv: int, topk: int) -> Any:
        """[s_q, topk] int32: in each row different keys below its end, ascending, and -1 behind."""

    def hide(self, logits: Any, ends: Any) -> None:
        """-inf from each row's end on."""

    def cast(self, x: Any, dtype: str) -> Any:
        """The nearest numbers of that type."""


class _Arrays:
    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def put(self, x: np.ndarray) -> np.ndarray:
        return x

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return self._rng.standard_normal(shape, np.float32)

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
        return self._rng.uniform(low, high, shape).astype(np.float32)

    def indices(self, ends: np.ndarray, s_kv: int, topk: int) -> np.ndarray:
        indices = np.full((len(ends), topk), -1, np.int32)
        for row, stop in zip(indices, ends, strict=True):
            count = min(int(stop), topk)
            row[:count] = np.sort(self._rng.choice(int(stop), count, replace=False)) if count else ()
        return indices

    def hide(self, logits: np.ndarray, ends: np.ndarray) -> None:
        logits[np.arange(logits.shape[1]) >= ends[:, None]] = -np.inf

    def cast(self, x: np.ndarray, dtype: str) -> np.ndarray:
        return _cast(x, dtype)


class _Tensors:
    def __init__(self, seed: int, device: Any) -> None:
        import torch

        self._torch, self._device = torch, device
        self._rng = torch.Generator(device).manual_seed(seed)

    def put(self, x: np.ndarray) -> Any:
        return self._torch.from_numpy(x).to(self._device)

    def normal(self, shape: tuple[int, ...]) -> Any:
        return self._torch.randn(shape, device=self._device, generator=self._rng)

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> Any:
        return self._torch.empty(shape, device=self._device).uniform_(low, high, generator=self._rng)

    def indices(self, ends: Any, s_kv: int, topk: int) -> Any:
        torch = self._torch
        parts = []
        count = min(topk, s_kv)
        for stop in ends.split(256):
            chance = torch.rand((len(stop), s_kv), device=self._device, generator=self._rng)
            self._hide(chance, stop, -1)
            chosen = chance.topk(count)
            # Positions that a query may not see sort behind all others.
            rows = chosen.indices.masked_fill(chosen.values < 0, INT32_MAX).sort().values.int()
            rows = rows.masked_fill(rows == INT32_MAX, -1)
            parts.append(torch.nn.functional.pad(rows, (0, topk - count), value=-1))
        return torch.cat(parts)

    def hide(self, logits: Any, ends: Any) -> None:
        self._hide(logits, ends, -self._torch.inf)

    def _hide(self, x: Any, ends: Any, value: float) -> None:
        x.masked_fill_(self._torch.arange(x.shape[1], device=self._device) >= ends[:, None], value)

    def cast(self, x: Any, dtype: str) -> Any:
        return x if dtype in ("T", "K") else x.to(getattr(self._torch, dtype))
