"""The resources that each CUDA kernel takes, according to the assembler, and the report about a library's kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import BuildError
from ...gpu.architectures import resident_blocks

if TYPE_CHECKING:
    from .fatbins import KernelSet, Unit

_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_STATIC = re.compile(r"(\d+) bytes smem")
#: Its numbered remarks on warpgroups: products that it serializes or waits for, registers that cannot change hands.
_REMARK = re.compile(r"\(C75\d\d\) [^\n]*")
#: Registers of a thread that a warpgroup gives up or takes while the kernel runs.
_CHANGE = re.compile(r"dsa_(?:fewer|more)_registers<(\d+)>")
_WARPGROUP = 128
_COLUMNS = ("threads", "registers", "stack", "spill_stores", "spill_loads", "static_shared", "dynamic_shared", "blocks")


def parse(said: Iterable[str], sets: Sequence[KernelSet]) -> list[dict[str, Any]]:
    """One entry for each kernel and architecture; ``blocks`` is how many blocks a multiprocessor holds at a time.

    Parameters
    ----------
    said : iterable of str
        Output of ``ptxas -v``.
    sets : sequence of KernelSet
        What was compiled.
    """
    launches = {
        (f.symbol, arch): (f.threads, f.kernel.shared_bytes)
        for kernels in sets
        for arch in kernels.archs
        for unit in kernels.units
        for f in unit.functions
    }
    entries = []
    for match in _ENTRY.finditer("".join(said)):
        found = match.groupdict()
        static = _STATIC.search(found.pop("rest"))
        kernel, arch = found.pop("kernel"), found.pop("arch")
        taken = {name: int(value) for name, value in found.items()}
        threads, dynamic_shared = launches[kernel, arch]
        static_shared = int(static[1]) if static else 0
        entries.append(
            {"kernel": kernel, "arch": arch, "threads": threads, **taken}
            | {"static_shared": static_shared, "dynamic_shared": dynamic_shared}
            | {"blocks": resident_blocks(arch, threads, taken["registers"], static_shared + dynamic_shared)}
        )
    return entries


def expect_registers(said: str, unit: Unit) -> None:
    """Check that kernels are launched with enough registers for all their warpgroups.

    With too few, the last warpgroup waits for its registers for ever, and the GPU hangs.

    Parameters
    ----------
    said : str
        Output of ``ptxas -v`` for `unit`.
    unit : Unit

    Raises
    ------
    BuildError
        A kernel would hang.
    """
    functions = {f.symbol: f for f in unit.functions}
    for match in _ENTRY.finditer(said):
        function = functions[match["kernel"]]
        changes = [int(n) for n in _CHANGE.findall(function.definition)]
        if not changes:
            continue
        groups, given = function.threads // _WARPGROUP, int(match["registers"])
        # One warpgroup copies and needs few. The others multiply.
        needed = min(changes) + (groups - 1) * max(changes)
        # A thread gets registers in multiples of eight.
        if -(-given // 8) * 8 * groups < needed:
            shares = f"{min(changes)} and {groups - 1} times {max(changes)}"
            raise BuildError(
                f"{function.symbol}: expected at least {-(-needed // groups)} registers per thread, as its "
                f"warpgroups take {shares}, got {given} from this nvcc: the kernel would never end on {match['arch']}"
            )


def remarks(said: Iterable[str]) -> list[str]:
    """The assembler's remarks on what it could not do as intended, each once."""
    return list(dict.fromkeys(remark for text in said for remark in _REMARK.findall(text)))


def lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The report about a library, from its manifest: decisions of CPU kernels, resources of CUDA kernels."""
    for target, tables in manifest["kernels"].items():
        for op, rows in tables.items():
            for row in rows:
                decisions = ", ".join(f"{name} {value}" for name, value in row["decisions"].items())
                types = "".join(f" {'/'.join(dict.fromkeys(types))}" for types in row.get("types", ()))
                yield f"{target} {op}{types} (s_q <= {row['s_q']}, s_kv <= {row['s_kv']}): {decisions}"
    if not manifest["cuda"]:
        return
    entries = manifest["cuda"]["resources"]
    width = max((len(entry["kernel"]) for entry in entries), default=0)
    yield f"{'CUDA kernel':{width}}  arch    " + "  ".join(name.replace("_", " ") for name in _COLUMNS)
    for entry in entries:
        cells = "  ".join(f"{entry[name]:{len(name)}}" for name in _COLUMNS)
        yield f"{entry['kernel']:{width}}  {entry['arch']:7} {cells}"
    yield from manifest["cuda"]["remarks"]
