"""Whether a model computes with our attention what it computes without: tokens, logits, selections.

``python tests/models/agreement.py`` compares greedy tokens with those of Transformers' eager attention for prompts of
300 to 3000 tokens, which takes about 20 minutes on two cores; `--lengths`, `--kinds` and `--steps` choose less.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from small_models import KINDS, make, prompt, weights_of

from dsa_tvm.models import transformers as door  # noqa: F401  # registers attn_implementation="dsa_tvm"
from dsa_tvm.models.reference import Layer, attention, index_inputs, scores_of

#: Unit roundoff of float32.
UNIT = 2.0**-24


def layer_of(config, **changes) -> Layer:
    """The reference's description of a model's layers."""
    return Layer(
        **{
            "heads": config.num_attention_heads,
            "qk_nope": config.qk_nope_head_dim,
            "qk_rope": config.qk_rope_head_dim,
            "v": config.v_head_dim,
            "kv_rank": config.kv_lora_rank,
            "index_heads": config.index_n_heads,
            "index_dim": config.index_head_dim,
            "topk": config.index_topk,
            "rope": config.rope_parameters,
            "index_interleaved": config.model_type == "glm_moe_dsa",
        }
        | changes
    )


def scores_and_bounds(layer: Layer, weights: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [s, s] of an indexer in float64, -inf for later keys, and what sums in float32 may be off.

    The error of ``sum_h weights * relu(q . k)`` is bounded by ``sqrt(n) u`` times the sum of the products' magnitudes,
    where n is the number of roundings that a product meets (Higham and Mary, A new approach to probabilistic rounding
    error analysis, 2019). The rounding of q, k and weights before the sums is not counted.
    """
    q, k, head_weights = index_inputs(layer, weights, x, np.arange(len(x)))
    relative = UNIT * (layer.index_dim + layer.index_heads) ** 0.5
    bounds = np.zeros((len(x), len(x)))
    for t in range(len(x)):
        bounds[t, : t + 1] = relative * (np.abs(head_weights[t]) @ (np.abs(q[t]) @ np.abs(k[: t + 1]).T))
    return scores_of(q, k, head_weights), bounds


@dataclass
class Run:
    """What one greedy generation was.

    Parameters
    ----------
    tokens : tensor [b, new]
    logits : tensor [b, new, vocab]
    hidden : dict of int to tensor [b, s, hidden]
        What went into each layer that has an indexer.
    selected : dict of int to tensor [b, s, s], bool
        Which keys the queries of these layers attend to, before the mask.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    hidden: dict[int, torch.Tensor]
    selected: dict[int, torch.Tensor]


def reference_logits(model, run: Run, ids: torch.Tensor) -> tuple[np.ndarray, int]:
    """Logits [s, vocab] of a sequence in float64, with the attention of `dsa_tvm.models.reference`.

    Selections are those of `run`, a generation of batch 1 over these tokens: a key more or less changes everything
    behind it. They have to be the reference's own, but for keys whose scores are within rounding of each other; the
    second result is the number of queries with such keys.
    """
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the others have no float64
    layer, last, near = layer_of(model.config), None, 0

    def replaced(module, args, kwargs, output):
        nonlocal last, near
        x = kwargs["hidden_states"][0].numpy()
        positions, weights = np.arange(len(x)), weights_of(module)
        if module.indexer is not None:
            chosen = run.selected[module.layer_idx][0].tril().numpy()
            scores, bounds = scores_and_bounds(layer, weights, x)
            last = np.full((len(x), layer.topk), -1)
            for t, (row, keys) in enumerate(zip(scores, chosen, strict=True)):
                best = np.argsort(-row, kind="stable")[: min(layer.topk, t + 1)]
                own = np.isin(np.arange(len(row)), best)
                swap = Swap.between(row, bounds[t], own, keys)
                assert keys.sum() == len(best) and (swap is None or swap.within), (t, swap)
                near += swap is not None
                last[t, : len(best)] = np.flatnonzero(keys)
        made = attention(layer, weights, x, positions, indices=last)
        return torch.from_numpy(made.out)[None], *output[1:]

    for block in model.model.layers:
        block.self_attn.register_forward_hook(replaced, with_kwargs=True)
    with torch.no_grad():
        return model(ids[None]).logits[0].numpy(), near


@contextmanager
def recorded(model, length: int, hidden: dict, selected: dict) -> Iterator[None]:
    """Hooks that keep what went into each layer with an indexer, and what that selected."""

    def went_in(module, args, kwargs):
        hidden.setdefault(module.layer_idx, []).append(kwargs["hidden_states"])

    def chose(module, args, rows):
        b, s_q, _ = rows.shape
        ours = module.config._attn_implementation == "dsa_tvm"
        keys = sum(x.shape[1] for x in hidden[module.layer_idx])
        # Ours count through the keys of all sequences joined, -1 behind; theirs are positions.
        at = rows.long() - torch.arange(b)[:, None, None] * keys * ours
        mask = torch.zeros(b, s_q, length + 1, dtype=torch.bool)
        mask.scatter_(-1, torch.where(rows >= 0, at, length), True)
        selected.setdefault(module.layer_idx, []).append(mask[..., :length])

    hooks = []
    for block in model.model.layers:
        if block.self_attn.indexer is not None:
            hooks.append(block.self_attn.register_forward_pre_hook(went_in, with_kwargs=True))
            hooks.append(block.self_attn.indexer.register_forward_hook(chose))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generate(model, implementation: str, ids: torch.Tensor, mask: torch.Tensor, new: int) -> Run:
    """A greedy generation by Transformers, and what was selected in it."""
    hidden: dict[int, list[torch.Tensor]] = {}
    selected: dict[int, list[torch.Tensor]] = {}
    model.set_attn_implementation(implementation)
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    length = ids.shape[1] + new - 1  # the last token is no input
    with torch.no_grad(), recorded(model, length, hidden, selected):
        made = model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)
    return Run(
        made.sequences[:, ids.shape[1] :],
        torch.stack(made.logits, 1),
        {i: torch.cat(x, 1) for i, x in hidden.items()},
        {i: torch.cat(x, 1) for i, x in selected.items()},
    )


@dataclass
class Swap:
    """Two keys of a query, each selected by one of two runs only: those whose scores are the farthest apart.

    Parameters
    ----------
    keys : tuple of two int
    scores : tuple of two float
        In float64.
    bound : float
        What float32 may be off in both scores together.
    where : str
    """

    keys: tuple[int, int]
    scores: tuple[float, float]
    bound: float
    where: str = ""

    @property
    def apart(self) -> float:
        """Between the scores; 0 is an exact tie."""
        return abs(self.scores[0] - self.scores[1])

    @property
    def within(self) -> bool:
        """Whether rounding the sums to float32 can turn the two around."""
        return self.apart <= self.bound

    @classmethod
    def between(cls, scores: np.ndarray, bounds: np.ndarray, one: np.ndarray, other: np.ndarray) -> Swap | None:
        """Of two selections, bool [s], of equal size. None if they are equal."""
        left, right = np.flatnonzero(one & ~other), np.flatnonzero(other & ~one)
        if not (len(left) and len(right)):
            return None
        excess = np.abs(scores[left, None] - scores[right]) - bounds[left, None] - bounds[right]
        i, j = np.unravel_index(excess.argmax(), excess.shape)
        a, b = int(left[i]), int(right[j])
        return cls((a, b), (float(scores[a]), float(scores[b])), float(bounds[a] + bounds[b]))

    def __str__(self) -> str:
        return (
            f"{self.where}: keys {self.keys[0]} and {self.keys[1]} have scores {self.scores[0]:.10f} and "
            f"{self.scores[1]:.10f}, {self.apart:.1e} apart; sums in float32 may be off by {self.bound:.1e}"
        )


@dataclass
class Agreement:
    """How two generations differ.

    Parameters
    ----------
    tokens : bool
        Whether they are equal.
    logits : float
        Largest difference; and `size`, the largest logit.
    rows : int
        Queries whose selection was compared, in all layers with an indexer, and `dropping`, those that drop keys.
    ties : int
        Of them, those that differ in keys of exactly equal score.
    rounding : list of Swap
        Those that differ in keys whose scores in float64 are no farther apart than what float32 may be off.
    followed : int
        Those whose inputs differ because a layer below selected another key by rounding. Each is right for its input.
    wrong : list of str
        Others.
    """

    tokens: bool
    logits: float
    size: float
    rows: int = 0
    dropping: int = 0
    ties: int = 0
    rounding: list[Swap] = field(default_factory=list)
    followed: int = 0
    wrong: list[str] = field(default_factory=list)


def compare(model, mask: torch.Tensor, expected: Run, got: Run) -> Agreement:
    """Compare a generation with that of eager attention, after prompts with this attention mask."""
    result = Agreement(
        torch.equal(expected.tokens, got.tokens),
        float((expected.logits - got.logits).abs().max()),
        float(expected.logits.abs().max()),
    )
    layer = layer_of(model.config)
    for i, hidden in expected.hidden.items():
        s = hidden.shape[1]
        causal = torch.ones(s, s, dtype=torch.bool).tril()
        for b, first in enumerate((mask == 0).sum(-1).tolist()):
            seen = causal[first:, first:]
            theirs, ours = (run.selected[i][b, first:, first:] & seen for run in (expected, got))
            result.rows += s - first
            result.dropping += int((seen.sum(-1) > layer.topk).sum())
            differing = (theirs != ours).any(-1).nonzero().flatten().tolist()
            if not differing:
                continue
            weights = weights_of(model.model.layers[i].self_attn)
            (scores, bounds), (own, own_bounds) = (
                scores_and_bounds(layer, weights, run.hidden[i][b, first:].numpy()) for run in (expected, got)
            )
            for t in differing:
                swap = Swap.between(scores[t], bounds[t], theirs[t].numpy(), ours[t].numpy())
                where = f"layer {i}, sequence {b}, query {t}"
                if swap is not None and theirs[t].sum() == ours[t].sum() and swap.within:
                    swap.where = where
                    if swap.apart:
                        result.rounding.append(swap)
                    else:
                        result.ties += 1
                elif _is_best(scores[t], bounds[t], theirs[t].numpy()) and _is_best(
                    own[t], own_bounds[t], ours[t].numpy()
                ):
                    result.followed += 1
                else:
                    result.wrong.append(f"{where}: {swap}")
    return result


def _is_best(scores: np.ndarray, bounds: np.ndarray, chosen: np.ndarray) -> bool:
    """Whether no key that was left out has a score above one that was chosen, but for rounding."""
    left_out = np.isfinite(scores) & ~chosen
    if not chosen.any() or not left_out.any():
        return True
    return bool((scores - bounds)[left_out].max() <= (scores + bounds)[chosen].min())


def check(kind: str, batch: int, length: int, new: int) -> Agreement:
    """Eager attention and ours after the same prompts: one of `length` tokens, others with padding on their left."""
    model = make(kind)
    ids, mask = prompt(batch, length, length // 8)
    expected, got = (generate(model, name, ids, mask, new) for name in ("eager", "dsa_tvm"))
    return compare(model, mask, expected, got)


def main() -> None:
    """Print a table, a line for each comparison and for each selection that rounding has changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 1000, 3000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    print(
        "model          batch prompt  tokens  logits differ by  rows that drop   ties  rounding  followed  wrong",
        flush=True,
    )
    for kind in args.kinds:
        for length in args.lengths:
            for batch in args.batches:
                started = time.perf_counter()
                a = check(kind, batch, length, args.steps)
                differ = f"{a.logits:.1e} of {a.size:.1f}"
                print(
                    f"{kind:<14} {batch:5} {length:6}  {'equal' if a.tokens else 'OTHER'}  {differ:>16}  "
                    f"{a.dropping:6} of {a.rows:<6} {a.ties:5}  {len(a.rounding):8}  {a.followed:8}  {len(a.wrong):5}  "
                    f"({time.perf_counter() - started:.0f} s)",
                    flush=True,
                )
                for line in (*a.rounding, *a.wrong):
                    print(f"    {line}", flush=True)


if __name__ == "__main__":
    main()
