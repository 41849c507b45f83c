"""``dsa-tvm bench --suite cpu``: the shapes, numbers of threads and figures of a CPU."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .. import functions
from ..errors import ArgumentError
from ..runtime import library, machine
from ..terminal.text import aligned, digits
from . import figures, workload
from .check import Checker
from .clock import Clock, HostClock
from .peers import Peer, cpu
from .suite import Case
from .workload import Workload

DEFAULTS = {"s_q": [1, 16, 128], "s_kv": [2048, 32768], "dtype": "float32", "seconds": 1.0}
_HEADER = {"operator": 17, "s_q": 5, "s_kv": 7, "threads": 7, "ours ms": 9, "rate": 13}


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
    # What plain ONNX Runtime returns for `dsa_attention` does not say what it selected: the tests check the peers.
    checks_peers = False

    def __init__(self, args: argparse.Namespace) -> None:
        chosen = bool(args.s_q or args.s_kv)
        args = figures.with_defaults(args, DEFAULTS)
        figures.check_threads("bench", args.threads)
        self._preset, self._preset_name = figures.check_arguments(args, ("s_q", "s_kv")), args.preset
        self._dtype, self.seconds = args.dtype, args.seconds
        if args.dtype not in workload.DTYPES:
            raise ArgumentError(f"bench: dtype: expected one of {', '.join(workload.DTYPES)}, got {args.dtype!r}")
        for op in args.op or ():
            if not workload.serves(op, args.dtype):
                raise ArgumentError(f"bench: dtype: expected one that {op} takes, got {args.dtype!r}")
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
        self._latest: tuple[Case, Workload, Workload, Checker] | None = None

    def heading(self) -> list[str]:
        """As `Suite`."""
        measured = f"{library.active_target()}, {self._preset_name}, {self._dtype}"
        return [f"{measured}; times are medians, x is the peer's time over ours"]

    def document(self) -> dict[str, Any]:
        """As `Suite`."""
        sizes = {"name": self._preset_name, **asdict(self._preset)}
        return {"target": library.active_target(), "preset": sizes, "seconds": self.seconds}

    def remarks(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """As `Suite`."""
        short = [f"memory left at the end: {machine.memory()}"] if any(row["skipped"] for row in rows) else []
        return [*short, *self._disturbed]

    def header(self, op: str, first: bool) -> list[str]:
        """As `Suite`: all operators share a table."""
        peers = [cell for name in self._columns for cell in (f"{self.titles[name]} ms", f"x {self.titles[name]}")]
        return [aligned([*_HEADER, *peers], self._widths)] if first else []

    def line(self, row: Mapping[str, Any]) -> str:
        """As `Suite`."""
        return aligned(self._cells(row), self._widths)

    @property
    def _widths(self) -> list[int]:
        return [*_HEADER.values(), *(width for _ in self._columns for width in (9, 7))]

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        cells = [row["op"], *(str(row[n]) for n in ("s_q", "s_kv", "threads"))]
        if row["ours_ms"] is None:
            return [*cells, "FAILED" if row["failed"] else "-", "-", *("-" for _ in self._columns for _ in range(2))]
        per_row, rate = row["us_per_row"], row["gflops"]
        cells += [digits(row["ours_ms"]), f"{digits(rate)} GFLOP/s" if per_row is None else f"{digits(per_row)} us/row"]
        return cells + figures.peer_cells(row, self._columns)

    def title(self, case: Case) -> str:
        """As `Suite`."""
        return f"{case.op}  s_q {case.s_q}  s_kv {case.s_kv}  threads {case.threads}"

    def blank(self, case: Case) -> dict[str, Any]:
        """As `Suite`."""
        row = {"op": case.op, "s_q": case.s_q, "s_kv": case.s_kv, "threads": case.threads, "dtype": case.dtype}
        empty = dict.fromkeys(("ours_ms", "gflops", "us_per_row"))
        return {**row, "failed": None, "skipped": None, **empty, "peers": {}}

    def inputs(self, case: Case) -> tuple[Workload, Checker]:
        """As `Suite`; cases that differ in the number of threads alone share them."""
        if self._latest is None or (self._latest[0].op, self._latest[0].s_q, self._latest[0].s_kv) != (
            case.op,
            case.s_q,
            case.s_kv,
        ):
            self._latest = None  # memory may not hold the last inputs and the next ones
            plain = workload.make(case.op, self._preset, case.s_q, case.s_kv)
            work = workload.with_dtype(plain, case.dtype)
            self._latest = case, plain, work, Checker(work)
        return self._latest[2:]

    def ours(self, case: Case, work: Workload) -> Callable[[], Any]:
        """As `Suite`."""
        function = getattr(functions, case.op)
        return lambda: function(**work.inputs, **work.attrs, num_threads=case.threads)

    def peers(self, op: str) -> list[str]:
        """As `Suite`."""
        return [name for name in self._columns if name != "numpy" or op == "topk"]

    def peer(self, name: str, case: Case, work: Workload) -> Peer:
        """As `Suite`; they take float32, whatever ours take."""
        assert self._latest is not None and case.threads is not None
        return cpu.prepare(name, self._latest[1], case.threads)

    def figures(self, case: Case, work: Workload, seconds: float) -> dict[str, Any]:
        """As `Suite`: the time of a row of `topk`, and GFLOP/s of the others."""
        if case.op == "topk":
            return {"us_per_row": 1e6 * seconds / case.s_q}
        return {"gflops": workload.flops(case.op, work.lengths, *workload.ranges(work)) / seconds / 1e9}

    def reason(self, error: Exception) -> str | None:
        """As `Suite`: inputs that do not fit."""
        if isinstance(error, workload.SizeError):
            return f"needs {machine.in_units(error.needed)} of memory, less is left"
        return None

    def check_alive(self, after: str) -> None:
        """As `Suite`: a CPU goes on."""

    def release(self) -> None:
        """As `Suite`: nothing is held."""
