"""The cache of rows: what it hands out is what was put in, and what Transformers does to caches works on it."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from small_models import make  # noqa: E402

from dsa_tvm.errors import ArgumentError  # noqa: E402
from dsa_tvm.models.row_cache import RowLayer  # noqa: E402
from dsa_tvm.models.transformers import RowCache  # noqa: E402


def put(layer, b, s, seed):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(b, 1, s, 32, generator=generator)
    rope = torch.randn(b, 1, s, 8, generator=generator)
    keys = torch.randn(b, s, 16, generator=generator)
    rows, empty = layer.update(latent, rope)
    indexed = layer.update_indexer(keys)
    assert empty.numel() == 0 and empty.shape[0] == b
    return torch.cat([latent, rope], -1), keys, rows, indexed


def held(layer):
    return layer.keys[:, :, : layer.length], layer.indexer_keys[:, : layer.indexed]


def test_grows_and_keeps():
    layer, rows, keys = RowLayer(4), [], []
    for seed, s in enumerate((3, 1, 1, 20, 1)):
        sizes = layer.get_mask_sizes(s)
        new_rows, new_keys, all_rows, all_keys = put(layer, 2, s, seed)
        rows.append(new_rows)
        keys.append(new_keys)
        assert sizes == (all_rows.shape[2], 0) and all_rows.shape[2] == all_keys.shape[1]
        assert torch.equal(held(layer)[0], torch.cat(rows, 2)) and torch.equal(held(layer)[1], torch.cat(keys, 1))
    assert layer.get_seq_length() == 26 and layer.keys.shape[2] == 32


def test_a_step_copies_nothing():
    layer = RowLayer(64)
    put(layer, 1, 10, 0)
    before = layer.keys.data_ptr(), layer.indexer_keys.data_ptr()
    for seed in range(20):
        put(layer, 1, 1, seed)
    assert (layer.keys.data_ptr(), layer.indexer_keys.data_ptr()) == before


def test_crop_reorder_repeat_select_reset():
    layer = RowLayer(4)
    rows, keys, *_ = put(layer, 3, 9, 0)
    layer.crop(-4)
    assert layer.get_seq_length() == 5 and torch.equal(held(layer)[0], rows[:, :, :5])
    more, more_keys, *_ = put(layer, 3, 2, 1)
    rows, keys = torch.cat([rows[:, :, :5], more], 2), torch.cat([keys[:, :5], more_keys], 1)
    order = torch.tensor([2, 0, 0])
    for change, index in (
        (lambda: layer.reorder_cache(order), order),
        (lambda: layer.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda: layer.batch_select_indices(torch.tensor([5, 1])), torch.tensor([5, 1])),
    ):
        change()
        rows, keys = rows[index], keys[index]
        assert torch.equal(held(layer)[0], rows) and torch.equal(held(layer)[1], keys)
    layer.crop(-100)
    assert layer.get_seq_length() == 0
    with pytest.raises(ValueError, match="crop: expected minus the number of tokens to remove, got 3"):
        layer.crop(3)
    layer.reset()
    put(layer, 1, 2, 3)
    assert layer.get_seq_length() == 2 and layer.keys.shape == (1, 1, 4, 40)


@pytest.mark.parametrize(
    ("rows", "keys", "got"),
    [
        ((1, 1, 1, 32), (1, 1, 16), "1 with 40"),
        ((3, 1, 1, 32), (3, 1, 16), "3 with 40"),
        ((2, 1, 1, 30), None, "2 with 38"),
    ],
)
def test_rows_of_another_batch_or_width(rows, keys, got):
    """They are not repeated for every sequence, and what is held stays."""
    layer = RowLayer(4)
    put(layer, 2, 5, 0)
    before = [x.clone() for x in held(layer)]
    with pytest.raises(
        ArgumentError, match=rf"RowCache: expected rows for a batch of 2 with 40 .*, got a batch of {got}"
    ):
        layer.update(torch.ones(rows), torch.ones(*rows[:3], 8))
    if keys:
        with pytest.raises(
            ArgumentError, match=rf"expected rows for a batch of 2 with 16 .*, got a batch of {keys[0]}"
        ):
            layer.update_indexer(torch.ones(keys))
    assert all(torch.equal(x, y) for x, y in zip(before, held(layer), strict=True))
    layer.crop(-5)  # an empty one takes any
    put(layer, 3, 2, 1)
    assert layer.get_seq_length() == 2


def test_of_a_model():
    model = make("glm-shared")
    cache = RowCache(model.config, capacity=8)
    model.set_attn_implementation("dsa_tvm")
    with torch.no_grad():
        model(torch.ones(1, 20, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert len(cache) == 3 and cache.get_seq_length() == 20 and cache.is_croppable and not cache.is_compileable
    copied = copy.deepcopy(cache)
    cache.crop(-5)
    assert (cache.get_seq_length(), copied.get_seq_length()) == (15, 20)
