"""The table of ``dsa-tvm cost``, and what it says below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime import machine
from ...terminal.text import aligned, digits
from .problem import METHODS, PHASES

_HEADER = {"phase": 7, "position": 8, "method": 9, "ms a token": 10, "$ a million": 11, "x ours": 7, "peak": 9}
Row = Mapping[str, Any]


def price(seconds: float, an_hour: float) -> float:
    """Of a million tokens that take so many seconds each."""
    return seconds * 1e6 * an_hour / 3600


def header() -> str:
    """The line above the rows."""
    return aligned([*_HEADER], [*_HEADER.values()])


def line(row: Row, ours: Row | None, an_hour: float) -> str:
    """A row of the table.

    Parameters
    ----------
    row, ours : mapping
        As in `Measurement.rows`; ours of the same phase and position, where there is one.
    an_hour : float
        Dollars that the machine costs.
    """
    cells = [row["phase"], str(row["position"]), METHODS[row["method"]]]
    if row["left_out"] is not None:
        return aligned([*cells, *"----"], [*_HEADER.values()]) + f"  {row['left_out']}"
    seconds = row["seconds"]
    known = ours is not None and ours["seconds"] is not None
    ratio = digits(seconds / ours["seconds"]) if ours is not None and known else "-"
    cells += [digits(1e3 * seconds), digits(price(seconds, an_hour)), ratio, machine.in_units(row["peak_bytes"])]
    shares = row["shares"]
    note = row["form"] or (", ".join(f"{n} {100 * x:.0f} %" for n, x in shares.items()) if shares else "")
    return (aligned(cells, [*_HEADER.values()]) + f"  {note}").rstrip()


def summary(rows: Sequence[Row]) -> list[str]:
    """Where ours starts to be cheaper, and by how much it is at the end, for each phase and other method."""
    lines = []
    for phase in PHASES:
        for method, title in METHODS.items():
            if method != "ours" and (ratios := ratios_to_ours(rows, phase, method)):
                lines.append(f"{phase}, against {title}: {_words(ratios)}")
    return lines


def ratios_to_ours(rows: Sequence[Row], phase: str, method: str) -> dict[int, float]:
    """How many times more a method costs than ours, by position, where both have figures."""
    seconds: dict[str, dict[int, float]] = {"ours": {}, method: {}}
    for row in rows:
        if row["phase"] == phase and row["method"] in seconds and row["seconds"] is not None:
            seconds[row["method"]][row["position"]] = row["seconds"]
    return {p: x / seconds["ours"][p] for p, x in sorted(seconds[method].items()) if p in seconds["ours"]}


def first_above(ratios: Mapping[int, float], least: float) -> int | None:
    """The first position from which on the ratio stays above `least`; None where it is not at the last."""
    first = None
    for position, ratio in sorted(ratios.items(), reverse=True):
        if ratio <= least:
            break
        first = position
    return first


def _words(ratios: Mapping[int, float]) -> str:
    last = max(ratios)
    wins, halves = first_above(ratios, 1.0), first_above(ratios, 2.0)
    said = f"{digits(ratios[last])} times our price at {last}"
    if wins is None:
        return f"{said}; ours is not cheaper there"
    start = f"ours is cheaper from {wins} on"
    if wins == min(ratios):
        start += ", the first position"
    return f"{said}; {start}" + (f", and less than half from {halves} on" if halves is not None else "")
