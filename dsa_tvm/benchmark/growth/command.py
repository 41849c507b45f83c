"""From the command line to the table, the picture and the figures."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ... import functions, presets
from ...errors import ArgumentError
from ...runtime import library, machine
from ...runtime.files import expect_output, write_output
from ...spec import DIMS
from ...terminal.extras import expect_installed
from ...terminal.progress import Progress
from ...terminal.text import digits, table
from .. import clock, figures, workload
from ..ceilings import Ceilings
from ..check import Checker, CheckError
from . import picture
from .sweep import VARIED, Point, Sweep, sweeps

_DEFAULTS = {"dtype": "float32", "seconds": 0.4}
#: Operators by default: the parts of the attention, and the whole.
_OPS = ("lightning_indexer", "topk", "sparse_mla", "dsa_attention")
_HEADER = ["ours ms", "line ms", "x line", "of peak", "of read", "bound"]


def run(args: argparse.Namespace) -> None:
    """Measure what the command line asks for; print a table for each sweep, and write ``--out`` and ``--json``.

    Parameters
    ----------
    args : argparse.Namespace
        suite, op, s_q, s_kv, topk, threads, preset, dtype, seconds, out and json, as `dsa_tvm.cli` parses them.

    Raises
    ------
    ArgumentError
        An unknown operator, preset or type, a number out of range, or a file that cannot be written.
    CheckError
        An operator gave a wrong result. It has no time in the tables; the others do.
    DsaError
        matplotlib is needed for ``--out`` and not installed.
    """
    if args.suite != "cpu":
        raise ArgumentError(f"bench: growth: expected --suite cpu, got {args.suite}")
    args = figures.with_defaults(args, _DEFAULTS)
    preset = figures.check_arguments(args, ("s_q", "s_kv"))
    machine.check_threads("bench", args.threads)
    for value in args.topk:
        if not DIMS["topk"].serves(value):
            raise ArgumentError(f"bench: topk: expected {DIMS['topk'].range}, got {value}")
    if args.out:
        expect_installed("bench: out", "plot", "matplotlib")
        expect_output("bench: out", args.out)
    figures.check_dtype(args.op, args.dtype)
    ops = [op for op in dict.fromkeys(args.op or _OPS) if workload.serves(op, args.dtype)]
    measured = Growth(sweeps(ops, {name: getattr(args, name) for name in VARIED}, preset), preset, args)
    for line in measured.heading():
        print(line)
    rows: list[dict[str, Any]] = []
    try:
        with Progress(measured.steps) as progress:
            for sweep in measured.sweeps:
                found = measured.measure(sweep, progress)
                rows += found
                for line in ["", *lines(sweep, found)]:
                    progress.say(line)
    finally:
        # After Ctrl-C as well: what has been measured has been measured.
        if rows:
            measured.write(rows)
    for line in measured.notes(rows):
        print(line)
    figures.raise_for_wrong(rows)


class Growth:
    """The measurements of one command line.

    Parameters
    ----------
    found : sequence of Sweep
    preset : Preset
    args : argparse.Namespace
        As `run`, with the defaults.
    """

    def __init__(self, found: Sequence[Sweep], preset: presets.Preset, args: argparse.Namespace) -> None:
        self.sweeps, self._preset, self._args = found, preset, args
        self._ceilings = Ceilings(args.dtype)
        self._disturbed = workload.load_notes()
        self._clock = clock.HostClock()
        self._latest: tuple[Point, workload.Workload, Checker] | None = None

    @property
    def steps(self) -> int:
        """Points of all sweeps."""
        return sum(len(sweep.points) for sweep in self.sweeps)

    def heading(self) -> list[str]:
        """What is measured, and where the lines come from."""
        args = self._args
        return [
            f"{library.active_target()}, {args.preset}, {args.dtype}; times are medians",
            "line: what a call would take if time grew as its operations over its threads do (of topk: its logits); "
            "of peak, of read and bound as in dsa-tvm bench",
        ]

    def measure(self, sweep: Sweep, progress: Progress) -> list[dict[str, Any]]:
        """The rows of a sweep, ascending. Its base comes first, because the line begins there."""
        rows: dict[Point, dict[str, Any]] = {}
        seconds: float | None = None
        for point in sorted(sweep.points, key=lambda p: p != sweep.base):
            progress.step(f"{sweep.op}  {sweep.varied} {getattr(point, sweep.varied)}")
            row = {**asdict(point), "varied": sweep.varied, "dtype": self._args.dtype, "failed": None, "skipped": None}
            row |= {"ours_ms": None, "line_ms": None, "of_line": None, "of_peak": None, "of_read": None, "bound": None}
            rows[point] = row
            try:
                taken, shares = self._time(point)
            except CheckError as error:
                row["failed"] = str(error)
                continue
            except workload.SizeError as error:
                row["skipped"] = f"needs {machine.in_units(error.needed)} of memory, less is left"
                continue
            seconds = taken if point == sweep.base else seconds
            row |= {"ours_ms": 1e3 * taken, **shares}
            if seconds is not None:
                line = sweep.line(point, seconds, self._preset)
                row |= {"line_ms": 1e3 * line, "of_line": taken / line}
        return [rows[point] for point in sweep.points]

    def _time(self, point: Point) -> tuple[float, dict[str, Any]]:
        """Seconds of a call whose result was checked, and its shares of the machine's limits."""
        if self._latest is None or self._latest[0].sizes != point.sizes:
            self._latest = None  # memory may not hold the last inputs and the next ones
            types = workload.types_on_cpu(point.op, self._args.dtype)
            work = workload.make(point.op, point.preset(self._preset), point.s_q, point.s_kv, types=types)
            self._latest = point, work, Checker(work)
        _, work, checker = self._latest
        function = getattr(functions, point.op)

        def call() -> Any:
            return function(**work.inputs, **work.attrs, num_threads=point.threads)

        outputs = call()
        checker.ours(outputs if isinstance(outputs, tuple) else (outputs,))
        del outputs
        seconds = clock.medians(self._clock, {"ours": call}, self._args.seconds)["ours"]
        operations = workload.flops(point.op, work.lengths, *workload.ranges(work))
        return seconds, self._ceilings.shares(operations, workload.traffic(work), point.threads, seconds)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The picture and the figures, where they were asked for.

        Raises
        ------
        DsaError
            A file cannot be written.
        """
        args = self._args
        document = {"target": library.active_target(), "preset": {"name": args.preset, **asdict(self._preset)}}
        if args.json:
            figures.write(args.json, {**document, "seconds": args.seconds, "growth": list(rows)})
        if args.out:
            title = f"{args.preset}, {args.dtype}, {library.active_target()}"
            write_output("bench: out", args.out, picture.as_png(rows, title))

    def notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Lines below the tables."""
        left_out: dict[str, None] = {}
        for row in rows:
            if row["skipped"]:
                left_out[f"-  {row['op']} s_q {row['s_q']} s_kv {row['s_kv']}: {row['skipped']}"] = None
        short = [f"memory left at the end: {machine.memory()}"] if left_out else []
        return [*left_out, *short, *self._ceilings.notes(), *self._disturbed]


def lines(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of a sweep."""
    kept = ", ".join(
        f"{name} {getattr(sweep.base, name)}"
        for name in VARIED
        if name != sweep.varied and (name != "topk" or sweep.op != "lightning_indexer")
    )
    cells = [[str(row[sweep.varied]), *_cells(row)] for row in rows]
    return [f"{sweep.op}: {kept}", *table([sweep.varied, *_HEADER], cells)]


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["ours_ms"] is None:
        return ["FAILED" if row["failed"] else "-", *["-"] * (len(_HEADER) - 1)]
    shares = ("-" if row[name] is None else f"{100 * row[name]:.0f}%" for name in ("of_peak", "of_read"))
    line = ["-", "-"] if row["line_ms"] is None else [digits(row["line_ms"]), f"{row['of_line']:.2f}"]
    return [digits(row["ours_ms"]), *line, *shares, row["bound"] or "-"]
