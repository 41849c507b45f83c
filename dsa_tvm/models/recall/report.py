"""Figures of ``dsa-tvm recall``: means by layer and by position, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...terminal.text import table

#: What is measured; means of "random" keys need no measurement.
KINDS = ("selected", "best", "recent")
#: Parts of the text that positions are put together in.
PARTS = 8


@dataclass(frozen=True)
class Recall:
    """What was found.

    Parameters
    ----------
    topks, layers : list of int
    positions : ndarray [n], int
        Of the queries.
    mass : mapping of str to ndarray [layers, topks, n], float64
        By `KINDS`.
    """

    topks: list[int]
    layers: list[int]
    positions: np.ndarray
    mass: Mapping[str, np.ndarray]

    def drops(self, topk: int) -> np.ndarray:
        """Which queries see more keys than they keep, bool [n]; the others keep all."""
        return self.positions + 1 > topk

    def by_layer(self, kind: str) -> np.ndarray:
        """Means over the queries that drop keys, [layers, topks]; NaN where none does."""
        mass = self._mass(kind)
        return np.stack([_mean(mass[:, i][:, self.drops(k)]) for i, k in enumerate(self.topks)], 1)

    def parts(self) -> list[tuple[int, int]]:
        """First position and one past the last of each part of the text that has queries."""
        end = int(self.positions.max()) + 1
        bounds = np.unique(np.linspace(0, end, PARTS + 1).astype(int))
        pairs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        return [(a, b) for a, b in pairs if self._within(a, b).any()]

    def by_part(self, kind: str) -> np.ndarray:
        """Means over layers and the queries in each part of the text, [parts, topks]."""
        inside = [self._within(a, b) for a, b in self.parts()]
        mass = self._mass(kind)
        return np.stack([mass[:, :, where].mean((0, 2)) for where in inside])

    def _mass(self, kind: str) -> np.ndarray:
        """Of a kind of selection, [layers, topks, n]. Of n keys, k random ones hold k / n on average."""
        if kind != "random":
            return self.mass[kind]
        shares = np.minimum(1.0, np.array(self.topks)[:, None] / (self.positions + 1))
        return np.broadcast_to(shares, (len(self.layers), *shares.shape))

    def _within(self, first: int, end: int) -> np.ndarray:
        return (self.positions >= first) & (self.positions < end)

    def document(self) -> dict[str, Any]:
        """For JSON: every figure."""
        return {
            "topk": self.topks,
            "layers": self.layers,
            "positions": self.positions.tolist(),
            "mass": {kind: np.round(x, 6).tolist() for kind, x in self.mass.items()},
        }


def lines(found: Recall) -> list[str]:
    """Two tables: by layer, and by position."""
    header = [f"topk {k}" for k in found.topks]
    said = ["by layer, the mean over the queries that see more keys than they keep:"]
    names = [f"layer {n}" for n in found.layers]
    said += _cells("", header, names, found.by_layer("selected"), found.by_layer("best"))
    said += ["", "by position, the mean over layers:"]
    names = [f"{a}..{b - 1}" for a, b in found.parts()]
    said += _cells("", header, names, found.by_part("selected"), found.by_part("best"))
    said += [
        "",
        "share of dense attention's mass on the selected keys; in brackets, on the best that as many keys could hold",
        _instead("the last keys before each query, as many, hold", found, "recent"),
        _instead("as many random keys hold, on average,", found, "random"),
    ]
    return said


def _instead(words: str, found: Recall, kind: str) -> str:
    means = zip(found.topks, _column_means(found.by_layer(kind)), strict=True)
    return f"{words} " + ", ".join(f"{_share(x)} ({k})" for k, x in means)


def _cells(title: str, header: Sequence[str], names: Sequence[str], kept: np.ndarray, best: np.ndarray) -> list[str]:
    rows = [
        [name, *("all" if np.isnan(x) else f"{_share(x)} ({_share(y)})" for x, y in zip(a, b, strict=True))]
        for name, a, b in zip(names, kept, best, strict=True)
    ]
    return table([title, *header], rows)


def _share(x: float) -> str:
    return "all" if np.isnan(x) else f"{x:.3f}"


def _column_means(x: np.ndarray) -> list[float]:
    return [float(column[~np.isnan(column)].mean()) if (~np.isnan(column)).any() else np.nan for column in x.T]


def _mean(x: np.ndarray) -> np.ndarray:
    return x.mean(-1) if x.shape[-1] else np.full(x.shape[0], np.nan)
