"""The search space of a kernel: one schedule function that samples decisions for a search and replays given ones.

Our decisions shape the code (tile sizes, unrolling, what a task takes), so they are arguments of a kernel factory, not
primitives applied to a finished PrimFunc. MetaSchedule therefore schedules a stand-in of one block, on which each
decision is sampled and noted; the factory turns the noted decisions into the kernel, with static or symbolic lengths
alike. Every decision is one of a list, in MetaSchedule's terms categorical.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import tvm
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import Instruction, Trace
from tvm.script import tirx as T

#: A kernel module, or what has the same of it: Decisions, DEFAULT and choices, and perhaps a check of made decisions
#: that raises ValueError.
Module = Any

_BLOCK = "decisions"
_SAMPLE = "SampleCategorical"


def values(module: Module, target: str) -> dict[str, tuple[int, ...]]:
    """What each decision of a kernel module may be on `target`, ascending; the default's value is always among them."""
    default = asdict(module.DEFAULT[target])
    choices = module.choices(target)
    return {f.name: tuple(sorted({*choices[f.name], default[f.name]})) for f in fields(module.Decisions)}


def stand_in(op: str) -> tvm.IRModule:
    """The workload of a search for `op`."""

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((1,), "float32")):  # type: ignore[valid-type]
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for i in range(1):
            with T.sblock(_BLOCK):
                v = T.axis.spatial(1, i)
                x[v] = T.float32(0)

    return tvm.IRModule({"main": main.with_attr("dsa_tvm.op", op)})


def apply(sch: Schedule, choices: Mapping[str, tuple[int, ...]], decisions: Mapping[str, int] | None = None) -> None:
    """The schedule function: note a value for every decision.

    Parameters
    ----------
    sch : Schedule
        Of a `stand_in`.
    choices : mapping
        What `values` returned.
    decisions : mapping, optional
        Replay these, by value; without them every decision is sampled uniformly.

    Raises
    ------
    ValueError
        A given decision is not among the choices.
    """
    block = sch.get_sblock(_BLOCK, func_name="main")
    for name, candidates in choices.items():
        chosen = None if decisions is None else candidates.index(decisions[name])
        sampled = sch.sample_categorical(list(candidates), [1 / len(candidates)] * len(candidates), decision=chosen)
        sch.annotate(block, f"dsa_tvm.{name}", sampled)


def samples(trace: Trace) -> list[Instruction]:
    """The instructions of a trace that chose something, in the order of the choices."""
    return [instruction for instruction in trace.insts if instruction.kind.name == _SAMPLE]


def decisions_of(trace: Trace, choices: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What a trace of `apply` chose."""
    picked = (int(trace.decisions[instruction]) for instruction in samples(trace))
    return {name: candidates[i] for (name, candidates), i in zip(choices.items(), picked, strict=True)}


def is_legal(module: Module, decisions: Mapping[str, int]) -> bool:
    """Whether the kernel factory takes these decisions."""
    try:
        kernel_decisions(module, decisions)
    except ValueError:
        return False
    return True


def kernel_decisions(module: Module, decisions: Mapping[str, int]) -> Any:
    """The decisions as the factory's dataclass.

    Raises
    ------
    ValueError
        Names that are not those of the dataclass, or values that do not divide.
    """
    expected = [f.name for f in fields(module.Decisions)]
    if sorted(expected) != sorted(decisions):
        raise ValueError(f"decisions: expected {', '.join(expected)}, got {', '.join(decisions) or 'none'}")
    made = module.Decisions(**decisions)
    # What is not decided by the decisions alone: element types, or how much memory a GPU has.
    if check := getattr(module, "check", None):
        check(made)
    return made
