"""The float64 layer against eager attention of Transformers, ours against the float64 layer, and planted mistakes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from agreement import layer_of  # noqa: E402
from small_models import KINDS, TOPK, make, prompt, weights_of  # noqa: E402

from dsa_tvm.models import layer as ours  # noqa: E402
from dsa_tvm.models import transformers as door  # noqa: E402
from dsa_tvm.models.families import FAMILIES, family_of  # noqa: E402
from dsa_tvm.models.reference import attention, hadamard, index_scores  # noqa: E402

LENGTH = 280


class Calls:
    """Records the arguments of library calls in order, including mistakes that are planted later."""

    def __init__(self, monkeypatch):
        self.scores, self.indices = [], []
        indexer_topk, sparse_mla = ours.indexer_topk, ours.sparse_mla

        def recording_topk(*inputs, topk):
            self.scores.append(torch.ops.dsa_tvm.lightning_indexer(*inputs).double().numpy())
            return indexer_topk(*inputs, topk=topk)

        def recording_mla(q, kv, indices, **attrs):
            self.indices.append(indices.numpy())
            return sparse_mla(q, kv, indices, **attrs)

        monkeypatch.setattr(ours, "indexer_topk", recording_topk)
        monkeypatch.setattr(ours, "sparse_mla", recording_mla)


def run(model, ids):
    """The inputs and outputs of the attention of each layer."""
    layers = [SimpleNamespace() for _ in model.model.layers]

    def before(module, args, kwargs):
        layers[module.layer_idx].x = kwargs["hidden_states"][0].double().numpy()

    def after(module, args, kwargs, output):
        layers[module.layer_idx].out = output[0][0].double().numpy()

    hooks = []
    for block in model.model.layers:
        hooks.append(block.self_attn.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(block.self_attn.register_forward_hook(after, with_kwargs=True))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return layers


def indices_of(rows, topk):
    full = np.full((len(rows), topk), -1)
    full[:, : rows.shape[1]] = rows
    return full


def check(model, layers, calls, **changes):
    """Raise `AssertionError` unless each layer's scores, selection and output are those of the reference."""
    layer = layer_of(model.config, **changes)
    scored = iter(calls.scores)
    for block, made, selection in zip(model.model.layers, layers, calls.indices, strict=True):
        weights = weights_of(block.self_attn)
        indices = indices_of(selection, layer.topk)
        if block.self_attn.indexer is not None:
            scores = index_scores(layer, weights, made.x, np.arange(len(made.x)))
            seen, found = scores > -np.inf, next(scored)
            assert (seen == (found > -np.inf)).all(), "causal end"
            largest = np.abs(scores[seen]).max()
            assert np.abs(found[seen] - scores[seen]).max() <= 1e-5 * largest, "scores"
        for row, selected in zip(scores, indices, strict=True):
            selected = selected[selected >= 0]
            assert len(set(selected)) == len(selected) == min(layer.topk, (row > -np.inf).sum()), "selection"
            rest = np.delete(row, selected)
            # What rounding turns around is within rounding of the last that is selected.
            assert rest.max(initial=-np.inf) <= row[selected].min() + 2e-5 * largest, "selection"
        out = attention(layer, weights, made.x, np.arange(len(made.x)), indices=indices).out
        assert np.abs(made.out - out).max() <= 1e-5 * np.abs(out).max(), "output"


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_what_transformers_computes(kind):
    """In float64 there: two programs written apart from each other agree to rounding, selection included."""
    model = make(kind).double()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the others have no float64
    ids, _ = prompt(1, LENGTH)
    layer, indices = layer_of(model.config), None
    for block, made in zip(model.model.layers, run(model, ids), strict=True):
        shared = indices if block.self_attn.indexer is None else None
        expected = attention(layer, weights_of(block.self_attn), made.x, np.arange(LENGTH), indices=shared)
        indices = expected.indices
        # Transformers rounds cosines, and the indexer's scores, to float32.
        assert np.abs(made.out - expected.out).max() <= 1e-5 * np.abs(expected.out).max()


@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_the_reference(kind, monkeypatch):
    calls, model = Calls(monkeypatch), door.accelerate(make(kind))
    layers = run(model, prompt(1, LENGTH)[0])
    assert (calls.indices[0] >= 0).sum(-1).max() == TOPK < LENGTH // 2  # tokens are dropped
    check(model, layers, calls)
    check(model, layers, calls, hadamard=True)  # on both sides: no product changes


def test_reference_drops_padding():
    """A left-padded sequence gives the results of the sequence alone, at its positions."""
    model = make()
    weights, layer = weights_of(model.model.layers[0].self_attn), layer_of(model.config)
    x = np.random.default_rng(0).standard_normal((140, model.config.hidden_size))
    whole = attention(layer, weights, x, np.arange(140) - 40, first=40)
    alone = attention(layer, weights, x[40:], np.arange(100))
    np.testing.assert_allclose(whole.out[40:], alone.out, atol=1e-12)
    assert not whole.out[:40].any()


# Mistakes: each is planted in what the layer computes, and has to be seen.


def rotated_by(change):
    """A mistake in the rotation of the indexer's queries and keys."""

    def plant(monkeypatch, model):
        family = family_of(model.config.model_type)
        right = getattr(family.module, family.indexer_rotation)
        # Of that module alone, and there of the indexer's calls alone: those have the heads in dimension 2.
        wrong = lambda q, k, cos, sin, *a, unsqueeze_dim=1, **kw: (  # noqa: E731
            change(right, family, q, k, cos, sin) if unsqueeze_dim == 2 else right(q, k, cos, sin, *a, **kw)
        )
        monkeypatch.setattr(family.module, family.indexer_rotation, wrong)

    return plant


def other_style(right, family, q, k, cos, sin):
    other = next(f for f in FAMILIES if f is not family)
    return getattr(other.module, other.indexer_rotation)(q, k, cos, sin, unsqueeze_dim=2)


def other_offset(right, family, q, k, cos, sin):
    """A mistake: the indexer rotates its last numbers, as the attention does, instead of its first."""
    return right(q.roll(8, -1), k.roll(8, -1), cos, sin, unsqueeze_dim=2)


def one_position_late(right, family, q, k, cos, sin):
    return right(q, k, cos.roll(1, 1), sin, unsqueeze_dim=2)


def library_call(name, change):
    """A mistake in the arguments of a call of the library."""

    def plant(monkeypatch, model):
        right = getattr(ours, name)
        monkeypatch.setattr(ours, name, lambda *inputs, **attrs: change(right, *inputs, **attrs))

    return plant


def hadamard_on_queries(right, q, *rest, topk):
    return right((q @ torch.tensor(hadamard(q.shape[-1]), dtype=q.dtype)).contiguous(), *rest, topk=topk)


def weights_to_another_power(right, q, k, weights, *rest, topk):
    """A mistake: weights with ``h_idx**-1``. It shows only in the scores, not in a selection."""
    return right(q, k, weights * q.shape[1] ** -0.5, *rest, topk=topk)


def end_before_itself(right, q, k, weights, ks, ke, *rest, topk):
    return right(q, k, weights, ks, ke - 1, *rest, topk=topk)


def end_behind_itself(right, q, k, weights, ks, ke, *rest, topk):
    return right(q, k, weights, ks, (ke + 1).clamp(max=k.shape[0]), *rest, topk=topk)


def latent_scale(right, q, kv, indices, *, sm_scale, d_v):
    return right(q, kv, indices, sm_scale=q.shape[-1] ** -0.5, d_v=d_v)


def scale_without_yarn(right, q, kv, indices, *, sm_scale, d_v):
    return right(q, kv, indices, sm_scale=128**-0.5, d_v=d_v)


def of_first_layer(monkeypatch, model):
    """A mistake: the last layer shares the selection of the first layer, not of the one before it."""
    right, kept = door.select, []

    def select(indexer, *args):
        kept.append(right(indexer, *args))
        return kept[-1]

    monkeypatch.setattr(door, "select", select)
    shared = model.model.layers[-1].self_attn
    forward = shared.forward
    shared.forward = lambda *args, **kwargs: forward(*args, **kwargs | {"prev_topk_indices": kept[0]})


#: The kind of model, the mistake, and where it has to show up.
MISTAKES = {
    "rope style, deepseek": ("deepseek", rotated_by(other_style), "scores"),
    "rope style, glm": ("glm", rotated_by(other_style), "scores"),
    "rope offset": ("deepseek", rotated_by(other_offset), "scores"),
    "rope position": ("glm", rotated_by(one_position_late), "scores"),
    "hadamard on one side": ("deepseek", library_call("indexer_topk", hadamard_on_queries), "scores"),
    "weights": ("glm", library_call("indexer_topk", weights_to_another_power), "scores"),
    "causal end too early": ("deepseek", library_call("indexer_topk", end_before_itself), "causal end"),
    "causal end too late": ("deepseek", library_call("indexer_topk", end_behind_itself), "causal end"),
    "scale": ("deepseek", library_call("sparse_mla", latent_scale), "output"),
    "scale, yarn": ("deepseek-yarn", library_call("sparse_mla", scale_without_yarn), "output"),
    "shared layer": ("glm-shared", of_first_layer, "selection"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake, monkeypatch):
    kind, plant, where = MISTAKES[mistake]
    calls, model = Calls(monkeypatch), door.accelerate(make(kind))
    plant(monkeypatch, model)
    layers = run(model, prompt(1, LENGTH)[0])
    with pytest.raises(AssertionError, match=where):
        check(model, layers, calls)
