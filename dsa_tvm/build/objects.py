"""TVM compiles TensorIR to object files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from ..records.selection.cpu import Row
from ..schedules import CPU, CPU_TARGETS, chain, cpu_kernel, cpu_variants
from . import registers
from .kernel_table import Kernels
from .plan import Plan, Types


@dataclass(frozen=True)
class Compiled:
    """The kernels of one target.

    Parameters
    ----------
    object : Path
        The object file with all of them.
    kernels : mapping
        The rows of the table by operator.
    """

    object: Path
    kernels: Mapping[str, Sequence[Kernels]]


def symbol(op: str, types: Iterable[str], target: str, suffix: str) -> str:
    """Name of a kernel. It includes the target, because objects of several targets are linked together."""
    return "__".join((op, *types, target.replace("-", "_"), suffix))


def write_object(functions: Mapping[str, tvm.tirx.PrimFunc], target: str, path: Path) -> None:
    """Compile kernels, given by symbol, for a CPU target into one object file."""
    tvm_target = tvm.target.Target(CPU_TARGETS[target])
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    with tvm_target:
        executable = tvm.compile(module, target=tvm_target, tir_pipeline=registers.PIPELINE)
    executable.mod.write_to_file(str(path), "o")


def _added(
    functions: dict[str, tvm.tirx.PrimFunc], op: str, variant: Mapping[str, str], target: str, decisions: Any
) -> str:
    """The symbol of a kernel in `functions`. The kernel is added unless one with equal code is there."""
    function = cpu_kernel(op, variant, target, decisions)
    for name, known in functions.items():
        if tvm_ffi.structural_equal(known, function):
            return name
    name = symbol(op, variant.values(), target, str(len(functions)))
    functions[name] = function
    return name


def shared(rows_of: Mapping[Types, Sequence[Row]]) -> list[tuple[Sequence[Row], list[Types]]]:
    """Each distinct table once, with the element types that use it."""
    found: list[tuple[Sequence[Row], list[Types]]] = []
    for types, rows in rows_of.items():
        known = next((sharing for table, sharing in found if table == rows), None)
        if known is None:
            found.append((rows, [types]))
        else:
            known.append(types)
    return found


def compile_objects(plan: Plan, directory: Path, progress: Callable[[str], None]) -> dict[str, Compiled]:
    """Compile every kernel of a plan. Equal code is compiled once: not every decision shapes the code.

    Parameters
    ----------
    plan : mapping
        Rows by target, operator and element types.
    directory : Path
        Receives ``<target>.o``.
    progress : callable
        Takes a line of text for every target.

    Returns
    -------
    dict
        `Compiled` by target.
    """
    built = {}
    for target, tables in plan.items():
        functions: dict[str, tvm.tirx.PrimFunc] = {}
        kernels: dict[str, list[Kernels]] = {}
        for op, rows_of in tables.items():
            kernels[op] = []
            variants = {tuple(variant.values()): variant for variant in cpu_variants(op, target)}
            for rows, sharing in shared(rows_of):
                for row in rows:
                    decisions = CPU[op].Decisions(**row.decisions)
                    symbols = {t: _added(functions, op, variants[t], target, decisions) for t in sharing}
                    kernels[op].append(Kernels(row.s_q_max, row.s_kv_max, decisions, symbols))
        progress(f"compiling {len(functions)} kernels for {target}")
        path = directory / f"{target}.o"
        write_object(functions, target, path)
        built[target] = Compiled(path, kernels)
    return built


def tables(target: str, built: Mapping[str, Compiled]) -> dict[str, list[Kernels]]:
    """The complete tables of a target: its own rows, followed by those of its bases."""
    parts = [built[t].kernels for t in chain(target)]
    return {op: [row for kernels in parts for row in kernels.get(op, ())] for op in CPU}
