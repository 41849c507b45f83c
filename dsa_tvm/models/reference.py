"""One DSA attention layer in float64 NumPy, written from the papers and slow on purpose.

Multi-head latent attention is that of DeepSeek-V2, section 2.1, in its plain form, which expands the keys and values of
every head. The indexer is equation 1 of the DeepSeek-V3.2 technical report, the selection its equation 2. Rotary
embedding is that of RoFormer, section 3.2.2, scaled by YaRN, section 3, if the configuration says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layer:
    """Sizes and conventions of a layer.

    Parameters
    ----------
    heads, qk_nope, qk_rope, v, kv_rank : int
        The number of heads; the widths of a head's key without and with position and of its value; the width of the
        latent.
    index_heads, index_dim, topk : int
    rope : mapping
        `rope_theta` and `rope_type`. For "yarn" also `factor` and `original_max_position_embeddings`, and, if they
        differ from the paper, `beta_fast`, `beta_slow`, `mscale` and `mscale_all_dim`.
    index_interleaved : bool
        Whether the indexer rotates neighbours (GLM-5) or the halves of its first `qk_rope` numbers (DeepSeek-V3.2).
        The attention itself always rotates neighbours.
    hadamard : bool
        Whether the indexer's queries and keys are rotated by a Hadamard matrix, which changes no product.
    """

    heads: int
    qk_nope: int
    qk_rope: int
    v: int
    kv_rank: int
    index_heads: int
    index_dim: int
    topk: int
    rope: Mapping[str, Any]
    index_interleaved: bool
    hadamard: bool = False

    @property
    def sm_scale(self) -> float:
        """``(qk_nope + qk_rope)**-0.5``, times the square of YaRN's mscale."""
        scale = (self.qk_nope + self.qk_rope) ** -0.5
        if self.rope.get("rope_type", "default") == "yarn" and self.rope.get("mscale_all_dim"):
            scale *= _mscale(self.rope["factor"], self.rope["mscale_all_dim"]) ** 2
        return scale


class Output(NamedTuple):
    """The results of a layer: its output, its selection, and the scores of the selection."""

    out: Array
    indices: Array
    scores: Array | None


def attention(
    layer: Layer,
    weights: Mapping[str, Array],
    x: Array,
    positions: Array,
    *,
    first: int = 0,
    indices: Array | None = None,
) -> Output:
    """Compute the layer for one sequence.

    Parameters
    ----------
    layer : Layer
    weights : mapping of str to ndarray
        By the names in checkpoints without ``model.layers.N.self_attn.``.
    x : ndarray [s, hidden]
        Normalized hidden states.
    positions : ndarray [s], int
    first : int
        The first token that is not padding. No query sees padding.
    indices : ndarray [s, topk], int, optional
        A selection to use, as in a layer that shares that of an earlier layer; -1 stands for none.

    Returns
    -------
    out : ndarray [s, hidden], float64
        0 for a query that sees nothing.
    indices : ndarray [s, topk], int64
        Selected keys, ascending, then -1.
    scores : ndarray [s, s], float64, or None
        Scores of the indexer, -inf for keys that a query may not see; None if `indices` are given.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = np.asarray(x, np.float64)
    s = x.shape[0]
    angles = _angles(layer, positions)
    q_latent = _rms_norm(_linear(w, "q_a_proj", x), w["q_a_layernorm.weight"])
    scores = None
    if indices is None:
        scores = index_scores(layer, w, x, positions, first=first)
        indices = _select(scores, layer.topk)

    q = _linear(w, "q_b_proj", q_latent).reshape(s, layer.heads, -1)
    q_nope, q_rope = q[..., : layer.qk_nope], _rotate(q[..., layer.qk_nope :], angles, interleaved=True)
    compressed = _linear(w, "kv_a_proj_with_mqa", x)
    latent = _rms_norm(compressed[:, : layer.kv_rank], w["kv_a_layernorm.weight"])
    k_rope = _rotate(compressed[:, None, layer.kv_rank :], angles, interleaved=True)[:, 0]
    expanded = (latent @ w["kv_b_proj.weight"].T).reshape(s, layer.heads, layer.qk_nope + layer.v)
    k_nope, value = expanded[..., : layer.qk_nope], expanded[..., layer.qk_nope :]

    heads_out = np.zeros((s, layer.heads, layer.v))
    for t in range(s):
        keys = indices[t][indices[t] >= 0]
        if not len(keys):
            continue
        logits = np.einsum("hd,khd->hk", q_nope[t], k_nope[keys]) + q_rope[t] @ k_rope[keys].T
        logits = logits * layer.sm_scale
        p = np.exp(logits - logits.max(-1, keepdims=True))
        heads_out[t] = np.einsum("hk,khv->hv", p / p.sum(-1, keepdims=True), value[keys])
    return Output(_linear(w, "o_proj", heads_out.reshape(s, -1)), indices, scores)


def index_scores(layer: Layer, weights: Mapping[str, Array], x: Array, positions: Array, *, first: int = 0) -> Array:
    """Scores [s, s] of the indexer, -inf for keys that a query may not see. Arguments are those of `attention`."""
    return scores_of(*index_inputs(layer, weights, x, positions), first=first)


def scores_of(q: Array, k: Array, head_weights: Array, *, first: int = 0) -> Array:
    """`index_scores` by what `index_inputs` returns."""
    s = len(q)
    scores = np.full((s, s), -np.inf)
    for t in range(first, s):
        scores[t, first : t + 1] = head_weights[t] @ np.maximum(q[t] @ k[first : t + 1].T, 0)
    return scores


def index_inputs(layer: Layer, weights: Mapping[str, Array], x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Queries [s, index_heads, index_dim], keys [s, index_dim] and head weights [s, index_heads] of the indexer.

    Arguments are those of `attention`.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x, angles = np.asarray(x, np.float64), _angles(layer, positions)
    q_latent = _rms_norm(_linear(w, "q_a_proj", x), w["q_a_layernorm.weight"])
    rope = layer.qk_rope
    q = _linear(w, "indexer.wq_b", q_latent).reshape(len(x), layer.index_heads, layer.index_dim)
    k = _layer_norm(_linear(w, "indexer.wk", x), w["indexer.k_norm.weight"], w["indexer.k_norm.bias"])[:, None]
    q, k = (
        np.concatenate([_rotate(a[..., :rope], angles, layer.index_interleaved), a[..., rope:]], -1) for a in (q, k)
    )
    if layer.hadamard:
        q, k = q @ hadamard(layer.index_dim), k @ hadamard(layer.index_dim)
    head_weights = _linear(w, "indexer.weights_proj", x) * (layer.index_heads**-0.5 * layer.index_dim**-0.5)
    return q, k[:, 0], head_weights


def _select(scores: Array, topk: int) -> Array:
    """Indices of the `topk` largest of each row, ascending, then -1. Of equal values the lower index is preferred."""
    indices = np.full((scores.shape[0], topk), -1, np.int64)
    for t, row in enumerate(scores):
        best = np.argsort(-row, kind="stable")[:topk]
        best = np.sort(best[row[best] > -np.inf])
        indices[t, : len(best)] = best
    return indices


def hadamard(n: int) -> Array:
    """Sylvester's matrix of order `n`, a power of two, scaled to be orthogonal."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * n**-0.5


def _linear(w: Mapping[str, Array], name: str, x: Array) -> Array:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _rms_norm(x: Array, weight: Array, eps: float = 1e-6) -> Array:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def _layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred * centred, -1, keepdims=True) + eps) * weight + bias


def _angles(layer: Layer, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine [s, qk_rope / 2], multiplied by YaRN's magnitude factor."""
    frequencies, magnitude = frequencies_of(layer.rope, layer.qk_rope)
    angle = np.asarray(positions, np.float64)[:, None] * frequencies
    return magnitude * np.cos(angle), magnitude * np.sin(angle)


def frequencies_of(rope: Mapping[str, Any], dim: int) -> tuple[Array, float]:
    """Frequencies [dim / 2] of a rotary embedding, and the factor of its cosines and sines.

    Raises
    ------
    ValueError
        `rope_type` is neither "default" nor "yarn".
    """
    base = float(rope["rope_theta"])
    frequencies = base ** (-np.arange(0, dim, 2) / dim)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return frequencies, 1.0
    if kind != "yarn":
        raise ValueError(f"rope_type: expected default or yarn, got {kind}")
    factor, length = rope["factor"], rope["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        """The pair that makes this many turns within the original length."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension_of(rope.get("beta_slow") or 1)), dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    frequencies = frequencies * (1 - slow) + frequencies / factor * slow
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return frequencies, _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    return frequencies, _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _rotate(x: Array, angles: tuple[Array, Array], interleaved: bool) -> Array:
    """Rotate each pair of numbers of `x` [s, heads, dim] by its angle. Pairs are neighbours, or i and i + dim / 2."""
    cos, sin = (a[:, None] for a in angles)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = a * cos - b * sin, b * cos + a * sin
    return np.stack(turned, -1).reshape(x.shape) if interleaved else np.concatenate(turned, -1)
