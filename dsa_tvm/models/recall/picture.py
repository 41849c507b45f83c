"""What the selected tokens hold as a picture: by position, and by layer."""

from __future__ import annotations

import io

from .report import Recall


def as_png(found: Recall, title: str) -> bytes:
    """A PNG by matplotlib: the extra ``plot``. A dashed line is what as many keys could hold at best, a dotted one
    what random keys hold.

    Parameters
    ----------
    found : Recall
    title : str
    """
    # No pyplot: a figure of its own needs neither a display nor a window system's library.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 3.8), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=9)
    by_position, by_layer = figure.subplots(1, 2, sharey=True)
    middles = [(a + b - 1) / 2 for a, b in found.parts()]
    for axes, x, means in ((by_position, middles, found.by_part), (by_layer, found.layers, found.by_layer)):
        for i, topk in enumerate(found.topks):
            axes.plot(x, means("selected")[:, i], marker="o", markersize=3, color=f"C{i}", label=f"topk {topk}")
            axes.plot(x, means("best")[:, i], linestyle="--", linewidth=1, color=f"C{i}")
            axes.plot(x, means("random")[:, i], linestyle=":", linewidth=1, color=f"C{i}")
        axes.grid(color="0.88")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_position.set_xlabel("position of the query")
    by_position.set_ylabel("share of dense attention's mass")
    by_position.set_ylim(top=1.02)
    by_layer.set_xlabel("layer")
    for name, style in (("best possible", "--"), ("random keys", ":")):
        by_layer.plot([], linestyle=style, linewidth=1, color="0.3", label=name)
    by_layer.legend(frameon=False, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
