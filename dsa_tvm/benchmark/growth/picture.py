"""The sweeps as a picture: a panel for each size that is varied, times beside the lines of the operation count."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .sweep import VARIED

_NAMES = {
    "s_kv": "key tokens (s_kv)",
    "s_q": "query tokens (s_q)",
    "topk": "selected keys (topk)",
    "threads": "threads",
}


def as_png(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw the rows of `command.Growth.measure`, by matplotlib: the extra ``plot``.

    Parameters
    ----------
    rows : sequence of mapping
    title : str
        Where and in which type it was measured.
    """
    # No pyplot: a figure of its own needs neither a display nor a window system's library.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    varied = [name for name in VARIED if any(row["varied"] == name for row in rows)]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(len(varied), 2)
    figure = Figure(figsize=(5.2 * columns, 3.6 * -(-len(varied) // columns) + 0.6), dpi=100, layout="constrained")
    panels = figure.subplots(-(-len(varied) // columns), columns, squeeze=False).flat
    for axes, name in zip(panels, varied, strict=False):
        for color, op in enumerate(ops):
            mine = [row for row in rows if (row["op"], row["varied"]) == (op, name) and row["ours_ms"] is not None]
            sizes = [row[name] for row in mine]
            axes.plot(sizes, [row["ours_ms"] for row in mine], "o-", color=f"C{color}", markersize=4)
            lined = [row for row in mine if row["line_ms"] is not None]
            axes.plot(
                [row[name] for row in lined], [row["line_ms"] for row in lined], "--", color=f"C{color}", alpha=0.6
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _short(size)))
        # More than the powers of ten: a sweep over threads may not reach the next one.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time:g}"))
        axes.set_xlabel(_NAMES[name])
        axes.set_ylabel("ms")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    for axes in list(panels)[len(varied) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], color=f"C{i}", marker="o", markersize=4, label=op) for i, op in enumerate(ops)]
    handles.append(Line2D([], [], color="0.5", linestyle="--", label="operation count"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(title)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _short(size: float) -> str:
    """A size on an axis: 32768 as 32K."""
    return f"{size / 1024:g}K" if size >= 1024 and size % 1024 == 0 else f"{size:g}"
