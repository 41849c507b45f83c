"""How much of dense attention's mass selections hold, for all layers of a checkpoint on one text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ...errors import ArgumentError
from ..checkpoint import DTYPES
from . import mass
from .report import KINDS, Recall
from .walk import Walk


def recall(
    checkpoint: str | Path,
    tokens: Sequence[int],
    topks: Sequence[int],
    *,
    queries: int = 256,
    layers: tuple[int, int] | None = None,
    dtype: str = "float32",
    say: Callable[[str], None] = lambda line: None,
) -> Recall:
    """Take a text through a model as it is, and ask each layer what its indexer would keep.

    The model runs with its own topk, one layer in memory at a time. Dense attention is that of the layer over the same
    hidden states; a layer that shares a selection is asked about the selection of the layer that made it.

    Parameters
    ----------
    checkpoint : str or Path
    tokens : sequence of int
        The text.
    topks : sequence of int
        Numbers of keys to select, 1..4096 each.
    queries : int
        Tokens that are looked at, spread evenly; the last token is among them.
    layers : tuple of two int, optional
        First layer and one past the last; by default all.
    dtype : str
        What the model runs in. Probabilities are computed in float32.
    say : callable
        Told of each layer.

    Returns
    -------
    found : Recall

    Raises
    ------
    ArgumentError
        No tokens, too many of them, tokens outside of the vocabulary, or layers that the model does not have.
    ModelError
        The checkpoint cannot be read, or has a size that the operators do not serve.
    """
    if not tokens:
        raise ArgumentError("recall: text: expected at least one token, got none")
    positions = np.unique(np.linspace(len(tokens) - 1, 0, queries).round().astype(np.int64))
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    numbers = []
    selected: mass.Selections = {}
    text = torch.tensor(tokens, dtype=torch.int64)
    with Walk(Path(checkpoint), DTYPES[dtype], text, torch.from_numpy(positions), layers) as walk:
        for number, seen in walk.run(say):
            if seen.index_keys is not None:
                selected = mass.selections(seen, topks)
            if number not in walk.layers:
                continue
            found = mass.masses(seen, selected)
            numbers.append(number)
            for kind, by_topk in found.items():
                kept[kind].append(np.stack([by_topk[topk].numpy() for topk in topks]))
    return Recall(list(topks), numbers, positions, {kind: np.stack(x) for kind, x in kept.items()})
