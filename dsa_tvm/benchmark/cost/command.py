"""What ``dsa-tvm cost`` does with its arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ArgumentError
from ...runtime import machine
from ...runtime.files import expect_output, write_output
from ...terminal.extras import expect_installed
from ...terminal.progress import Progress
from ...terminal.signals import exits_on_sigterm
from .. import figures, workload
from . import picture, report
from .arguments import CHANGES
from .measure import Measurement, Plan
from .problem import METHODS, PHASES, Problem, expect_layer


def run(args: argparse.Namespace) -> None:
    """Measure, print a table, and write what is asked for.

    Parameters
    ----------
    args : argparse.Namespace
        As `arguments.add_arguments` declares them.

    Raises
    ------
    ArgumentError
        A number out of range, a preset without a layer, or a file that cannot be written.
    CheckError
        A method does not compute what Transformers' eager attention computes.
    DsaError
        Packages are missing.
    ModelError
        The checkpoint cannot be read.
    """
    plan = _plan(args)
    expect_installed("cost", "models", "torch", "transformers", "safetensors")
    if args.out:
        expect_installed("cost: out", "plot", "matplotlib")
    disturbed = workload.load_notes()
    # A command that is told to end writes its figures and ends its processes, as after Ctrl-C.
    with exits_on_sigterm(), Measurement(plan) as measurement:
        try:
            with Progress(measurement.steps) as progress:
                measurement.check(progress.step)
                for line in _heading(measurement, args.price):
                    progress.say(line)
                ours: Mapping[str, Any] | None = None
                for row in measurement.run(progress.step):
                    ours = row if row["method"] == "ours" else ours
                    progress.say(report.line(row, ours if _together(row, ours) else None, args.price))
        finally:
            # After Ctrl-C or SIGTERM as well: what has been measured has been measured.
            _write(args, measurement)
    for line in [*report.summary(measurement.rows), *disturbed]:
        print(line)


def _plan(args: argparse.Namespace) -> Plan:
    threads = args.threads or machine.usable_cpus()
    machine.check_threads("cost", [threads])
    for name in ("chunk", *CHANGES):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ArgumentError(f"cost: {name.replace('_', '-')}: expected at least 1, got {value}")
    for position in args.positions:
        if not 1 <= position < 1 << 24:
            raise ArgumentError(f"cost: positions: expected 1..{(1 << 24) - 1}, got {position}")
    for name in ("price", "seconds", "limit"):
        if not (math.isfinite(value := getattr(args, name)) and value > 0):
            raise ArgumentError(f"cost: {name}: expected a positive number, got {value}")
    changes = {setting: getattr(args, name) for name, setting in CHANGES.items() if getattr(args, name) is not None}
    if args.checkpoint is None:
        expect_layer(args.preset)
    elif changes:
        raise ArgumentError(f"cost: expected a preset where {', '.join(changes)} are given, got {args.checkpoint}")
    for name in ("json", "out"):
        expect_output(f"cost: {name}", getattr(args, name))
    problem = Problem(args.checkpoint, args.preset, args.layer, changes, args.dtype, args.chunk, threads)
    phases = [phase for phase in PHASES if phase in args.phases]
    methods = [method for method in METHODS if method in args.methods]
    return Plan(problem, methods, phases, sorted(set(args.positions)), args.seconds, args.limit)


def _together(row: Mapping[str, Any], ours: Mapping[str, Any] | None) -> bool:
    return ours is not None and (row["phase"], row["position"]) == (ours["phase"], ours["position"])


def _heading(measurement: Measurement, price: float) -> list[str]:
    problem, layer = measurement.plan.problem, measurement.about["layer"]
    sizes = (
        f"{layer['num_attention_heads']} heads, indexer {layer['index_n_heads']} x {layer['index_head_dim']}, "
        f"topk {layer['index_topk']}"
    )
    return [
        f"attention of {problem.title}: {sizes}; {problem.dtype}, threads: {problem.threads}, "
        f"{measurement.about['target']}; ${price:g} an hour",
        f"prefill: a token of a chunk of {problem.chunk} that ends at the position; peak: of the whole process",
        measurement.checked,
        report.header(),
    ]


def _write(args: argparse.Namespace, measurement: Measurement) -> None:
    if args.json and measurement.rows:
        figures.write(args.json, _document(args, measurement), command="cost")
    if args.out and any(row["seconds"] is not None for row in measurement.rows):
        layer = measurement.about["layer"]
        title = (
            f"attention of {measurement.plan.problem.title}: {layer['num_attention_heads']} heads, {args.dtype}, "
            f"{measurement.about['target']}, threads: {measurement.plan.problem.threads}; ${args.price:g} an hour"
        )
        write_output("cost: out", args.out, picture.as_png(measurement.rows, args.price, title))


def _document(args: argparse.Namespace, measurement: Measurement) -> dict[str, Any]:
    problem, rows = measurement.plan.problem, measurement.rows
    return {
        **measurement.about,
        "source": problem.title,
        "dtype": problem.dtype,
        "threads": problem.threads,
        "chunk": problem.chunk,
        "price_an_hour": args.price,
        "checked": measurement.checked,
        "rows": [{**row, "price_a_million": _price(row, args.price)} for row in rows],
        "cheaper_from": _from(rows, 1.0),
        "at_most_half_from": _from(rows, 2.0),
    }


def _price(row: Mapping[str, Any], price: float) -> float | None:
    return None if row["seconds"] is None else report.price(row["seconds"], price)


def _from(rows: Sequence[Mapping[str, Any]], least: float) -> dict[str, dict[str, int | None]]:
    return {
        phase: {m: report.first_above(report.ratios_to_ours(rows, phase, m), least) for m in METHODS if m != "ours"}
        for phase in PHASES
    }
