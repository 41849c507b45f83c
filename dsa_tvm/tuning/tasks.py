"""What is tuned: one operator at one size on one target, with the inputs for timing and those for checking."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..benchmark import workload
from ..benchmark.workload import Workload
from ..errors import ArgumentError
from ..gpu.architectures import is_arch
from ..ops import OPS
from ..presets import Preset
from ..records import selection
from ..spec import INT32_MAX, completed
from ..terminal.text import size_of

#: More than any core loads from its first-level cache: two loads of 64 bytes per cycle at 4 GHz.
_LOAD_BYTES_PER_SECOND = 512e9

#: Element types of an operator's type variables, in order.
Types = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One operator at one size.

    Parameters
    ----------
    op : str
        Name of a kernel's operator.
    target : str
    preset : Preset
        The model's sizes.
    s_q, s_kv : int
    element_types : tuple of str, optional
        The types to time, in the order of the operator's type variables. By default those of the first variant,
        float32.
    """

    op: str
    target: str
    preset: Preset
    s_q: int
    s_kv: int
    element_types: tuple[str, ...] | None = None

    @property
    def variant(self) -> Mapping[str, str]:
        """The element types by type variable."""
        variants = OPS[self.op].variants
        return variants[0] if self.element_types is None else dict(zip(variants[0], self.element_types, strict=True))

    @property
    def types(self) -> tuple[str, ...]:
        """The element types in the order of the operator's type variables."""
        return tuple(self.variant.values())

    @property
    def stage(self) -> str:
        """Which of the operator's kernels is tuned; "" on CPUs, where there is only one."""
        return selection.of(self.target).stage_of(self.op, self.shape, self.target, self.types)

    @property
    def family(self) -> tuple:
        """Identifies the kernel. Tasks of one family share it, so its decisions have to hold for all of them."""
        sizes = () if is_arch(self.target) else (self.s_q, self.s_kv)
        return (self.op, self.target, self.types, self.preset, self.stage, *sizes)

    @property
    def shape(self) -> dict[str, int]:
        """The length of each dimension of the operator."""
        lengths = completed({"s_q": self.s_q, "s_kv": self.s_kv, **self.preset.lengths})
        return {name: lengths[name] for name in OPS[self.op].dims}

    @property
    def title(self) -> str:
        """The name of the task in messages."""
        return " ".join((self.op, *dict.fromkeys(self.element_types or ()), f"{self.s_q}x{self.s_kv}"))

    def inputs(self) -> Workload:
        """The inputs on which candidates are timed."""
        return self._scaled(workload.make(self.op, self.preset, self.s_q, self.s_kv))

    def _scaled(self, work: Workload) -> Workload:
        """The same inputs, with a scale for each key if keys of this type have one."""
        if self.variant.get("K") != "float8_e4m3fn":
            return work
        scale = np.random.default_rng(0).uniform(0.5, 2, work.lengths["s_kv"]).astype(np.float32)
        return replace(work, inputs={**work.inputs, "k_scale": scale})

    def roof(self, gflops: Mapping[int, float]) -> dict[int, float]:
        """The fewest seconds that a call can take, by number of threads.

        Parameters
        ----------
        gflops : mapping
            The machine's multiply-add limit by number of threads.
        """
        ke = workload.causal_ends(self.s_q, self.s_kv)
        flops = workload.flops(self.op, {**self.shape, "topk": self.preset.topk}, np.zeros_like(ke), ke)
        loaded = 4 * self.s_q * self.s_kv if self.op == "topk" else 0
        return {n: max(flops / rate / 1e9, loaded / _LOAD_BYTES_PER_SECOND / n) for n, rate in gflops.items()}


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Parameters
    ----------
    threads : tuple of int
    seconds : float
        For each number of threads, DEFAULT and candidate together.
    rounds : tuple of int
        The fewest and the most turns.
    """

    threads: tuple[int, ...]
    seconds: float
    rounds: tuple[int, int]


def variants_of(op: str, types: Sequence[str], default: Sequence[Types | None]) -> Sequence[Types | None]:
    """The element types that an operator is tuned in.

    Parameters
    ----------
    op : str
        Key of `OPS`.
    types : sequence of str
        The element types of queries that the user asked for.
    default : sequence of tuple of str
        Used if the user asked for nothing, or the operator has no choice.
    """
    variants = OPS[op].variants
    if not types or not variants[0]:
        return default
    return [tuple(variant.values()) for variant in variants if variant["T"] in types]


def parse_shape(text: str) -> tuple[int, int]:
    """Parse a size such as ``1x32768`` into s_q and s_kv.

    Raises
    ------
    ArgumentError
        `text` is not such a size.
    """
    size = size_of(text)
    if size is None or not all(1 <= n <= INT32_MAX for n in size):
        raise ArgumentError(f"tune: shapes: expected S_QxS_KV such as 1x32768, got {reprlib.repr(text)}")
    return size


def irregular(task: Task, s_q: int = 5, s_kv: int = 0, seed: int = 1) -> Workload:
    """Small inputs that reveal a wrong kernel: lengths that no tile divides, ties, empty and inner ranges, -1 and NaN.

    Every candidate must agree with the float64 reference on them before its time counts.

    Parameters
    ----------
    task : Task
    s_q, s_kv : int
        At least 5 and 3001. The default of s_kv exercises everything that a CPU kernel does.
    seed : int
    """
    rng = np.random.default_rng(seed)
    preset = task.preset
    heads = replace(preset, h_idx=max(preset.h_idx - 3, 1), h_q=max(preset.h_q - 3, 1))
    # A row has to be longer than the list that top-k collects before it cuts.
    s_kv = s_kv or (20011 if task.op == "topk" else 3001)
    work = workload.make(task.op, replace(heads, topk=min(preset.topk, 389)), s_q, s_kv, seed)
    inputs = {name: x.copy() for name, x in work.inputs.items()}
    if "ks" in inputs:
        # An inner range, an empty range, one key, and an end in the tail block.
        inputs["ks"][:5] = (7, 1500, 2990, 3000, 0)
        inputs["ke"][:5] = (2001, 1500, 2991, s_kv, s_kv)
    if task.op == "lightning_indexer":
        inputs["k"][1999] = np.nan
    if task.op == "topk":
        inputs["logits"] = _hard_logits(rng, inputs["logits"].shape)
    if task.op in ("sparse_mla", "sparse_mla_fp8"):
        indices = inputs["indices"]
        indices[0, ::3] = -1
        indices[1] = -1
        indices[2, 1:] = s_kv
        # In a packed row, these bytes are NaN in every part.
        nan = 0xFF if inputs["kv"].dtype == np.uint8 else np.nan
        inputs["kv"][np.setdiff1d(np.arange(s_kv), indices)] = nan
    return task._scaled(replace(work, inputs=inputs))


def repetitive(task: Task) -> Workload:
    """Keys that repeat. They reveal a kernel that adds too many terms one after the other."""
    work = workload.make(task.op, task.preset, 2, 2 * task.preset.topk)
    return task._scaled(replace(work, inputs=workload.repeated_keys(work.spec, work.inputs, 3)))


def checks(task: Task) -> list[Workload]:
    """The inputs on which candidates are checked before they are timed. Together they run all code of a kernel."""
    if not is_arch(task.target):
        return [irregular(task), repetitive(task)]
    # Few and many queries launch different kernels of a GPU. With few, the keys are cut into parts. Not `repetitive`:
    # 16-bit attention rounds small weights there, and equal errors add up to more than the tolerance.
    sizes = {
        "lightning_indexer": ((5, 3001), (4099, 5003)),
        "topk": ((5, 20011), (5, 9001)),
        "sparse_mla": ((5, 3001), (299, 3001)),
        "sparse_mla_fp8": ((5, 3001), (299, 3001)),
    }
    return [irregular(task, *size) for size in sizes[task.op]]


def _hard_logits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    logits = rng.standard_normal(shape).astype(np.float32)
    logits[0] = np.round(logits[0] * 4) / 4  # ties, signed zeros among them
    logits[3:, ::5] = np.nan
    logits[4] = np.sort(logits[4])  # NaN last; ascending is the worst order for a scan
    logits[4, 100:200] = -np.inf
    return logits
