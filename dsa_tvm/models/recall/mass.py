"""One layer: the probabilities of dense attention, and the part of them that a selection keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layer import index_queries, lightning_indexer, served, topk_indices, up_projections, widened

#: What a block of queries may take.
_BLOCK_BYTES = 128 << 20


@dataclass(frozen=True)
class Seen:
    """What a layer has seen of a text.

    Parameters
    ----------
    attention : DeepseekV32Attention or GlmMoeDsaAttention
    rotate, rotate_index : callable
        Rotary position embeddings of the attention and of its indexer.
    positions : tensor [n], int64
        Tokens whose queries are looked at.
    hidden_states : tensor [n, hidden]
        Theirs, normalized as the attention gets them.
    position_embeddings : tuple of two tensors [1, n, rope]
        Theirs.
    rows : tensor [s_kv, rank + rope]
        Latents and rope keys of all tokens.
    index_keys : tensor [s_kv, d_idx] or None
        Of the indexer; None for a layer that shares the selection of one before.
    """

    attention: Any
    rotate: Callable[..., Any]
    rotate_index: Callable[..., Any]
    positions: torch.Tensor
    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    rows: torch.Tensor
    index_keys: torch.Tensor | None


Selections = dict[int, torch.Tensor]


@torch.no_grad()
def selections(seen: Seen, topks: Sequence[int]) -> Selections:
    """The keys that the indexer selects.

    Parameters
    ----------
    seen : Seen
        Of a layer with an indexer.
    topks : sequence of int

    Returns
    -------
    dict of int to tensor [n, topk], int32
        Ascending, equal scores by lower index, -1 behind.
    """
    assert seen.index_keys is not None
    m, indexer, x = seen.attention, seen.attention.indexer, seen.hidden_states[None]
    q, weights = index_queries(indexer, seen.rotate_index, x, m.q_a_layernorm(m.q_a_proj(x)), seen.position_embeddings)
    width = served("d_idx", q.shape[-1])
    q, keys = widened(q[0].to(seen.index_keys.dtype), width), widened(seen.index_keys, width).contiguous()
    end = (seen.positions + 1).to(torch.int32)
    start = torch.zeros_like(end)
    found: dict[int, list[torch.Tensor]] = {topk: [] for topk in topks}
    for part in _blocks(len(end), 4 * len(keys)):
        inputs = (q[part].contiguous(), keys, weights[0, part].contiguous(), start[part], end[part])
        scores = lightning_indexer(*inputs)
        for topk, blocks in found.items():
            blocks.append(topk_indices(scores, start[part], end[part], topk=topk))
    return {topk: torch.cat(blocks) for topk, blocks in found.items()}


@torch.no_grad()
def masses(seen: Seen, selected: Mapping[int, torch.Tensor]) -> dict[str, dict[int, torch.Tensor]]:
    """The probability that dense attention gives to the selected keys, the mean over the heads.

    Probabilities are computed in float32, for a block of queries at a time.

    Parameters
    ----------
    seen : Seen
    selected : mapping of int to tensor [n, topk], int32
        As of `selections`.

    Returns
    -------
    dict of str to dict of int to tensor [n], float64
        By topk: "selected", what the selected keys hold; "best", what as many keys hold at most; "recent", what as
        many last keys hold.
    """
    m, s_kv = seen.attention, len(seen.rows)
    # Of a query: the mean, its running sum and one head's scores, and the absorbed query of every head.
    taken = 40 * s_kv + 4 * m.num_heads * (m.kv_lora_rank + m.qk_rope_head_dim)
    found: dict[str, dict[int, list[torch.Tensor]]] = {
        name: {topk: [] for topk in selected} for name in ("selected", "best", "recent")
    }
    for part in _blocks(len(seen.positions), taken):
        p = _probabilities(seen, part)
        ends = seen.positions[part] + 1
        upto = torch.cat([p.new_zeros(len(p), 1), p.cumsum(-1)], -1)
        for topk, indices in selected.items():
            chosen = indices[part].long()
            kept = torch.where(chosen >= 0, p.gather(1, chosen.clamp(min=0)), 0.0)
            found["selected"][topk].append(kept.sum(-1))
            found["best"][topk].append(p.topk(min(topk, s_kv), sorted=False).values.sum(-1))
            window = torch.stack([(ends - topk).clamp(min=0), ends], -1)
            before, after = upto.gather(1, window).unbind(-1)
            found["recent"][topk].append(after - before)
    return {name: {topk: torch.cat(blocks) for topk, blocks in by.items()} for name, by in found.items()}


def _probabilities(seen: Seen, part: slice) -> torch.Tensor:
    """Of dense attention, [queries, s_kv] float64: the mean over the heads, 0 for keys that come later."""
    m, x = seen.attention, seen.hidden_states[None, part]
    n, rank, rope = x.shape[1], m.kv_lora_rank, m.qk_rope_head_dim
    q = m.q_b_proj(m.q_a_layernorm(m.q_a_proj(x))).view(1, n, m.num_heads, -1).transpose(1, 2)
    q_nope, q_rope = q.split([m.qk_nope_head_dim, rope], -1)
    cos, sin = (e[:, part] for e in seen.position_embeddings)
    q_rope = seen.rotate(q_rope, q_rope[:, :1], cos, sin)[0]
    w_k, _ = up_projections(m, m.num_heads, x)
    absorbed = torch.cat([torch.bmm(q_nope[0].float(), w_k.float()), q_rope[0].float()], -1) * m.scaling
    rows = seen.rows[:, : rank + rope].float()
    later = torch.arange(len(rows)) > seen.positions[part, None]
    total = torch.zeros(n, len(rows), dtype=torch.float64)
    for head in absorbed:
        total += (head @ rows.T).masked_fill_(later, -torch.inf).softmax(-1)
    return total / m.num_heads


def _blocks(n: int, bytes_each: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // max(1, bytes_each))
    for first in range(0, n, step):
        yield slice(first, min(first + step, n))
