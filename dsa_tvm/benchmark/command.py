"""``dsa-tvm bench``: the operators against torch and plain ONNX Runtime, in one run on one machine."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from .. import functions, presets
from ..errors import ArgumentError
from ..runtime import library, machine
from ..terminal.progress import Progress
from ..terminal.text import aligned, digits
from . import check, figures, workload
from .peers import Skipped, peer
from .workload import Workload

_PEERS = {"torch": "torch", "ort": "ORT", "numpy": "numpy"}
_DEFAULTS = {"s_q": [1, 16, 128], "s_kv": [2048, 32768], "dtype": "float32", "seconds": 1.0}


def run(args: argparse.Namespace) -> None:
    """Time what the command line asks for; print a table, and write it with ``--json``.

    Parameters
    ----------
    args : argparse.Namespace
        op, s_q, s_kv, threads, preset, dtype, seconds and json, as `dsa_tvm.cli` parses them.

    Raises
    ------
    ArgumentError
        An unknown operator, preset or type, or a number out of range.
    gate.CheckError
        An operator gave a wrong result. It has no time in the table; the others do.
    LibraryError
        As `dsa_tvm.runtime.library.load`.
    """
    chosen = bool(args.s_q or args.s_kv)
    args = figures.with_defaults(args, _DEFAULTS)
    ops, threads, preset = _checked(args)
    shapes = list(itertools.product(ops, args.s_q, args.s_kv))
    if chosen:
        for op, s_q, s_kv in shapes:
            workload.expect_memory(op, preset, s_q, s_kv)
    disturbed = workload.load_notes()
    peers = [name for name in _PEERS if name != "numpy" or "topk" in ops]
    print(f"{library.active_target()}, {args.preset}, {args.dtype}; times are medians, x is the peer's time over ours")
    widths = [17, 5, 7, 7, 9, 13, *(w for _ in peers for w in (9, 7))]
    header = ["operator", "s_q", "s_kv", "threads", "ours ms", "rate"]
    header += [title for name in peers for title in (f"{_PEERS[name]} ms", f"x {_PEERS[name]}")]
    rows: list[dict[str, Any]] = []
    try:
        with Progress(len(shapes) * len(threads)) as progress:
            progress.say(aligned(header, widths))
            for op, s_q, s_kv in shapes:
                for row in _measure(op, s_q, s_kv, threads, peers, preset, args, progress):
                    rows.append(row)
                    progress.say(aligned(_cells(row, peers), widths))
    finally:
        # After Ctrl-C as well: what has been measured has been measured.
        if args.json and rows:
            sizes = {"name": args.preset, **asdict(preset)}
            document = {"target": library.active_target(), "preset": sizes, "seconds": args.seconds, "rows": rows}
            figures.write(args.json, document)
    short = [f"memory left at the end: {machine.memory()}"] if any(row["skipped"] for row in rows) else []
    for line in [*figures.notes(rows, _PEERS), *short, *disturbed]:
        print(line)
    figures.raise_for_wrong(rows)


def interleaved(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of each call, taken in turns, so that a change of the machine's speed meets all of them.

    Parameters
    ----------
    calls : mapping
        Functions without arguments, by name.
    seconds : float
        Time for each, spread over `figures.ROUNDS` turns; a turn has at least one call.

    Returns
    -------
    dict
        Seconds by name.
    """
    for call in calls.values():
        call()

    def turn(call: Callable[[], Any]) -> list[float]:
        taken: list[float] = []
        begin = now = time.perf_counter()
        while not taken or now - begin < seconds / figures.ROUNDS:
            start = now
            call()
            now = time.perf_counter()
            taken.append(now - start)
        # The first call of a turn meets the caches and the spinning threads that the one before it left.
        return taken[1:] or taken

    return figures.in_turns(calls, turn)


def _checked(args: argparse.Namespace) -> tuple[list[str], list[int], presets.Preset]:
    figures.check_threads("bench", args.threads)
    preset = figures.check_arguments(args, ("s_q", "s_kv"))
    if args.dtype not in workload.DTYPES:
        raise ArgumentError(f"bench: dtype: expected one of {', '.join(workload.DTYPES)}, got {args.dtype!r}")
    for op in args.op or ():
        if not workload.serves(op, args.dtype):
            raise ArgumentError(f"bench: dtype: expected one that {op} takes, got {args.dtype!r}")
    ops = [op for op in dict.fromkeys(args.op or workload.OPERATORS) if workload.serves(op, args.dtype)]
    threads = args.threads or sorted({1, machine.usable_cpus()})
    return ops, list(dict.fromkeys(threads)), preset


def _measure(
    op: str,
    s_q: int,
    s_kv: int,
    threads: list[int],
    peers: list[str],
    preset: presets.Preset,
    args: argparse.Namespace,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """A row for each number of threads."""

    def begun(count: int) -> dict[str, Any]:
        progress.step(f"{op}  s_q {s_q}  s_kv {s_kv}  threads {count}")
        row: dict[str, Any] = {"op": op, "s_q": s_q, "s_kv": s_kv, "threads": count, "dtype": args.dtype}
        return row | {
            "failed": None,
            "skipped": None,
            **dict.fromkeys(("ours_ms", "gflops", "us_per_row")),
            "peers": {},
        }

    try:
        plain = workload.make(op, preset, s_q, s_kv)
        work = workload.with_dtype(plain, args.dtype)
    except workload.SizeError as error:
        for count in threads:
            yield begun(count) | {"skipped": f"needs {machine.in_units(error.needed)} of memory, less is left"}
        return
    for count in threads:
        row = begun(count)
        ours = _ours(work, count)
        try:
            outputs = ours()
            finding = check.check(work, outputs if isinstance(outputs, tuple) else (outputs,), check.sample(s_q))
        except check.CheckError as error:
            yield row | {"failed": str(error)}
            continue
        calls = {"ours": ours}
        for name in peers:
            if name == "numpy" and op != "topk":
                continue
            try:
                calls[name] = peer(name, plain, count)
            except Skipped as reason:
                row["peers"][name] = {"skipped": str(reason)}
        del outputs
        times = interleaved(calls, args.seconds)
        seconds = times.pop("ours")
        row["peers"] |= figures.peer_figures(times, seconds)
        row |= {
            "ours_ms": 1e3 * seconds,
            "max_error": finding.error,
            "error_of_allowed": finding.of_allowed,
            "near_ties": finding.near_ties,
        }
        if op == "topk":
            yield row | {"us_per_row": 1e6 * seconds / s_q}
        else:
            ks, ke = _ranges(op, preset, plain)
            yield row | {"gflops": workload.flops(op, plain.lengths, ks, ke) / seconds / 1e9}


def _ours(work: Workload, threads: int) -> Callable[[], Any]:
    function = getattr(functions, work.op)
    return lambda: function(**work.inputs, **work.attrs, num_threads=threads)


def _ranges(op: str, preset: presets.Preset, work: Workload) -> tuple[Any, Any]:
    if "ke" in work.inputs:
        return work.inputs["ks"], work.inputs["ke"]
    # The attention alone is not told what is visible: what it was given to attend to counts.
    selected = (work.inputs["indices"] >= 0).sum(1)
    return 0 * selected, selected


def _cells(row: Mapping[str, Any], peers: list[str]) -> list[str]:
    cells = [row["op"], *(str(row[n]) for n in ("s_q", "s_kv", "threads"))]
    if row["ours_ms"] is None:
        return [*cells, "FAILED" if row["failed"] else "-", "-", *("-" for _ in peers for _ in range(2))]
    cells.append(digits(row["ours_ms"]))
    cells.append(
        f"{digits(row['gflops'])} GFLOP/s" if row["us_per_row"] is None else f"{digits(row['us_per_row'])} us/row"
    )
    return cells + figures.peer_cells(row, peers)
