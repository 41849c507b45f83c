"""Multi-head latent attention without selection (DeepSeek-V2, section 2.1), in the fastest forms that torch has.

The cache is rows of latent and rope key, [s_kv, rank + rope], as sparse attention has it. A form says how the heads
read it: absorbed ones multiply W_k into the queries and read the rows as they are; expanded ones make keys and values
of every head first, some heads at a time. Which is faster depends on the number of queries, on the length and on the
machine, so it is tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from ...models.layer import up_projections

#: What the scores of a block of queries, or the keys and values of a group of heads, may take.
_SCORES_BYTES, _EXPANDED_BYTES = 256 << 20, 512 << 20
#: Heads that a form is tried on.
_TRIED = 8


class Heads(NamedTuple):
    """What some heads attend with.

    Parameters
    ----------
    q_nope : tensor [h, s_q, nope]
    q_rope : tensor [h, s_q, rope]
    w_k : tensor [h, nope, rank]
    w_v : tensor [h, v, rank]
    """

    q_nope: torch.Tensor
    q_rope: torch.Tensor
    w_k: torch.Tensor
    w_v: torch.Tensor

    def some(self, part: slice) -> Heads:
        """Fewer of them."""
        return Heads(*(x[part] for x in self))


Form = Callable[[Heads, torch.Tensor, float], torch.Tensor]


def absorbed(heads: Heads, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Products, softmax and products over the rows.

    Parameters
    ----------
    heads : Heads
    rows : tensor [s_kv, rank + rope]
        The last s_q are those of the queries.
    scale : float

    Returns
    -------
    out : tensor [h, s_q, v]
    """
    q = torch.cat([torch.bmm(heads.q_nope, heads.w_k), heads.q_rope], -1) * scale
    h, s_q, _ = q.shape
    s_kv, rank = len(rows), heads.w_k.shape[-1]
    out = q.new_empty(h, s_q, rank)
    step = max(1, _SCORES_BYTES // (h * s_kv * q.element_size()))
    for first in range(0, s_q, step):
        last = min(first + step, s_q)
        seen = rows[: s_kv - s_q + last]
        scores = (q[:, first:last].flatten(0, 1) @ seen.T).view(h, last - first, -1)
        _hide(scores)
        out[:, first:last] = (scores.softmax(-1).flatten(0, 1) @ seen[:, :rank]).view(h, last - first, rank)
    return torch.bmm(out, heads.w_v.transpose(1, 2))


def absorbed_sdpa(heads: Heads, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """`scaled_dot_product_attention` with the heads of one query as the queries of one head; as `absorbed`."""
    rank = heads.w_k.shape[-1]
    q = torch.cat([torch.bmm(heads.q_nope, heads.w_k), heads.q_rope], -1).transpose(0, 1)[None]
    out = scaled_dot_product_attention(q, rows[None, None], rows[None, None], scale=scale)[0, 0, :, None, :rank]
    return torch.bmm(out, heads.w_v.transpose(1, 2))


def expanded(heads: Heads, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Keys and values of every head, then products, softmax and products; as `absorbed`."""
    h, s_q, _ = heads.q_nope.shape
    s_kv, rank = len(rows), heads.w_k.shape[-1]
    q = torch.cat([heads.q_nope, heads.q_rope], -1) * scale
    outs = []
    for i in range(h):
        k = torch.cat([linear(rows[:, :rank], heads.w_k[i]), rows[:, rank:]], -1)
        v = linear(rows[:, :rank], heads.w_v[i])
        out = q.new_empty(s_q, v.shape[-1])
        step = max(1, _SCORES_BYTES // (s_kv * q.element_size()))
        for first in range(0, s_q, step):
            last = min(first + step, s_q)
            seen = s_kv - s_q + last
            scores = q[i, first:last] @ k[:seen].T
            _hide(scores[None])
            out[first:last] = scores.softmax(-1) @ v[:seen]
        outs.append(out)
    return torch.stack(outs)


def expanded_sdpa(heads: Heads, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Keys and values of every head, then `scaled_dot_product_attention`; as `absorbed`.

    Its fast kernel for CPUs wants keys and values of one width, so the narrower ones are padded.
    """
    h, s_q, nope = heads.q_nope.shape
    s_kv, rank, v = len(rows), heads.w_k.shape[-1], heads.w_v.shape[1]
    rope = rows.shape[-1] - rank
    width = max(nope + rope, v)
    mask = torch.ones(s_q, s_kv, dtype=torch.bool).tril(s_kv - s_q) if s_q > 1 else None
    q = pad(torch.cat([heads.q_nope, heads.q_rope], -1), (0, width - nope - rope))
    out = q.new_empty(h, s_q, v)
    step = max(1, _EXPANDED_BYTES // (2 * width * s_kv * q.element_size()))
    for first in range(0, h, step):
        part = slice(first, min(first + step, h))
        n = part.stop - first
        k, values = (rows.new_zeros(n, s_kv, width) for _ in range(2))
        torch.matmul(rows[:, :rank], heads.w_k[part].transpose(1, 2), out=k[..., :nope])
        k[..., nope : nope + rope] = rows[:, rank:]
        torch.matmul(rows[:, :rank], heads.w_v[part].transpose(1, 2), out=values[..., :v])
        attended = scaled_dot_product_attention(q[None, part], k[None], values[None], attn_mask=mask, scale=scale)
        out[part] = attended[0, ..., :v]
    return out


PREFILL: Mapping[str, Form] = {"expanded": expanded, "expanded, sdpa": expanded_sdpa, "absorbed": absorbed}
DECODE: Mapping[str, Form] = {"absorbed": absorbed, "absorbed, sdpa": absorbed_sdpa}


class DenseAttention:
    """The layer of an attention module of Transformers, all keys attended to.

    Parameters
    ----------
    module : DeepseekV32Attention or GlmMoeDsaAttention
        Its projections and norms are used; its indexer is not.
    rotate : callable
        Rotary position embedding of the attention, ``rotate(q, k, cos, sin)``.
    """

    def __init__(self, module: Any, rotate: Callable[..., Any]) -> None:
        self._module, self._rotate = module, rotate
        self._w_k, self._w_v = up_projections(module, module.num_heads, module.kv_b_proj.weight)
        #: The name of the form that is used, a key of `PREFILL` or `DECODE`.
        self.form: str | None = None

    @torch.no_grad()
    def __call__(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor
    ) -> torch.Tensor:
        """The layer's output.

        Parameters
        ----------
        hidden_states : tensor [1, s_q, hidden]
        position_embeddings : tuple of two tensors [1, s_q, rope]
        rows : tensor [s_kv, rank + rope]
            The cache. Its last s_q rows are written here.

        Returns
        -------
        out : tensor [1, s_q, hidden]
        """
        m = self._module
        q_nope, q_rope, k_rope, latent = self._projected(hidden_states, position_embeddings)
        s_q = hidden_states.shape[1]
        rows[len(rows) - s_q :, : m.kv_lora_rank] = latent
        rows[len(rows) - s_q :, m.kv_lora_rank :] = k_rope
        heads = Heads(q_nope, q_rope, self._w_k, self._w_v)
        forms = PREFILL if s_q > 1 else DECODE
        if self.form is None or self.form not in forms:
            self.form = self._fastest(forms, heads, rows)
        out = forms[self.form](heads, rows, m.scaling)
        return m.o_proj(out.transpose(0, 1).reshape(1, s_q, -1))

    def _projected(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        m, s_q = self._module, x.shape[1]
        rope = m.qk_rope_head_dim
        q = m.q_b_proj(m.q_a_layernorm(m.q_a_proj(x))).view(1, s_q, m.num_heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([m.qk_nope_head_dim, rope], -1)
        latent, k_rope = m.kv_a_proj_with_mqa(x).split([m.kv_lora_rank, rope], -1)
        q_rope, k_rope = self._rotate(q_rope, k_rope.view(1, 1, s_q, rope), *position_embeddings)
        return q_nope[0], q_rope[0], k_rope[0, 0], m.kv_a_layernorm(latent)[0]

    def _fastest(self, forms: Mapping[str, Form], heads: Heads, rows: torch.Tensor) -> str:
        """The form that takes the least time on some heads. A decoding token is short enough to try all of them."""
        tried = heads if heads.q_nope.shape[1] == 1 else heads.some(slice(_TRIED))
        taken = {}
        for name, form in forms.items():
            begin = time.perf_counter()
            form(tried, rows, self._module.scaling)
            taken[name] = time.perf_counter() - begin
            if heads.q_nope.shape[1] == 1:  # the first call of a few milliseconds says little
                begin = time.perf_counter()
                form(tried, rows, self._module.scaling)
                taken[name] = time.perf_counter() - begin
        return min(taken, key=lambda name: taken[name])


def _hide(scores: torch.Tensor) -> None:
    """Set [h, s_q, s_kv] to -inf where a key comes after its query; the last key is the last query's."""
    s_q = scores.shape[1]
    later = torch.ones(s_q, s_q, dtype=torch.bool).triu(1)
    scores[..., scores.shape[-1] - s_q :].masked_fill_(later, -torch.inf)
