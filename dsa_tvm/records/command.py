"""``dsa-tvm records``: check, compare, join and show tuning logs."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import ArgumentError, RecordError
from ..ops import OPS
from ..presets import PRESETS
from ..runtime.files import expect_output, write_output
from ..terminal.extras import expect_installed
from ..terminal.text import digits, size_of, table
from . import curve, selection
from .log import Damage, Log, default_directory, logs, merge
from .record import KINDS, Record, as_key
from .selection import cpu
from .selection.finals import in_words, keeps_up

_FIGURES = ("threads", "x DEFAULT", "ms", "of roof")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of ``dsa-tvm records``."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, action, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(action=action)
        return sub

    def place(sub, **kwargs):
        sub.add_argument("path", type=Path, metavar="DIR", help="logs (default: those of the package)", **kwargs)

    verify = command("verify", _verify, "check logs and report every line that is rejected")
    place(verify, nargs="*")

    best = command("best", _best, "the best finals for each size, and which of them a library would contain")
    place(best, nargs="?")
    best.add_argument("--target", help="only this target")
    best.add_argument("--op", choices=list(cpu.BUCKETS), help="only this operator")

    merging = command("merge", _merge, "add the lines of logs to those of a directory")
    merging.add_argument("source", nargs="+", type=Path, help="a log or a directory of logs")
    merging.add_argument("--into", type=Path, required=True, metavar="DIR", help="the directory to add to")
    merging.add_argument("--finals", action="store_true", help="leave out the trials, which no build needs")

    show = command("show", _show, "the trials of searches, and how the best speedup grew")
    place(show, nargs="?")
    show.add_argument("--op", choices=list(cpu.BUCKETS), help="only this operator")
    show.add_argument("--shape", type=_shape, metavar="S_QxS_KV", help="only this size, such as 1x32768")
    show.add_argument(
        "--png", type=Path, metavar="FILE", help="draw the curve of one search into FILE, with matplotlib"
    )


def run(args: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises
    ------
    RecordError
        The directory does not exist, a file cannot be written, or `verify` found damage.
    ArgumentError
        A picture of more or less than one search.
    DsaError
        A picture without matplotlib.
    """
    args.action(args)


def _verify(args: argparse.Namespace) -> None:
    found = [log for path in args.path or [default_directory()] for log in _logs(path)]
    total = 0
    for log in found:
        records, damage = log.read()
        finals = sum(record.kind == "final" for record in records)
        failed = sum(record.error is not None for record in records)
        counts = f"{len(records) - finals} trials, {finals} finals, {failed} failed"
        print(f"{log.path}: {counts}, {len(damage)} damaged")
        for item in damage:
            print(f"  {item}")
        total += len(damage)
    if not found:
        print("no logs")
    if total:
        raise RecordError(f"records verify: expected no damaged lines, got {total}")


def _best(args: argparse.Namespace) -> None:
    searches: dict[tuple, list[Record]] = {}
    for record in _read(args):
        known = selection.of(record.target).BUCKETS
        if record.kind == "final" and args.target in (None, record.target) and record.op in known:
            lengths = as_key({n: length for n, length in record.shape.items() if n not in ("s_q", "s_kv")})
            key = (record.target, record.op, selection.stage_of(record), record.types, lengths)
            searches.setdefault(key, []).append(record)
    for (target, op, stage, types, lengths), records in sorted(searches.items()):
        print(_heading(target, op, types, dict(lengths)) + (f", {stage}" if stage else ""))
        device = selection.of(target)
        rows = []
        for (s_q, s_kv, *_), finals in device.by_size(op, records, dict(lengths)).items():
            if finals:
                best = max(finals, key=lambda record: record.speedup)
                slower = "" if keeps_up(best) else "  (slower than DEFAULT somewhere: not used)"
                rows.append([f"{s_q} x {s_kv}", *_figures(best), in_words(best.decisions) + slower])
        _print_table(rows, "size")
        for line in device.explain(op, records, dict(lengths)):
            print(f"  {line}")
        print()
    if not searches:
        print("no finals")


def _merge(args: argparse.Namespace) -> None:
    sources: dict[tuple[str, str], list[Path]] = {}
    for log in (log for path in args.source for log in _logs(path)):
        sources.setdefault(log.place, []).append(log.path)
    for (target, op), paths in sources.items():
        destination = args.into / target / f"{op}.jsonl"
        added, damage = merge(paths, destination, ("final",) if args.finals else KINDS)
        print(f"{destination}: {added} lines added")
        for item in damage:
            print(f"left out: {item}", file=sys.stderr)
    if not sources:
        print("no logs")


def _show(args: argparse.Namespace) -> None:
    searches: dict[tuple, list[Record]] = {}
    for record in _read(args):
        if args.shape in (None, (record.shape["s_q"], record.shape["s_kv"])):
            search = (record.target, record.op, record.types, as_key(record.shape), record.machine)
            searches.setdefault(search, []).append(record)
    if args.png:
        if len(searches) != 1:
            raise ArgumentError(
                f"records show: png: expected one search, got {len(searches)}; --op and --shape pick one"
            )
        if not any(record.kind == "trial" for records in searches.values() for record in records):
            raise ArgumentError("records show: png: expected a search with trials, got only finals: there is no curve")
        expect_installed("records show: png", "plot", "matplotlib")
        expect_output("records show: png", args.png, RecordError)
    for (target, op, types, shape, machine), records in searches.items():
        print(f"{_heading(target, op, types, dict(shape))}  on {machine}")
        trials = [record for record in records if record.kind == "trial"]
        finals = [record for record in records if record.kind == "final"]
        rows = [[str(number), *_row(record)] for number, record in enumerate(trials, 1)]
        _print_table(rows + [["final", *_row(record)] for record in finals], "trial")
        if trials:
            speedups = [record.speedup for record in trials]
            print("best speedup over DEFAULT so far:", *curve.as_text(speedups), sep="\n")
            if args.png:
                write_output("records show: png", args.png, curve.as_png(speedups), RecordError)
        print()
    if not searches:
        print("no records")


def _logs(path: Path) -> list[Log]:
    return [Log(path)] if path.is_file() else logs(path)


def _read(args: argparse.Namespace) -> list[Record]:
    """The records of `args.path` and `args.op`. Standard error gets the number of damaged lines."""
    records: list[Record] = []
    damage: list[Damage] = []
    for log in _logs(args.path or default_directory()):
        believed, damaged = log.read()
        records += [record for record in believed if args.op in (None, record.op)]
        damage += damaged
    if damage:
        print(f"{len(damage)} damaged lines left out: `dsa-tvm records verify` lists them", file=sys.stderr)
    return records


def _heading(target: str, op: str, types: Iterable[str], lengths: Mapping[str, int]) -> str:
    said = ", ".join(f"{name} {lengths[name]}" for name in OPS[op].dims if name in lengths)
    presets = [
        name for name, p in PRESETS.items() if all(getattr(p, n, length) == length for n, length in lengths.items())
    ]
    return " ".join([target, op, *types]) + f": {said}" + (f" ({', '.join(presets)})" if presets else "")


def _figures(record: Record) -> list[str]:
    """The cells for `_FIGURES`. Each cell has a value for every number of threads."""
    medians = {threads: statistics.median(times) for threads, times in sorted(record.seconds.items())}
    return [
        ", ".join(map(str, medians)),
        ", ".join(f"{ratio:.3f}" for ratio in record.speedups.values()),
        ", ".join(digits(1e3 * taken) for taken in medians.values()),
        ", ".join(f"{record.roof[threads] / taken:.0%}" for threads, taken in medians.items()),
    ]


def _row(record: Record) -> list[str]:
    words = in_words(record.decisions)
    if record.error is None:
        return [*_figures(record), words]
    # The message of a compiler may have many lines, and characters that move the cursor of a terminal.
    reason = "".join(c if c.isprintable() else " " for c in record.error)[:60]
    return [*("-" for _ in _FIGURES), f"{words}: {reason}"]


def _print_table(rows: list[list[str]], first: str) -> None:
    """Print a table whose last column is aligned to the left: it has names of different lengths."""
    figures = table([first, *_FIGURES], [row[:-1] for row in rows])
    for line, last in zip(figures, ["decisions", *(row[-1] for row in rows)], strict=True):
        print(f"{line}  {last}")


def _shape(text: str) -> tuple[int, int]:
    size = size_of(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"expected S_QxS_KV such as 1x32768, got {text!r}")
    return size
