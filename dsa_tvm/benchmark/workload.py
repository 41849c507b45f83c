"""Seeded inputs of the operators, how much work they are, and how much memory is there for them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..ops import OPS
from ..presets import Preset
from ..runtime import machine
from ..runtime.packing import pack_mla_rows
from ..spec import INT32_MAX, OpSpec, TensorSpec, completed

#: What a call and its check take beside what grows with its size.
_SLACK_BYTES = 32 << 20
DTYPES = ("float32", "bfloat16", "float16")

#: The operators that are measured: those that compute something for queries.
OPERATORS = tuple(op for op, spec in OPS.items() if "s_q" in spec.dims)


class SizeError(ArgumentError):
    """Inputs that memory does not hold.

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
        The inputs by name: C-contiguous arrays, float32 (or `with_dtype`), int32 and bytes; on a GPU, torch tensors.
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


def make(op: str, preset: Preset, s_q: int, s_kv: int, seed: int = 0) -> Workload:
    """Random inputs: the last `s_q` tokens of a causal sequence of `s_kv`.

    Parameters
    ----------
    op : str
        Name of an operator.
    preset : Preset
    s_q, s_kv : int
        Query and key tokens, at least 1.
    seed : int

    Returns
    -------
    Workload
        float32. Query m sees the keys ``[0, s_kv - s_q + m + 1)``.

    Raises
    ------
    SizeError
        As `expect_memory`.
    """
    expect_memory(op, preset, s_q, s_kv)
    spec = OPS[op]
    lengths = completed({"s_q": s_q, "s_kv": s_kv, **preset.lengths})
    required = [t for t in spec.inputs if not t.optional]
    rng = np.random.default_rng(seed)
    ke = causal_ends(s_q, s_kv)
    inputs = {}
    for tensor in required:
        shape = tuple(lengths[d] for d in tensor.shape)
        value: Any
        if tensor.name == "ks":
            value = np.zeros(shape, np.int32)
        elif tensor.name == "ke":
            value = ke
        elif tensor.name == "indices":
            value = _random_indices(rng, ke, s_kv, preset.topk)
        elif tensor.packs:
            numbers = rng.standard_normal((*shape[:-1], lengths[tensor.packs]), np.float32)
            value = pack_mla_rows(numbers, preset.d_v)
        else:
            value = rng.standard_normal(shape, np.float32)
        if tensor.name == "weights":
            value *= np.float32(preset.h_idx**-0.5 * preset.d_idx**-0.5)
        if "d_qk" in tensor.shape and "h_q" in tensor.shape:
            value *= np.float32(preset.q_spread)
        if tensor.name == "logits":
            value[np.arange(s_kv) >= ke[:, None]] = -np.inf
        inputs[tensor.name] = value
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
    # The generator holds a tensor twice; the reference takes all keys in float64.
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


def serves(op: str, dtype: str) -> bool:
    """Whether an operator has a variant with that type for its first input, or no choice of types."""
    return any(variant.get("T", dtype) == dtype for variant in OPS[op].variants)


def with_dtype(work: Workload, dtype: str) -> Workload:
    """The same inputs rounded to another element type, where the operator has a choice.

    Raises
    ------
    ArgumentError
        An unknown type, or bfloat16 without the package ml_dtypes.
    """
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "float32":
        return work
    numpy_type: Any = np.float16
    if dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ArgumentError("dtype: bfloat16: expected the package ml_dtypes, got none; pip install it") from error
        numpy_type = ml_dtypes.bfloat16
    free = {t.name for t in work.spec.inputs if t.dtype in ("T", "K")}
    return replace(work, inputs={n: x.astype(numpy_type) if n in free else x for n, x in work.inputs.items()})


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


def load_notes() -> list[str]:
    """A line for a report of times where other processes keep the CPUs busy, else nothing."""
    load, cpus = os.getloadavg()[0], machine.usable_cpus()
    if load < cpus / 2:
        return []
    return [f"the load average was {load:.1f} on {cpus} CPUs before this began: the times may be disturbed"]


def _random_indices(rng: np.random.Generator, ke: np.ndarray, s_kv: int, topk: int) -> np.ndarray:
    indices = np.full((len(ke), topk), -1, np.int32)
    for row, stop in zip(indices, ke, strict=True):
        count = min(int(stop), topk)
        row[:count] = np.sort(rng.choice(int(stop), count, replace=False)) if count else ()
    return indices
