"""Which calls are measured: one size varied at a time, from one call that all have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...ops import OPS
from ...presets import Preset
from ...runtime import machine
from .. import workload

#: What is varied, in the order of the report.
VARIED = ("s_kv", "s_q", "topk", "threads")
#: The call that the others differ from in one size. topk is the model's, threads are those of the machine.
_BASE = {"s_q": 1, "s_kv": 32768}


def _doubled(first: int, last: int) -> list[int]:
    values = [first]
    while values[-1] * 2 <= last:
        values.append(values[-1] * 2)
    return values


@dataclass(frozen=True)
class Point:
    """One call.

    Parameters
    ----------
    op : str
    s_q, s_kv, topk, threads : int
    """

    op: str
    s_q: int
    s_kv: int
    topk: int
    threads: int

    @property
    def sizes(self) -> tuple:
        """What its inputs depend on."""
        return self.op, self.s_q, self.s_kv, self.topk

    def preset(self, preset: Preset) -> Preset:
        """The model's sizes with the point's topk."""
        return replace(preset, topk=self.topk)

    def amount(self, preset: Preset) -> int:
        """Operations of the formula, or logits that are looked at where it has none."""
        ke = workload.causal_ends(self.s_q, self.s_kv)
        lengths = self.preset(preset).lengths
        return workload.flops(self.op, lengths, np.zeros_like(ke), ke) or int(ke.astype(np.int64).sum())


@dataclass(frozen=True)
class Sweep:
    """The points of an operator that differ in one size.

    Parameters
    ----------
    op, varied : str
    base : Point
        Where the line of the operation count begins.
    points : sequence of Point
        By size, ascending; `base` is among them.
    """

    op: str
    varied: str
    base: Point
    points: Sequence[Point]

    def line(self, point: Point, seconds: float, preset: Preset) -> float:
        """The seconds of a point if time grew as the operations do: `seconds` are those of `base`."""
        operations = point.amount(preset) / self.base.amount(preset)
        return seconds * operations * self.base.threads / point.threads


def sweeps(ops: Sequence[str], given: Mapping[str, Sequence[int]], preset: Preset) -> list[Sweep]:
    """What is measured.

    Parameters
    ----------
    ops : sequence of str
    given : mapping
        Values of what is in `VARIED`; nothing, or no value, for the usual ones. A single value is kept in all calls.
    preset : Preset
    """
    cpus = machine.usable_cpus()
    usual = {
        "s_kv": _doubled(2048, 524288),
        "s_q": _doubled(1, 128),
        "topk": _doubled(256, 4096),
        "threads": sorted({*_doubled(1, cpus), cpus}),
    }
    values = {name: sorted(set(given.get(name) or usual[name])) for name in VARIED}
    wanted = {**_BASE, "topk": preset.topk, "threads": cpus}
    base = {name: wanted[name] if wanted[name] in values[name] else values[name][0] for name in VARIED}
    found = []
    for op in ops:
        start = Point(op, **base)
        for name in VARIED:
            # The indexer selects nothing.
            if len(values[name]) > 1 and (name != "topk" or "topk" in OPS[op].dims):
                points = [Point(op, **(base | {name: value})) for value in values[name]]
                found.append(Sweep(op, name, start, points))
    return found
