"""Which decisions a library's kernels are compiled with: the best measured ones by size, DEFAULT elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from types import ModuleType

from ..errors import BuildError
from ..presets import Preset
from ..records import Record
from ..records.choice import Row, choose
from ..schedules import BASES, CPU, CPU_TARGETS, cpu_variants, space

#: Target to operator to rows, of which the last takes all calls.
Plan = Mapping[str, Mapping[str, Sequence[Row]]]


def with_bases(targets: Iterable[str]) -> tuple[str, ...]:
    """Targets, each behind the one that its other kernels come from, which has to be in the library too."""
    return tuple(dict.fromkeys(t for target in targets for t in (BASES.get(target, target), target)))


def make(
    targets: Iterable[str], records: Sequence[Record], preset: Preset, progress: Callable[[str], None]
) -> dict[str, dict[str, list[Row]]]:
    """The rows of every operator on every target that has kernels of its own for it.

    Parameters
    ----------
    targets : iterable of str
    records : sequence of Record
        What was measured, on any target; nothing means DEFAULT everywhere.
    preset : Preset
        Only records of its sizes count.
    progress : callable
        Takes a line of text for every record that the kernel factory refuses.

    Raises
    ------
    BuildError
        A target that is not one of `CPU_TARGETS`.
    """
    plan: dict[str, dict[str, list[Row]]] = {}
    for target in targets:
        if target not in CPU_TARGETS:
            raise BuildError(f"target: expected one of {', '.join(CPU_TARGETS)}, got {target}")
        plan[target] = {}
        for op, module in CPU.items():
            variants = cpu_variants(op, target)
            if not variants:
                continue
            # The first element types stand for all: every variant is compiled with the same decisions.
            types = tuple(variants[0].values())
            finals = [r for r in records if (r.op, r.target, r.types, r.kind) == (op, target, types, "final")]
            usable = [r for r in finals if _is_taken(module, r, progress)]
            plan[target][op] = choose(op, usable, asdict(module.DEFAULT[target]), preset.lengths)
    return plan


def _is_taken(module: ModuleType, record: Record, progress: Callable[[str], None]) -> bool:
    try:
        space.kernel_decisions(module, record.decisions)
        for name, tried in space.values(module, record.target).items():
            # A zero that divides what it must would end a user's process.
            if not tried[0] <= record.decisions[name] <= tried[-1]:
                raise ValueError(f"{name}: expected {tried[0]}..{tried[-1]}, got {record.decisions[name]}")
    except (TypeError, ValueError, ZeroDivisionError) as error:
        progress(f"leaving out a record of {record.op} on {record.target}: {error}")
        return False
    return True
