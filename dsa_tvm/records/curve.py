"""Draw how a search went, as text and as a PNG: the best speedup so far over the number of trials."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate


def as_text(speedups: Sequence[float], width: int = 72, height: int = 12) -> list[str]:
    """The lines of a plot. It starts at 1, the speed of DEFAULT.

    Parameters
    ----------
    speedups : sequence of float
        The speedups of the trials in order, at least one; 0 for a trial that failed.
    width, height : int
        Size of the plot in characters, without its axes.
    """
    columns = min(width, len(speedups))
    best, high = _sampled(speedups, columns)
    levels = [_level(value, high, height) for value in best]
    lines = []
    for row in reversed(range(height)):
        marks = "".join("*" if level == row else " " for level in levels)
        lines.append(f"{1 + row * (high - 1) / (height - 1):6.3f} |{marks}".rstrip())
    return [*lines, f"{'':6} +{'-' * columns}", f"{'':8}1{len(speedups):>{max(columns - 1, 2)}} trials"]


def as_png(speedups: Sequence[float], width: int = 640, height: int = 360) -> bytes:
    """The same as a picture, by matplotlib: the extra ``plot``.

    Parameters
    ----------
    speedups : sequence of float
        As `as_text`.
    width, height : int
        Pixels.
    """
    # No pyplot: a figure of its own needs neither a display nor a window system's library.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    best = _best(speedups)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    axes = figure.subplots()
    # Each trial is a step, so that a single one is seen, too.
    axes.stairs(best, [i + 0.5 for i in range(len(best) + 1)], baseline=None, linewidth=2)
    axes.set_xlim(0.5, len(best) + 0.5)
    axes.set_ylim(1 - 0.02 * (_top(best) - 1), 1 + 1.05 * (_top(best) - 1))
    axes.set_xlabel("trials")
    axes.set_ylabel("best speedup over DEFAULT so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.85")
    axes.set_axisbelow(True)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _best(speedups: Sequence[float]) -> list[float]:
    """The best so far after each trial."""
    return list(accumulate(speedups, max, initial=1.0))[1:]


def _top(best: Sequence[float]) -> float:
    """The top of the axis; a flat line is at its bottom, not nowhere."""
    return max(best[-1], 1.01)


def _sampled(speedups: Sequence[float], columns: int) -> tuple[list[float], float]:
    """The best so far at the end of each column, and the top of the axis."""
    best = _best(speedups)
    return [best[-(-(i + 1) * len(best) // columns) - 1] for i in range(columns)], _top(best)


def _level(value: float, high: float, steps: int) -> int:
    return round((value - 1) / (high - 1) * (steps - 1))
