"""A text through a checkpoint, one layer in memory at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import ArgumentError
from ..checkpoint import Checkpoint
from ..families import cache_name, check_module
from ..ranges import key_ranges
from ..row_cache import RowCache
from ..transformers import NAME  # importing it registers the implementation
from .mass import Seen


class Walk:
    """The layers of a checkpoint over one text; a context manager that closes its files.

    Parameters
    ----------
    checkpoint : Path
    dtype : torch.dtype
    tokens : tensor [s], int64
    positions : tensor [n], int64
        Tokens whose queries are looked at.
    layers : tuple of two int, optional
        First layer of interest, and one past the last; those before it run, too.
    chunk : int
        Tokens that go through a layer at a time.

    Raises
    ------
    ArgumentError
        A token that the vocabulary does not have, more tokens than the model has positions, or layers that it does not
        have.
    ModelError
        As `Checkpoint`.

    Attributes
    ----------
    layers : range
        Those of interest.
    """

    def __init__(
        self,
        checkpoint: Path,
        dtype: torch.dtype,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        layers: tuple[int, int] | None = None,
        chunk: int = 512,
    ) -> None:
        self._checkpoint = Checkpoint(checkpoint, dtype=dtype)
        config = self._checkpoint.config
        self.layers = range(*(layers or (0, config.num_hidden_layers)))
        self._tokens, self._positions, self._chunk = tokens, positions, chunk
        self._check(config)
        config._attn_implementation = NAME

    def _check(self, config: Any) -> None:
        if not (self.layers and self.layers.stop <= config.num_hidden_layers):
            raise ArgumentError(
                f"recall: layers: expected a range within 0:{config.num_hidden_layers}, "
                f"got {self.layers.start}:{self.layers.stop}"
            )
        wrong = self._tokens[(self._tokens < 0) | (self._tokens >= config.vocab_size)]
        if len(wrong):
            raise ArgumentError(f"recall: text: expected tokens 0..{config.vocab_size - 1}, got {int(wrong[0])}")
        if not 1 <= len(self._tokens) <= config.max_position_embeddings:
            raise ArgumentError(
                f"recall: text: expected 1..{config.max_position_embeddings} tokens, got {len(self._tokens)}; "
                "--tokens cuts it"
            )

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpoint.__exit__(*error)

    @torch.no_grad()
    def run(self, say: Callable[[str], None]) -> Iterator[tuple[int, Seen]]:
        """Each layer's number and what it has seen, from 0 to the last of `layers`; `say` is told of each before."""
        config, family = self._checkpoint.config, self._checkpoint.family
        module, s = family.module, len(self._tokens)
        embedding = self._checkpoint.read(
            lambda: torch.nn.Embedding(config.vocab_size, config.hidden_size), "model.embed_tokens."
        )
        hidden = embedding(self._tokens)[None]
        del embedding
        cos, sin = getattr(module, f"{family.prefix}RotaryEmbedding")(config)(hidden, torch.arange(s)[None])
        selected: list[torch.Tensor] = []
        for number in range(self.layers.stop):
            say(f"layer {number}")
            made = getattr(module, f"{family.prefix}DecoderLayer")
            layer = self._checkpoint.read(lambda: made(config, number), f"model.layers.{number}.")  # noqa: B023
            check_module(layer.self_attn)
            cache = RowCache(config, capacity=s)
            normed = layer.input_layernorm(hidden[:, self._positions])
            selected = self._through(layer, number, hidden, (cos, sin), cache, selected)
            kept: Any = cache.layers[number]
            yield (
                number,
                Seen(
                    attention=layer.self_attn,
                    rotate=module.apply_rotary_pos_emb_interleave,
                    rotate_index=getattr(module, family.indexer_rotation),
                    positions=self._positions,
                    hidden_states=normed[0],
                    position_embeddings=(cos[:, self._positions], sin[:, self._positions]),
                    rows=kept.keys[0, 0, :s],
                    index_keys=None if kept.indexer_keys is None else kept.indexer_keys[0, :s],
                ),
            )

    def _through(
        self, layer: Any, number: int, hidden: torch.Tensor, rotary: Any, cache: Any, selected: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Replace hidden states by those behind a layer; the selections of its chunks, for a layer that shares them."""
        s = hidden.shape[1]
        parameters = inspect.signature(layer.forward).parameters
        name = cache_name(layer.forward)
        found = []
        for i, first in enumerate(range(0, s, self._chunk)):
            part = slice(first, min(first + self._chunk, s))
            more = {"prev_topk_indices": selected[i] if selected else None} if "prev_topk_indices" in parameters else {}
            out = layer(
                hidden[:, part],
                attention_mask=key_ranges(1, part.stop - first, s, q_offset=first),
                position_ids=torch.arange(first, part.stop)[None],
                use_cache=True,
                position_embeddings=tuple(x[:, part] for x in rotary),
                **{name: cache},
                **more,
            )
            if isinstance(out, tuple):
                out, indices = out
                found.append(indices)
            hidden[:, part] = out
        return found
