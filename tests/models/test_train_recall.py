"""The training behind README's figure of `dsa-tvm recall`, for a few steps."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import train_recall  # noqa: E402
from agreement import layer_of  # noqa: E402
from small_models import make, prompt, weights_of  # noqa: E402

from dsa_tvm.models.reference import index_scores  # noqa: E402


def test_scores_are_those_of_the_reference():
    model = make("deepseek")
    ids, _ = prompt(1, 40)
    with train_recall.dense(model) as noted, torch.no_grad():
        model(ids, use_cache=False)
    for block, (indexer, *given) in zip(model.model.layers, noted, strict=True):
        got = train_recall.scores(indexer, *given)[0].detach().tril().numpy()
        x = given[0][0].numpy()
        expected = index_scores(layer_of(model.config), weights_of(block.self_attn), x, np.arange(40))
        np.testing.assert_allclose(got, np.where(np.isfinite(expected), expected, 0), rtol=1e-4, atol=1e-5)


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    """Both phases in pieces of one step, and at once."""
    monkeypatch.setattr(train_recall, "PHASES", (("text", 2, 2, 32, 1e-3), ("indexer", 2, 1, 32, 1e-3)))
    whole = train_recall.Training(tmp_path / "whole")
    assert whole.run(600)
    clock = iter(range(10**6))
    monkeypatch.setattr(train_recall.time, "monotonic", lambda: next(clock))
    for _ in range(20):
        part = train_recall.Training(tmp_path / "parts")
        done = part.run(2)
        part.save()
        if done:
            break
    assert done and part.step == 2
    start = train_recall.DeepseekV32ForCausalLM(train_recall.config()).state_dict()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(part.model.state_dict()[name], value, msg=name)
    assert any(not torch.equal(whole.model.state_dict()[name], x) for name, x in start.items() if ".indexer." in name)
