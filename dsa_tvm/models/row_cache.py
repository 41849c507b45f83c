"""A cache for DSA models that a decoding step does not copy.

The `DynamicCache` of Transformers is concatenated at every step. Its caches also keep latent and rope key apart, but
the operators read rows that hold both. `RowCache` keeps such rows, in buffers that double when they are full.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from ..errors import ArgumentError

#: The number of tokens that fit in the first buffer.
FIRST_CAPACITY = 1024


class RowLayer(DynamicIndexedLayer):
    """Rows [b, 1, capacity, rank + qk_rope] and indexer keys [b, capacity, d_idx] of one layer.

    Both are returned whole, as from a static cache. Rows behind the last token are in no query's range.
    """

    def __init__(self, capacity: int = FIRST_CAPACITY, **kwargs: Any):
        super().__init__(**kwargs)
        self.first_capacity = max(1, capacity)
        self.length = self.indexed = self.capacity = 0

    def get_seq_length(self) -> int:
        """The number of tokens in the layer."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that the next `update` will return, and the position of the first."""
        return self._capacity_for(self.length + query_length), 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows of new tokens, and return the whole buffer.

        Parameters
        ----------
        key_states : tensor [b, 1, s_q, rank]
            Latents.
        value_states : tensor [b, 1, s_q, qk_rope]
            Rope keys.

        Returns
        -------
        rows : tensor [b, 1, capacity, rank + qk_rope]
        empty : tensor [b, 1, 1, 0]
            In place of values. It has a batch, for code that repeats or selects in both.

        Raises
        ------
        ArgumentError
            Rows for another batch than the layer holds, or of another width.
        """
        s_q, rank = key_states.shape[-2:]
        end = self.length + s_q
        width = rank + value_states.shape[-1]
        held = _held(self.keys, self.length, key_states.shape[0], width)
        self.capacity = self._capacity_for(end)
        self.keys = _with_room(held, key_states, (*key_states.shape[:2], self.capacity, width), 2)
        self.keys[:, :, self.length : end, :rank] = key_states
        self.keys[:, :, self.length : end, rank:] = value_states
        self.values = key_states.new_empty(*key_states.shape[:2], 1, 0)
        self.length = end
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Write the indexer keys [b, s_q, d_idx] of new tokens, and return the whole buffer [b, capacity, d_idx]."""
        b, s_q, width = indexer_key_states.shape
        end = self.indexed + s_q
        capacity = max(self.capacity, self._capacity_for(end))
        held = _held(self.indexer_keys, self.indexed, b, width)
        self.indexer_keys = _with_room(held, indexer_key_states, (b, capacity, width), 1)
        self.indexer_keys[:, self.indexed : end] = indexer_key_states
        self.indexed = end
        self.is_indexer_initialized = True
        self.indexer_dtype, self.indexer_device = indexer_key_states.dtype, indexer_key_states.device
        return self.indexer_keys

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. Their number is negative, as in Transformers.

        Raises
        ------
        ValueError
            The number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)
        self.indexed = min(self.indexed, self.length)

    def reset(self) -> None:
        """Forget all tokens and free the buffers."""
        super().reset()
        self.length = self.indexed = self.capacity = 0

    def _capacity_for(self, tokens: int) -> int:
        capacity = self.capacity or self.first_capacity
        while capacity < tokens:
            capacity *= 2
        return capacity


class RowCache(DynamicCache):
    """A `transformers.DynamicCache` of `RowLayer`: ``model.generate(..., past_key_values=RowCache(model.config))``.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The configuration of the model.
    capacity : int
        The number of tokens that fit in the first buffers. Buffers double when they are full.
    """

    def __init__(self, config: Any, capacity: int = FIRST_CAPACITY):
        super().__init__(config=config)
        self.layers = [RowLayer(capacity) for _ in self.layers]


def _with_room(buffer: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...], dim: int) -> torch.Tensor:
    if buffer is not None and buffer.shape[dim] >= shape[dim]:
        return buffer
    grown = like.new_zeros(shape)
    if buffer is not None:
        grown.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return grown


def _held(buffer: torch.Tensor | None, length: int, batch: int, width: int) -> torch.Tensor | None:
    """The buffer for new rows of this kind; one that holds nothing may be of another."""
    if buffer is None or (buffer.shape[0], buffer.shape[-1]) == (batch, width):
        return buffer
    if not length:
        return None
    # Writing would repeat the rows of one sequence for all.
    raise ArgumentError(
        f"RowCache: expected rows for a batch of {buffer.shape[0]} with {buffer.shape[-1]} numbers each, as those that "
        f"it holds, got a batch of {batch} with {width}"
    )
