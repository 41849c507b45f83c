"""The search space of a kernel: a schedule function that samples decisions for a search, or replays given ones.

Our decisions shape the code (tile sizes, unrolling, work of a task). So they are arguments of a kernel factory, and not
primitives that are applied to a finished PrimFunc. MetaSchedule therefore schedules a stand-in with one block. Each
decision is sampled there and noted as an annotation, and the factory turns the decisions into the kernel. Every
decision is one of a list; MetaSchedule calls that categorical.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import tvm
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import Instruction, Trace
from tvm.script import tirx as T

#: A kernel module, or an object with the same names: Decisions, DEFAULT, choices, and perhaps a `check` of decisions
#: that raises ValueError.
Module = Any

_BLOCK = "decisions"
_SAMPLE = "SampleCategorical"


def values(module: Module, target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision of a kernel module on `target`, ascending. They include the default."""
    default = asdict(module.DEFAULT[target])
    choices = module.choices(target)
    return {f.name: tuple(sorted({*choices[f.name], default[f.name]})) for f in fields(module.Decisions)}


def stand_in(op: str) -> tvm.IRModule:
    """The module that MetaSchedule searches in place of `op`."""

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((1,), "float32")):  # type: ignore[valid-type]
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for i in range(1):
            with T.sblock(_BLOCK):
                v = T.axis.spatial(1, i)
                x[v] = T.float32(0)

    return tvm.IRModule({"main": main.with_attr("dsa_tvm.op", op)})


def apply(sch: Schedule, choices: Mapping[str, tuple[int, ...]], decisions: Mapping[str, int] | None = None) -> None:
    """The schedule function. It notes a value for every decision.

    Parameters
    ----------
    sch : Schedule
        The schedule of a `stand_in`.
    choices : mapping
        The result of `values`.
    decisions : mapping, optional
        Values to replay. Without them every decision is sampled uniformly.

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
    """The sampling instructions of a trace, in the order of the choices."""
    return [instruction for instruction in trace.insts if instruction.kind.name == _SAMPLE]


def decisions_of(trace: Trace, choices: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The decisions in a trace of `apply`."""
    picked = (int(trace.decisions[instruction]) for instruction in samples(trace))
    return {name: candidates[i] for (name, candidates), i in zip(choices.items(), picked, strict=True)}


def expect_within(module: Module, target: str, decisions: Mapping[str, int]) -> None:
    """Check decisions that no search of this version may have proposed, such as those of an old record.

    Raises
    ------
    ValueError
        The kernel does not accept them, or a value is beyond those that a search tries.
    """
    kernel_decisions(module, decisions)
    for name, tried in values(module, target).items():
        # A zero that divides what it must would end a user's process.
        if not tried[0] <= decisions[name] <= tried[-1]:
            raise ValueError(f"{name}: expected {tried[0]}..{tried[-1]}, got {decisions[name]}")


def is_legal(module: Module, decisions: Mapping[str, int]) -> bool:
    """Whether the kernel factory accepts these decisions."""
    try:
        kernel_decisions(module, decisions)
    except ValueError:
        return False
    return True


def kernel_decisions(module: Module, decisions: Mapping[str, int]) -> Any:
    """Convert decisions to the dataclass of the kernel factory.

    Raises
    ------
    ValueError
        The names are not those of the dataclass, or the kernel does not accept the values.
    """
    expected = [f.name for f in fields(module.Decisions)]
    if sorted(expected) != sorted(decisions):
        raise ValueError(f"decisions: expected {', '.join(expected)}, got {', '.join(decisions) or 'none'}")
    made = module.Decisions(**decisions)
    # Some limits depend on more than the decisions: on element types, or on the memory of a GPU.
    if check := getattr(module, "check", None):
        check(made)
    return made
