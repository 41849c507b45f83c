"""Greedy tokens over 64 steps with Transformers' eager attention and ours: the short form of `agreement`."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from agreement import check, compare, generate
from small_models import TOPK, make, prompt

STEPS, LENGTH = 64, 320


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["deepseek-yarn", "glm-shared"])
def test_tokens_logits_and_selections(kind, batch):
    """Batches have padding on the left. Selections may differ in scores that are equal up to rounding."""
    found = check(kind, batch, LENGTH, STEPS)
    assert found.dropping == found.rows - 2 * batch * TOPK  # two layers select
    assert found.tokens and not found.wrong
    # Another key among the lowest that are selected changes what comes behind it.
    assert found.logits <= (1e-2 if found.ties or found.rounding else 1e-5) * found.size
    print(
        f"{kind}, batch {batch}: of {found.rows} selections {found.ties} differ in ties, {found.rounding} by rounding"
    )


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
