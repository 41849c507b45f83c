"""Greedy tokens over 64 steps with Transformers' eager attention and ours: the short form of `agreement`."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from agreement import Swap, _is_best, check, compare, generate, layer_of, scores_and_bounds
from small_models import TOPK, make, prompt

STEPS, LENGTH = 64, 320


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["deepseek-yarn", "glm-shared"])
def test_tokens_logits_and_selections(kind, batch):
    """Batches have padding on the left. Selections may differ in scores that sums in float32 cannot tell apart."""
    found = check(kind, batch, LENGTH, STEPS)
    assert found.dropping == found.rows - 2 * batch * TOPK  # two layers select
    assert found.tokens and not found.wrong
    # Another key among the lowest that are selected changes what comes behind it.
    assert found.logits <= (1e-2 if found.ties or found.rounding else 1e-5) * found.size
    print(
        f"{kind}, batch {batch}: of {found.rows} selections {found.ties} differ in ties, "
        f"{len(found.rounding)} by rounding",
        *found.rounding,
        sep="\n",
    )


def test_the_bound_holds():
    """Scores by torch in float32, of inputs that are exact in it."""
    layer = layer_of(make("deepseek").config)
    random = np.random.default_rng(0)
    q, k, weights = (random.standard_normal(n).astype(np.float32) for n in ((40, 32, 128), (40, 128), (40, 32)))
    got = torch.einsum(
        "qh,qhk->qk", torch.from_numpy(weights), torch.einsum("qhd,kd->qhk", *map(torch.from_numpy, (q, k))).relu()
    )
    inputs = [x.astype(np.float64) for x in (q, k, weights)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agreement.index_inputs", lambda *args: inputs)
        scores, bounds = scores_and_bounds(layer, {}, np.zeros((40, 1)))
    seen = np.isfinite(scores)
    error = np.abs(got.numpy() - scores)[seen]
    assert error.max() > 0 and (error <= bounds[seen]).all()
    assert (error > bounds[seen] / 100).any()  # a bound that says something


def test_a_swap_is_within_rounding_or_wrong():
    """Two keys at the end of a selection, moved together and apart."""
    bounds = np.full(4, 1e-6)
    one, other = np.array([True, True, False, False]), np.array([True, False, True, False])
    for apart, within in ((0.0, True), (1.9e-6, True), (2.1e-6, False)):
        swap = Swap.between(np.array([3, 1 + apart, 1, 0]), bounds, one, other)
        assert swap.keys == (1, 2) and swap.within == within
        assert _is_best(np.array([3, 1 + apart, 1, 0]), bounds, other) == within
    assert Swap.between(np.arange(4.0), bounds, one, one) is None


def test_a_wrong_selection_is_found():
    """One key of one query exchanged, and ties that few heads make."""
    model = make("deepseek", num_hidden_layers=1, index_n_heads=4)
    ids, mask = prompt(1, LENGTH)
    expected, got = (generate(model, name, ids, mask, 2) for name in ("eager", "dsa_tvm"))
    found = compare(model, mask, expected, got)
    assert found.ties > 5 and not found.wrong
    row = got.selected[0][0, 200]
    chosen, other = row.nonzero()[0], (~row[:200]).nonzero()[0]
    row[chosen], row[other] = False, True
    assert len(compare(model, mask, expected, got).wrong) == 1
