"""DSA models in ONNX: `export_model` and `export_checkpoint` make them, `Generator` makes tokens with them.

One graph serves prefill, chunks of it and decode. Its inputs:

=========================================  ======================  ===================================================
``input_ids``                              [batch, s_q] int64      New tokens.
``position_ids``                           [batch, s_q] int64      Of each in its own sequence; -1 is padding.
``logits_to_keep``                         [n] int64               Which of the s_q tokens logits are wanted for.
``input.past_key_values.layers.L.keys``    [batch, capacity, 576]  Latent and rope key of each position.
``...layers.L.indexer_keys``               [batch, capacity, 128]  Not in layers that share a selection.
=========================================  ======================  ===================================================

Outputs are ``logits`` [batch, n, vocab] and, under ``output.past_key_values...``, the caches with the new rows in them.
Bind the same memory to a cache's input and output: then new rows are all that is written. A token is written to row
``position_ids`` of its sequence's cache, and attends to the rows up to there. So padding may be anywhere, sequences of
a batch may have different lengths, and to go back is to give a position again. A position that is not below the
capacity is an error of the run, and so are caches of different capacities.

Importing this package loads neither torch nor ONNX Runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporting import export_checkpoint, export_model
    from .generator import Generator, Timing

__all__ = ["Generator", "Timing", "export_checkpoint", "export_model"]


def __getattr__(name: str) -> Any:
    # The generator needs no torch, and exporting no ONNX Runtime.
    if name in ("Generator", "Timing"):
        from . import generator

        return getattr(generator, name)
    if name in ("export_checkpoint", "export_model"):
        from . import exporting

        return getattr(exporting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
