"""The two halves of a DSA layer on our operators: which keys a query attends to, and the attention to them.

Both take the modules of Transformers as they are. Attention runs in the absorbed form (DeepSeek-V2, section 2.1.2).
`kv_b_proj` holds W_k [qk_nope, rank] and W_v [v, rank] for each head. Instead of expanding the latents of the whole
cache to keys and values of every head, the query is multiplied by W_k and the output by W_v. Queries are processed in
blocks, because the absorbed queries of all heads would take more memory than everything else in the layer.

Selected rows are numbered through the keys of all sequences: row = sequence * s_kv + position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import torch_ops  # noqa: F401  # registers torch.ops.dsa_tvm
from ..errors import ArgumentError, ModelError
from ..spec import DIMS
from .ranges import boolean, unpack

#: An attribute that marks the attention classes whose `expand_kv` we have replaced.
HOOKED = "_dsa_tvm_hooked"

#: Memory for the intermediate results of one block of queries. A GPU needs larger blocks to be busy.
_BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


# The only calls of the library. An exporter replaces them by nodes.
def indexer_topk(*inputs: torch.Tensor | None, topk: int) -> torch.Tensor:
    """``torch.ops.dsa_tvm.indexer_topk``."""
    return torch.ops.dsa_tvm.indexer_topk(*inputs, topk=topk)


def lightning_indexer(*inputs: torch.Tensor | None) -> torch.Tensor:
    """``torch.ops.dsa_tvm.lightning_indexer``."""
    return torch.ops.dsa_tvm.lightning_indexer(*inputs)


def topk_indices(*inputs: torch.Tensor | None, topk: int) -> torch.Tensor:
    """``torch.ops.dsa_tvm.topk``."""
    return torch.ops.dsa_tvm.topk(*inputs, topk=topk)


def sparse_mla(*inputs: torch.Tensor | None, sm_scale: float, d_v: int) -> tuple[torch.Tensor, ...]:
    """``torch.ops.dsa_tvm.sparse_mla``."""
    return torch.ops.dsa_tvm.sparse_mla(*inputs, sm_scale=sm_scale, d_v=d_v)


@torch.no_grad()
def select(
    indexer: Any,
    rotate: Callable,
    hidden_states: torch.Tensor,
    q_latent: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    cache: Any = None,
) -> torch.Tensor:
    """The keys that each query attends to (DeepSeek-V3.2 technical report, equations 1 and 2).

    Parameters
    ----------
    indexer : DeepseekV32Indexer or GlmMoeDsaIndexer
    rotate : callable
        Rotary position embedding of the indexer: ``rotate(q, k, cos, sin, unsqueeze_dim=2)``.
    hidden_states : tensor [b, s_q, hidden]
    q_latent : tensor [b, s_q, q_lora_rank]
    position_embeddings : tuple of two tensors [1 or b, s_q, qk_rope]
        Cosine and sine.
    mask : tensor
        int32 ranges from `ranges.key_ranges`, or a dense mask, see `ranges.boolean`.
    cache : transformers.Cache, optional

    Returns
    -------
    rows : tensor [b, s_q, topk or s_kv], int32
        Rows among those of all sequences, ascending, then -1. If s_kv is at most topk, nothing is scored.
    """
    _check_type(hidden_states)
    b, s_q, _ = hidden_states.shape
    rope = indexer.qk_rope_head_dim
    cos, sin = position_embeddings
    k = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)
    k = torch.cat([rotate(k[..., :rope], k[..., :rope], cos, sin, unsqueeze_dim=2)[1], k[..., rope:]], -1).squeeze(2)
    if cache is not None:
        k = cache.update_indexer(k, indexer.layer_idx)
    s_kv, topk = k.shape[1], indexer.index_topk
    first_rows = torch.arange(b, device=k.device)[:, None] * s_kv
    dense = None
    if mask.dtype == torch.int32:
        start, end, seen = unpack(mask.to(k.device), s_kv)
    else:
        dense = boolean(mask.to(k.device), s_q, s_kv).expand(b, -1, -1)
        start, end, seen = torch.zeros_like(first_rows), torch.full_like(first_rows, s_kv), None
        start, end = start.expand(b, s_q), end.expand(b, s_q)
    start, end = start + first_rows, end + first_rows
    fits = statically_known_true(s_kv <= topk)
    width = s_kv if fits else topk
    if not fits:
        keys = widened(k.reshape(b * s_kv, -1), served("d_idx", k.shape[-1]))
        # A key whose scale is NaN is never selected.
        k_scale = None if seen is None else torch.where(seen, 1.0, torch.nan).flatten()

    def scored(part: slice) -> torch.Tensor:
        q, weights = index_queries(
            indexer, rotate, hidden_states[:, part], q_latent[:, part], (cos[:, part], sin[:, part])
        )
        q = widened(q.to(keys.dtype), keys.shape[-1])
        if dense is not None:
            return _among(dense[:, part], q, keys.view(b, s_kv, -1), weights, topk)
        rows = indexer_topk(
            q.flatten(0, 1).contiguous(),
            keys,
            weights.flatten(0, 1).contiguous(),
            start[:, part].flatten().to(torch.int32),
            end[:, part].flatten().to(torch.int32),
            k_scale,
            topk=topk,
        )
        return rows.view(b, -1, topk)

    def selected(part: slice) -> torch.Tensor:
        if fits or _all_short(start[:, part], end[:, part], topk):
            rows = _whole_ranges(start[:, part], end[:, part], width, seen)
            return rows if dense is None else torch.where(dense[:, part], rows, -1)
        return scored(part)

    bytes_each = 3 * b * indexer.n_heads * indexer.head_dim * hidden_states.element_size()
    if dense is not None:
        bytes_each += 8 * s_kv
    return _in_blocks(selected, s_q, bytes_each, k.device)


def index_queries(
    indexer: Any,
    rotate: Callable,
    hidden_states: torch.Tensor,
    q_latent: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and head weights of the indexer, as `lightning_indexer` takes them; the arguments are those of `select`.

    Returns
    -------
    q : tensor [b, s_q, h_idx, d_idx]
    weights : tensor [b, s_q, h_idx], float32
    """
    rope = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_latent).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    q_rot = rotate(q[..., :rope], q[..., :1, :rope], *position_embeddings, unsqueeze_dim=2)[0]
    x = hidden_states.to(indexer.weights_proj.weight.dtype)
    weights = indexer.weights_proj(x).float() * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    return torch.cat([q_rot, q[..., rope:]], -1), weights


def attend(
    module: Any,
    query: torch.Tensor,
    latent: torch.Tensor,
    k_rot: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every head to the selected rows, as called by the `AttentionInterface` of Transformers.

    Parameters
    ----------
    module : DeepseekV32Attention or GlmMoeDsaAttention
    query : tensor [b, h_q, s_q, qk_nope + qk_rope]
    latent : tensor [b, 1, s_kv, rank], or [b, 1, s_kv, rank + qk_rope] as `RowCache` keeps them
    k_rot : tensor [b, 1, s_kv, qk_rope], or empty
    attention_mask : tensor, optional
        Not used, because `indices` already respect it.
    scaling : float
    dropout : float
        Has to be 0.
    indices : tensor [b, s_q, n], int32
        The result of `select`.
    **kwargs
        `output_attentions` has to be false or absent.

    Returns
    -------
    out : tensor [b, s_q, h_q, v], type of `query`
    None
        In place of attention weights, which are not returned.

    Raises
    ------
    ArgumentError
        The caller asks for dropout or attention weights.
    ModelError
        The module belongs to another family, or its `kv_b_proj` has a bias.
    """
    if indices is None or not hasattr(module, HOOKED):
        raise ModelError(f"dsa_tvm: expected the attention of a DSA model that is served, got {type(module).__name__}")
    if dropout:
        raise ArgumentError(f"attention dropout: expected 0, got {dropout}: the operators serve inference only")
    if kwargs.get("output_attentions"):
        raise ArgumentError('output_attentions: expected False, got True; attn_implementation="eager" returns weights')
    _check_type(query)
    b, h, s_q, _ = query.shape
    rank, nope, rope = module.kv_lora_rank, module.qk_nope_head_dim, module.qk_rope_head_dim
    w_k, w_v = up_projections(module, h, query)
    kv, rows = _rows(latent, k_rot, indices, rank, rope)
    d_v, d_qk = served("d_v", rank), kv.shape[-1]

    def attended(part: slice) -> torch.Tensor:
        # Heads come first, so that the tokens of all sequences form one matrix for each head.
        q_nope, q_rot = query[:, :, part].transpose(0, 1).flatten(1, 2).split([nope, rope], -1)
        q = torch.cat([widened(torch.bmm(q_nope, w_k), d_v), widened(q_rot, d_qk - d_v)], -1)
        q = q.transpose(0, 1).to(kv.dtype).contiguous()
        out, _, _ = sparse_mla(q, kv, rows[:, part].flatten(0, 1), sm_scale=scaling, d_v=d_v)
        out = torch.bmm(out[..., :rank].to(query.dtype).transpose(0, 1), w_v.transpose(1, 2))
        return out.unflatten(1, (b, -1)).permute(1, 2, 0, 3)

    return _in_blocks(attended, s_q, b * h * (2 * d_qk + d_v) * query.element_size(), query.device), None


def _check_type(x: torch.Tensor) -> None:
    if x.dtype not in _TYPES:
        raise ArgumentError(f"dsa_tvm: expected a model in float32, bfloat16 or float16, got {x.dtype}")


def _in_blocks(
    compute: Callable[[slice], torch.Tensor], s_q: int, bytes_each: int, device: torch.device
) -> torch.Tensor:
    """Run `compute` for all queries, dimension 1 of its result, in blocks. Each query takes `bytes_each` of memory."""
    blocks = list(_blocks(s_q, bytes_each, device))
    if len(blocks) == 1:
        return compute(blocks[0])
    first = compute(blocks[0])
    result = first.new_empty(first.shape[0], s_q, *first.shape[2:])
    result[:, blocks[0]] = first
    for part in blocks[1:]:
        result[:, part] = compute(part)
    return result


def _blocks(s_q: int, bytes_each: int, device: torch.device) -> Iterator[slice]:
    # A graph would contain every block. A compiled prefill bounds its memory by prefill_chunk_size instead.
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    step = max(1, _BLOCK_BYTES.get(device.type, max(_BLOCK_BYTES.values())) // max(1, bytes_each))
    for first in range(0, max(1, s_q), step):
        yield slice(first, min(first + step, s_q))


def _all_short(start: torch.Tensor, end: torch.Tensor, topk: int) -> bool:
    """Whether no range is longer than topk. False on a GPU, because reading the numbers would wait for it."""
    if torch.compiler.is_compiling() or start.device.type != "cpu":
        return False
    return bool(((end - start) <= topk).all())


def _among(dense: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, topk: int) -> torch.Tensor:
    """Rows selected for a mask that is not made of ranges. All scores of one sequence are held at a time."""
    b, s_kv, _ = keys.shape
    start = torch.zeros(q.shape[1], dtype=torch.int32, device=q.device)
    end = torch.full_like(start, s_kv)
    rows = []
    for i in range(b):
        scores = lightning_indexer(q[i].contiguous(), keys[i], weights[i].contiguous(), start, end)
        # NaN is never selected. So a hidden key is not selected even if a query sees fewer than topk keys.
        selected = topk_indices(scores.masked_fill(~dense[i], torch.nan), start, end, topk=topk)
        rows.append(torch.where(selected >= 0, selected + i * s_kv, -1))
    return torch.stack(rows)


def _whole_ranges(start: torch.Tensor, end: torch.Tensor, width: int, seen: torch.Tensor | None) -> torch.Tensor:
    rows = start[..., None] + torch.arange(width, device=start.device)
    inside = rows < end[..., None]
    if seen is not None:
        flags = seen.to(start.device).flatten()
        inside = inside & flags[rows.clamp(max=flags.shape[0] - 1)]
    return torch.where(inside, rows, -1).to(torch.int32)


def up_projections(module: Any, heads: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W_k [h_q, qk_nope, rank] and W_v [h_q, v, rank] of `kv_b_proj`, which may be any module."""
    projection, rank = module.kv_b_proj, module.kv_lora_rank
    if getattr(projection, "bias", None) is not None:
        raise ModelError("kv_b_proj: expected no bias, which has no absorbed form, got one")
    plain = type(projection) is torch.nn.Linear and "forward" not in projection.__dict__
    if plain and not projection._forward_hooks and not projection._forward_pre_hooks:
        weight = projection.weight
    else:  # quantized, offloaded or with adapters: its results for unit vectors are its matrix
        weight = projection(torch.eye(rank, dtype=like.dtype, device=like.device)).transpose(0, 1)
    return weight.unflatten(0, (heads, -1)).split([module.qk_nope_head_dim, module.v_head_dim], 1)


def _rows(
    latent: torch.Tensor, k_rot: torch.Tensor, indices: torch.Tensor, rank: int, rope: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of latent and rope key in one tensor for the operator, and the indices into it."""
    parts = [latent.reshape(-1, latent.shape[-1])]
    if latent.shape[-1] == rank:  # the caches of Transformers keep the two apart
        parts.append(k_rot.reshape(-1, rope))
        _, s_q, n = indices.shape
        if statically_known_true(s_q * n < latent.shape[2]):  # decode: join only the selected rows
            flat = indices.flatten()
            parts = [part.index_select(0, flat.clamp(min=0)) for part in parts]
            here = torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device)
            indices = torch.where(flat >= 0, here, -1).view(indices.shape)
    d_v = served("d_v", rank)
    d_qk = served("d_qk", d_v + rope)
    if (d_v, d_qk) != (rank, rank + rope):  # zeros add nothing to a product
        if len(parts) == 1:
            parts = list(parts[0].split([rank, rope], -1))
        parts = [widened(parts[0], d_v), widened(parts[1], d_qk - d_v)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).contiguous(), indices


def served(dim: str, length: int) -> int:
    """The next larger length that the operators serve. If there is none, `length`: the operator then refuses it."""
    for value in DIMS[dim].values:
        if value >= length:
            return value
    return length


def widened(x: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros behind the last dimension, up to `length`."""
    return x if x.shape[-1] == length else torch.nn.functional.pad(x, (0, length - x.shape[-1]))
