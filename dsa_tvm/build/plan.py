"""Which decisions a library's kernels are compiled with: the best measured ones by size, DEFAULT elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

from ..errors import BuildError
from ..presets import Preset
from ..records import Record
from ..records.selection.cpu import Row, choose
from ..records.selection.finals import has_lengths
from ..schedules import CPU, CPU_TARGETS, CpuSpace, chain, cpu_variants, space

#: Element types of an operator's type variables, in order.
Types = tuple[str, ...]
#: Target to operator to element types to rows, of which the last takes all calls.
Plan = Mapping[str, Mapping[str, Mapping[Types, Sequence[Row]]]]


def with_bases(targets: Iterable[str]) -> tuple[str, ...]:
    """The targets, each after the bases whose kernels it also uses. The bases have to be in the library too."""
    return tuple(dict.fromkeys(t for target in targets for t in reversed(chain(target))))


def make(
    targets: Iterable[str], records: Sequence[Record], preset: Preset, progress: Callable[[str], None]
) -> dict[str, dict[str, dict[Types, list[Row]]]]:
    """The rows of every operator, for every target that has its own kernels of it.

    A kernel is compiled with what the finals of its own element types say. A kernel without such finals follows a
    kernel that has some: one whose queries have the same type if possible, else the first. `progress` is told.

    Parameters
    ----------
    targets : iterable of str
    records : sequence of Record
        Measurements on any target. Without any, every kernel gets DEFAULT.
    preset : Preset
        Only records of its sizes count.
    progress : callable
        Takes a line of text for every record that the kernel factory refuses, and for every operator that has kernels
        which follow measurements of other element types.

    Raises
    ------
    BuildError
        A target is not one of `CPU_TARGETS`.
    """
    plan: dict[str, dict[str, dict[Types, list[Row]]]] = {}
    for target in targets:
        if target not in CPU_TARGETS:
            raise BuildError(f"target: expected one of {', '.join(CPU_TARGETS)}, got {target}")
        plan[target] = {}
        for op, module in CPU.items():
            spaces = {
                tuple(variant.values()): CpuSpace(module, variant, target) for variant in cpu_variants(op, target)
            }
            if not spaces:
                continue
            finals = [r for r in records if (r.op, r.target, r.kind) == (op, target, "final")]
            default = asdict(module.DEFAULT[target])
            rows: dict[Types, list[Row]] = {}
            followed: dict[Types, list[Types]] = {}
            # A failed or unusable final still counts as measured: its kernel does not follow another one.
            measured = [
                types for types in spaces if any(r.types == types and has_lengths(r, preset.lengths) for r in finals)
            ]
            for types in spaces:
                like = types if types in measured else _followed(types, measured)
                if like not in rows:
                    usable = accepted((r for r in finals if r.types == like), spaces[like], progress)
                    rows[like] = choose(op, usable, default, preset.lengths)
                rows[types] = rows[like]
                if like != types and any(row.decisions != default for row in rows[like]):
                    followed.setdefault(like, []).append(types)
            for like, unmeasured in followed.items():
                serves = ", ".join(map(_in_words, unmeasured))
                progress(
                    f"{op} on {target}: decisions tuned for {_in_words(like)} serve {serves} too, which have no records"
                )
            plan[target][op] = {types: rows[types] for types in spaces}
    return plan


def accepted(records: Iterable[Record], module: space.Module, progress: Callable[[str], None]) -> list[Record]:
    """The records whose decisions a kernel can be made with.

    Parameters
    ----------
    records : iterable of Record
        All of one target.
    module : module
        The kernel module, or what stands for it.
    progress : callable
        Takes a line of text for every record that is left out.
    """
    found = []
    for record in records:
        try:
            space.expect_within(module, record.target, record.decisions)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            progress(f"leaving out a record of {record.op} on {record.target}: {error}")
        else:
            found.append(record)
    return found


def _followed(types: Types, measured: Sequence[Types]) -> Types:
    """Whose decisions an unmeasured kernel gets; its own, which are DEFAULT, if no kernel was measured."""
    return next((known for known in measured if known[:1] == types[:1]), measured[0] if measured else types)


def _in_words(types: Types) -> str:
    return "/".join(dict.fromkeys(types))
