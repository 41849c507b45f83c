"""The costs as a picture, in the form of figure 3 of the DeepSeek-V3.2 paper: prefill and decode side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .problem import METHODS
from .report import price

_COLOURS = {"ours": "C3", "dense": "C0", "sdpa": "C2", "eager": "C7"}


def as_png(rows: Sequence[Mapping[str, Any]], an_hour: float, title: str) -> bytes:
    """Dollars a million tokens over the position, by matplotlib: the extra ``plot``.

    Parameters
    ----------
    rows : sequence of mapping
        As `Measurement.rows`, at least one of them with figures.
    an_hour : float
        Dollars that the machine costs.
    title : str

    Returns
    -------
    bytes
        A PNG.
    """
    # No pyplot: a figure of its own needs neither a display nor a window system's library.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    phases = list(dict.fromkeys(row["phase"] for row in rows))
    figure = Figure(figsize=(4.8 * len(phases), 3.8), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        for method, name in METHODS.items():
            points = [
                (row["position"] / 1024, price(row["seconds"], an_hour))
                for row in rows
                if (row["phase"], row["method"]) == (phase, method) and row["seconds"] is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=_COLOURS[method], label=name)
        axes.set_title(phase)
        axes.set_xlabel("token position")
        axes.set_ylabel("$ a million tokens")
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}K"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(which="both", color="0.88")
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
