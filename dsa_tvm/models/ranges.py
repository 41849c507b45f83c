"""The mask of a DSA model as two numbers for each query: the first key that it may see, and one past the last.

Transformers asks the attention implementation for a mask once in each forward pass. Its own masks have the shape
`[b, 1, s_q, s_kv]`. Ours is int32 `[b, 1, s_q, 2 + n]`. The first two columns are the range, in keys of the query's
sequence. If some keys inside a range are hidden from every query, such as padding between two turns of a conversation,
`n` more columns hold one flag for each key, row by row: 1 for keys that may be seen. If the keys of a query do not form
a range even then, the mask is the boolean one of Transformers, and the scores of a block of queries are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..errors import ArgumentError

#: How many entries of a dense mask are made at a time.
_DENSE_ENTRIES = 1 << 22

_NOT_A_RANGE = (
    "attention mask: expected the keys that a query sees to be one range in a compiled model, got a mask function "
    "with gaps; without torch.compile it works"
)


def key_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """The ranges of all queries of a forward pass, as called by the `AttentionMaskInterface` of Transformers.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        b, s_q and s_kv. If the cache has a capacity, that is s_kv.
    q_offset, kv_offset : int or tensor
        Positions of the first query and of the first key.
    mask_function : callable
        Tells which keys a query sees.
    attention_mask : tensor [b, positions], bool, optional
        False for padding, at any position.
    use_vmap : bool
        Whether `mask_function` takes only single indices.
    device : torch.device or str
    **kwargs
        Ignored; other implementations need them.

    Returns
    -------
    mask : tensor [b, 1, s_q, 2 + n], int32, or [b, 1, s_q, s_kv], bool
        See the top of this module. n is 0 if no key inside a range is hidden.
    """
    if mask_function is causal_mask_function:
        end = (torch.arange(q_length, device=device) + (q_offset + 1 - kv_offset)).clamp(0, kv_length)[None]
        start = torch.zeros_like(end)
    else:
        offset: Any = q_offset  # static caches pass a tensor, which the annotation in Transformers leaves out

        def dense(first: int, length: int, padding: torch.Tensor | None = None) -> Any:
            return sdpa_mask(
                batch_size=batch_size,
                q_length=length,
                kv_length=kv_length,
                q_offset=offset + first,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=padding,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
                use_vmap=use_vmap,
                device=device,
            )

        found = _evaluated(dense, q_length, batch_size * kv_length)
        if found is None:
            return dense(0, q_length, attention_mask).expand(batch_size, 1, q_length, kv_length)
        start, end = found
    hidden = None
    if attention_mask is not None:
        seen = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        first, last = _extent(seen)
        start, end = torch.maximum(start, first[:, None]), torch.minimum(end, last[:, None])
        # While a graph is traced, nobody can know this, so the flags become part of it.
        if torch.compiler.is_compiling() or bool((seen.sum(-1) != last - first).any()):
            hidden = seen
    ranges = torch.stack([start, torch.maximum(end, start)], -1).expand(batch_size, q_length, 2).to(torch.int32)
    if hidden is not None:
        columns = (kv_length + q_length - 1) // q_length
        flags = torch.nn.functional.pad(hidden.to(torch.int32), (0, columns * q_length - hidden.shape[1]))
        ranges = torch.cat([ranges, flags.view(batch_size, q_length, columns)], -1)
    return ranges.unsqueeze(1)


def unpack(mask: torch.Tensor, s_kv: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Take a mask from `key_ranges` apart: ranges, and which keys may be seen at all.

    Parameters
    ----------
    mask : tensor [b, s_q, 2 + n], int32
    s_kv : int

    Returns
    -------
    start, end : tensor [b, s_q], int64
    seen : tensor [b, s_kv], bool, or None
        None if all keys inside the ranges may be seen.
    """
    start, end = mask[..., 0].long(), mask[..., 1].long()
    if mask.shape[-1] == 2:
        return start, end, None
    return start, end, mask[..., 2:].reshape(mask.shape[0], -1)[:, :s_kv] != 0


def boolean(mask: torch.Tensor, s_q: int, s_kv: int) -> torch.Tensor:
    """A dense mask from Transformers or from the caller of the model, as True for the keys that a query sees.

    Parameters
    ----------
    mask : tensor [1 or b, 1 or s_q, s_kv], bool or floating point
        Floating-point masks are added to scores: 0 for keys that are seen, the lowest number or -inf for others.
    s_q, s_kv : int

    Returns
    -------
    seen : tensor [1 or b, s_q, s_kv], bool

    Raises
    ------
    ArgumentError
        The mask has another shape, or it contains biases.
    """
    if mask.shape[-1] != s_kv or mask.shape[-2] not in (1, s_q):
        raise ArgumentError(
            f"attention mask: expected [..., {s_q}, {s_kv}] for queries and keys, got [..., "
            f"{mask.shape[-2]}, {mask.shape[-1]}]"
        )
    seen = mask
    if mask.dtype != torch.bool:
        seen = mask == 0
        hidden = mask < torch.finfo(mask.dtype).min / 2
        _require((seen | hidden).all(), "attention mask: expected 0 or the lowest number, got a bias")
    return seen.expand(-1, s_q, -1)


def _evaluated(dense: Callable, q_length: int, entries: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ranges [b, s_q] of a mask function, from its dense mask, some queries at a time; None if they have gaps."""
    compiling = torch.compiler.is_compiling()
    step = q_length if compiling else max(1, _DENSE_ENTRIES // max(1, entries))
    pieces = []
    for first in range(0, q_length, step):
        seen = dense(first, min(step, q_length - first))[:, 0]
        start, end = _extent(seen)
        whole = (seen.sum(-1) == end - start).all()
        if compiling:
            _require(whole, _NOT_A_RANGE)
        elif not bool(whole):
            return None
        pieces.append((start, end))
    return torch.cat([p[0] for p in pieces], -1), torch.cat([p[1] for p in pieces], -1)


def _extent(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and one past the last True along the last dimension; 0 and 0 if there is none."""
    positions = torch.arange(seen.shape[-1], dtype=torch.int32, device=seen.device)
    end = torch.where(seen, positions + 1, 0).amax(-1)
    start = torch.where(seen, positions, seen.shape[-1]).amin(-1)
    return torch.minimum(start, end), end


def _require(condition: torch.Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)  # checked when the graph runs
    elif not bool(condition):
        raise ArgumentError(message)
