"""The model that is shipped is what Transformers makes of its seed, and so are its tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from dsa_tvm.benchmark import sample_model
from dsa_tvm.benchmark.check import CheckError
from dsa_tvm.models import sample


def test_tokens_are_those_of_transformers():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from dsa_tvm.models.sample import make

    expected = sample.expected()
    tokens, logits = make.generate(make.model(expected.seed))
    assert tuple(tokens) == expected.tokens
    assert make.margin(logits) == pytest.approx(expected.margin, rel=0.01)
    # Else a rounding could decide a token.
    assert expected.margin > 100 * expected.error > 0


def test_weights_are_those_of_the_seed():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from dsa_tvm.models.sample import make

    with sample.directory() as directory:
        graph = onnx.load(directory / "model.onnx").graph
    shipped = {frozenset(x.shape): [] for x in map(onnx.numpy_helper.to_array, graph.initializer)}
    for x in map(onnx.numpy_helper.to_array, graph.initializer):
        shipped[frozenset(x.shape)].append(x)
    for name, parameter in make.model(sample.expected().seed).named_parameters():
        if parameter.ndim == 2:  # as it is, or transposed for a product
            value = parameter.detach().numpy()
            held = shipped.get(frozenset(value.shape), [])
            assert any(np.array_equal(x, value) or np.array_equal(x.T, value) for x in held), name


def test_nothing_of_the_machine_that_exported_it():
    with sample.directory() as directory:
        assert b"site-packages" not in (directory / "model.onnx").read_bytes()


def test_most_tokens_are_dropped():
    with sample.directory() as directory:
        model = onnx.load(directory / "model.onnx", load_external_data=False)
    topk = [a.i for node in model.graph.node for a in node.attribute if a.name == "topk"]
    assert topk and all(10 * k < len(sample.prompt()) for k in topk)


def test_wrong_tokens_are_seen(monkeypatch):
    """With the library and without it the same tokens come; another one is an error."""
    expected = sample.expected()
    found = sample_model.run(0, lambda text: None)
    assert found.expected == expected
    assert [row[:2] for row in found.cells()] == [["prefill", str(len(sample.prompt()))], ["decode", "31"]]
    wrong = replace(expected, tokens=(*expected.tokens[:-1], expected.tokens[-1] + 1))
    monkeypatch.setattr(sample, "expected", lambda: wrong)
    with pytest.raises(CheckError, match=r"sample model with the library: expected the tokens of transformers"):
        sample_model.run(0, lambda text: None)
