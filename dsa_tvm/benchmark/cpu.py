"""``dsa-tvm bench --suite cpu``: the shapes, numbers of threads and figures of a CPU."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .. import functions
from ..runtime import library, machine
from ..terminal.text import aligned, digits
from . import figures, workload
from .ceilings import Ceilings
from .check import Checker
from .clock import Clock, HostClock
from .peers import Peer, cpu
from .suite import Case
from .workload import Workload

DEFAULTS = {"s_q": [1, 16, 128], "s_kv": [2048, 32768], "dtype": "float32", "seconds": 1.0}
_HEADER = {"operator": 17, "s_q": 5, "s_kv": 7, "threads": 7, "ours ms": 9, "rate": 13}
#: Keys of `Ceilings.shares`.
_FIGURES = ("of_peak", "of_read", "bound", "peak_gflops", "read_gbps")
#: The share of the machine's limits that a call reaches, and which of the two limits it.
_SHARES = {"of peak": 7, "of read": 7, "bound": 5}


class CpuSuite:
    """A `Suite` on this machine's CPUs.

    Parameters
    ----------
    args : argparse.Namespace
        op, s_q, s_kv, threads, preset, dtype and seconds, as `dsa_tvm.cli` parses them.

    Raises
    ------
    ArgumentError
        An unknown operator, preset or type, a number out of range, or shapes that were asked for and do not fit into
        memory.
    """

    cases: Sequence[Case]
    clock: Clock = HostClock()
    seconds: float
    titles: Mapping[str, str] = cpu.TITLES
    out_of_memory: tuple[type[Exception], ...] = ()

    def __init__(self, args: argparse.Namespace) -> None:
        chosen = bool(args.s_q or args.s_kv)
        args = figures.with_defaults(args, DEFAULTS)
        machine.check_threads("bench", args.threads)
        self._preset, self._preset_name = figures.check_arguments(args, ("s_q", "s_kv")), args.preset
        self._dtype, self.seconds = args.dtype, args.seconds
        figures.check_dtype(args.op, args.dtype)
        ops = [op for op in dict.fromkeys(args.op or workload.OPERATORS) if workload.serves(op, args.dtype)]
        threads = list(dict.fromkeys(args.threads or sorted({1, machine.usable_cpus()})))
        self.cases = [
            Case(op, args.dtype, s_q, s_kv, count)
            for op, s_q, s_kv, count in itertools.product(ops, args.s_q, args.s_kv, threads)
        ]
        if chosen:
            for op, s_q, s_kv in itertools.product(ops, args.s_q, args.s_kv):
                workload.expect_memory(op, self._preset, s_q, s_kv)
        self._disturbed = workload.load_notes()
        self._columns = [name for name in self.titles if name != "numpy" or "topk" in ops]
        self._latest: tuple[Case, Workload, Checker] | None = None
        self._ceilings = Ceilings(args.dtype)

    def heading(self) -> list[str]:
        """As `Suite`."""
        measured = f"{library.active_target()}, {self._preset_name}, {self._dtype}"
        lines = [f"{measured}; times are medians, x is the peer's time over ours"]
        threads = dict.fromkeys(case.threads for case in self.cases if case.threads)
        if peaks := {n: rate for n in threads if (rate := self._ceilings.peak(n, 0.2))}:
            limits = ", ".join(f"{rate / 1e9:.0f} with {n}" for n, rate in peaks.items())
            lines.append(
                f"peak: GFLOP/s of {self._ceilings.product} products in registers, {limits} threads; "
                "read: the bytes that must move, read again and again; bound: the nearer of these limits"
            )
        return lines

    def document(self) -> dict[str, Any]:
        """As `Suite`."""
        sizes = {"name": self._preset_name, **asdict(self._preset)}
        return {"target": library.active_target(), "preset": sizes, "seconds": self.seconds}

    def remarks(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """As `Suite`."""
        short = [f"memory left at the end: {machine.memory()}"] if any(row["skipped"] for row in rows) else []
        products: dict[str, dict[str, None]] = {}
        for row in rows:
            for name, found in row["peers"].items():
                if (product := found.get("product")) not in (None, row["dtype"]):
                    products.setdefault(f"{self.titles[name]} multiplies in {product}", {})[str(row["threads"])] = None
        converted = [f"{said}, with {', '.join(threads)} threads" for said, threads in products.items()]
        return [*short, *converted, *self._ceilings.notes(), *self._disturbed]

    def header(self, op: str, first: bool) -> list[str]:
        """As `Suite`: all operators share a table."""
        peers = [cell for name in self._columns for cell in (f"{self.titles[name]} ms", f"x {self.titles[name]}")]
        return [aligned([*_HEADER, *_SHARES, *peers], self._widths)] if first else []

    def line(self, row: Mapping[str, Any]) -> str:
        """As `Suite`."""
        return aligned(self._cells(row), self._widths)

    @property
    def _widths(self) -> list[int]:
        return [*_HEADER.values(), *_SHARES.values(), *(width for _ in self._columns for width in (9, 7))]

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        cells = [row["op"], *(str(row[n]) for n in ("s_q", "s_kv", "threads"))]
        if row["ours_ms"] is None:
            empty = 1 + len(_SHARES) + 2 * len(self._columns)
            return [*cells, "FAILED" if row["failed"] else "-", *["-"] * empty]
        per_row, rate = row["us_per_row"], row["gflops"]
        cells += [digits(row["ours_ms"]), f"{digits(rate)} GFLOP/s" if per_row is None else f"{digits(per_row)} us/row"]
        cells += ["-" if row[n] is None else f"{100 * row[n]:.0f}%" for n in ("of_peak", "of_read")]
        return [*cells, row["bound"] or "-", *figures.peer_cells(row, self._columns)]

    def title(self, case: Case) -> str:
        """As `Suite`."""
        return f"{case.op}  s_q {case.s_q}  s_kv {case.s_kv}  threads {case.threads}"

    def blank(self, case: Case) -> dict[str, Any]:
        """As `Suite`."""
        row = {"op": case.op, "s_q": case.s_q, "s_kv": case.s_kv, "threads": case.threads, "dtype": case.dtype}
        empty = dict.fromkeys(("ours_ms", "gflops", "us_per_row", *_FIGURES))
        return {**row, "failed": None, "skipped": None, **empty, "peers": {}}

    def inputs(self, case: Case) -> tuple[Workload, Checker]:
        """As `Suite`. Cases that differ only in the number of threads share their inputs."""
        if self._latest is None or (self._latest[0].op, self._latest[0].s_q, self._latest[0].s_kv) != (
            case.op,
            case.s_q,
            case.s_kv,
        ):
            self._latest = None  # memory may not hold these inputs and the next ones together
            types = workload.types_on_cpu(case.op, case.dtype)
            work = workload.make(case.op, self._preset, case.s_q, case.s_kv, types=types)
            self._latest = case, work, Checker(work)
        return self._latest[1:]

    def ours(self, case: Case, work: Workload) -> Callable[[], Any]:
        """As `Suite`."""
        function = getattr(functions, case.op)
        return lambda: function(**work.inputs, **work.attrs, num_threads=case.threads)

    def peers(self, op: str) -> list[str]:
        """As `Suite`."""
        return [name for name in self._columns if name != "numpy" or op == "topk"]

    def peer(self, name: str, case: Case, work: Workload) -> Peer:
        """As `Suite`."""
        assert case.threads is not None
        return cpu.prepare(name, work, case.threads)

    def figures(self, case: Case, work: Workload, seconds: float) -> dict[str, Any]:
        """As `Suite`: the time of a row of `topk`, and GFLOP/s of the others; and what of the limits that is."""
        assert case.threads is not None
        operations = workload.flops(case.op, work.lengths, *workload.ranges(work))
        found = self._ceilings.shares(operations, workload.traffic(work), case.threads, seconds)
        return found | (
            {"gflops": operations / seconds / 1e9} if operations else {"us_per_row": 1e6 * seconds / case.s_q}
        )

    def reason(self, error: Exception) -> str | None:
        """As `Suite`: the inputs do not fit into memory."""
        if isinstance(error, workload.SizeError):
            return f"needs {machine.in_units(error.needed)} of memory, less is left"
        return None

    def check_alive(self, after: str) -> None:
        """As `Suite`. A CPU keeps working."""

    def release(self) -> None:
        """As `Suite`. There is nothing to free."""
