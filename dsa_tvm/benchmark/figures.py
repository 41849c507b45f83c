"""What the suites of the benchmark share: checks of arguments, cells and notes of a table, the JSON file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import env, presets
from ..errors import ArgumentError
from ..runtime.files import expect_output, write_output
from ..terminal.text import digits
from .check import CheckError
from .workload import DTYPES, OPERATORS, serves


def with_defaults(args: argparse.Namespace, defaults: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments, with a default for each that was not given, that is None or an empty list."""
    given = {name: value for name, value in vars(args).items() if value is not None and value != []}
    return argparse.Namespace(**{**vars(args), **defaults, **given})


def check_arguments(args: argparse.Namespace, lengths: Sequence[str]) -> presets.Preset:
    """The preset that the command line names, where what it asks for can be measured.

    Parameters
    ----------
    args : argparse.Namespace
        op, preset, seconds and json.
    lengths : sequence of str
        The arguments that are lists of numbers from 1 on.

    Raises
    ------
    ArgumentError
        An operator, a preset or a number cannot be measured, or the JSON file cannot be written.
    """
    for op in args.op:
        if op not in OPERATORS:
            raise ArgumentError(f"bench: operator: expected one of {', '.join(OPERATORS)}, got {op!r}")
    for name in lengths:
        for value in getattr(args, name):
            if value < 1:
                raise ArgumentError(f"bench: {name}: expected at least 1, got {value}")
    if not (math.isfinite(args.seconds) and args.seconds > 0):
        raise ArgumentError(f"bench: seconds: expected a positive number, got {args.seconds}")
    preset = presets.get(args.preset)
    expect_output("bench: json", args.json)
    return preset


def check_dtype(ops: Sequence[str], dtype: str) -> None:
    """Refuse an element type that is unknown, or that one of the operators does not have on a CPU.

    Raises
    ------
    ArgumentError
    """
    if dtype not in DTYPES:
        raise ArgumentError(f"bench: dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    for op in ops:
        if not serves(op, dtype):
            raise ArgumentError(f"bench: dtype: expected one that {op} takes, got {dtype!r}")


def peer_figures(times: Mapping[str, float], ours: float) -> dict[str, dict[str, float]]:
    """The entries of peers in a row: milliseconds, and the ratio to ours. `times` are in seconds."""
    return {name: {"ms": 1e3 * taken, "ratio": taken / ours} for name, taken in times.items()}


def peer_cells(row: Mapping[str, Any], peers: Sequence[str]) -> list[str]:
    """Two cells of a table for each peer: its time and its ratio to ours."""
    cells = []
    for name in peers:
        figures = row["peers"].get(name, {})
        cells += ["-", "-"] if "ms" not in figures else [digits(figures["ms"]), _ratio(figures["ratio"])]
    return cells


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else digits(value)


def notes(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """The reasons for dashes in the table, each once, and how many near-ties the checks met.

    Parameters
    ----------
    rows : sequence of mapping
        op, s_q, s_kv, peers; "skipped" in a row says why ours has no time, and in a peer's entry why that has none.
    titles : mapping
        How to call each peer.
    """
    reasons: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row['op']} s_q {row['s_q']} s_kv {row['s_kv']}"
        skipped = {titles[name]: figures.get("skipped") for name, figures in row["peers"].items()}
        for title, reason in {"ours": row.get("skipped"), **skipped}.items():
            if reason:
                reasons.setdefault(f"{title}: {reason}", []).append(where)
    lines = []
    for reason, places in reasons.items():
        first, *others = dict.fromkeys(places)
        lines.append(f"-  {reason} ({first}{f' and {len(others)} more' if others else ''})")
    ties = sum(row.get("near_ties", 0) for row in rows)
    if ties:
        lines.append(f"{ties} selected keys of the sampled rows differ from float64's selection, all within rounding")
    return lines


def raise_for_wrong(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `CheckError` where a row says in "failed" that our result was wrong."""
    failed = [f"{row['op']} s_q {row['s_q']} s_kv {row['s_kv']}: {row['failed']}" for row in rows if row["failed"]]
    if failed:
        raise CheckError(f"bench: {len(failed)} of {len(rows)} results are wrong; the first: {failed[0]}")


def write(path: Path, document: Mapping[str, Any], command: str = "bench") -> None:
    """Write figures, together with the environment they were taken in.

    Parameters
    ----------
    path : Path
    document : mapping
    command : str
        For the message of an error.

    Raises
    ------
    DsaError
        The file cannot be written.
    """
    text = json.dumps({"environment": env.report(), **document}, indent=2) + "\n"
    write_output(f"{command}: json", path, text.encode())
