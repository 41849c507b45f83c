"""Masks as ranges: whatever they can say is what eager attention computes, and the rest is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from small_models import TOPK, make, prompt  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import dsa_tvm.models.transformers  # noqa: E402, F401
from dsa_tvm.errors import ArgumentError  # noqa: E402
from dsa_tvm.models import layer, ranges  # noqa: E402
from dsa_tvm.models.ranges import key_ranges, unpack  # noqa: E402

CLOSE = {"rtol": 0, "atol": 2e-5}


def dense_of(mask, s_kv):
    """A mask of ours as Transformers has it, [b, 1, s_q, s_kv]."""
    start, end, seen = unpack(mask[:, 0], s_kv)
    keys = torch.arange(s_kv)
    dense = (keys >= start[..., None]) & (keys < end[..., None])
    return (dense if seen is None else dense & seen[:, None])[:, None]


def padded(*rows):
    return torch.tensor([[c == "x" for c in row] for row in rows])


PADDINGS = {
    "left": padded("..xxxxxx", ".xxxxxxx", "xxxxxxxx"),
    "right": padded("xxxxxx..", "xxxxxxxx", "x......."),
    "both": padded("..xxxx..", ".xxxxxxx", "xxxxxxx."),
    "holes": padded("xx..xxxx", ".xx.xx.x", "xxxxxxxx"),
    "nothing": padded("........", "xxxxxxxx", ".......x"),
    "none": None,
}
SIZES = {  # queries, keys, offset of the first query
    "prefill": (8, 8, 0),
    "chunk": (3, 8, 5),
    "decode": (1, 8, 7),
    "static": (3, 12, 5),
    "static, tensor": (3, 12, torch.tensor(5)),
}


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_what_transformers_has(padding, size, compiling, monkeypatch):
    """The same keys for each query as its own mask, looked at or not."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    s_q, s_kv, offset = SIZES[size]
    attention_mask = PADDINGS[padding]
    common = {"batch_size": 3, "q_length": s_q, "kv_length": s_kv, "q_offset": offset}
    mask = key_ranges(**common, attention_mask=attention_mask)
    assert mask.dtype == torch.int32 and mask.shape[:3] == (3, 1, s_q)
    if not compiling:
        assert (mask.shape[-1] > 2) == (padding == "holes")
    expected = sdpa_mask(**common, attention_mask=attention_mask, allow_is_causal_skip=False)
    assert torch.equal(dense_of(mask, s_kv), expected.expand(3, 1, s_q, s_kv))


@pytest.mark.parametrize("entries", [1 << 22, 30])
def test_other_functions(entries, monkeypatch):
    """Any function that leaves one range to a query, evaluated some queries at a time."""
    monkeypatch.setattr(ranges, "_DENSE_ENTRIES", entries)
    function = sliding_window_causal_mask_function(3)
    common = {"batch_size": 3, "q_length": 5, "kv_length": 9, "q_offset": 4, "mask_function": function}
    for attention_mask in (None, padded("..xxxxxxx", "xxxxxxxx.", "xxx.xxxxx")):
        mask = key_ranges(**common, attention_mask=attention_mask)
        expected = sdpa_mask(**common, attention_mask=attention_mask, allow_is_causal_skip=False)
        assert torch.equal(dense_of(mask, 9), expected.expand(3, 1, 5, 9))


@pytest.mark.parametrize("padding", [None, padded("xxxxx", "..xxx")])
def test_functions_that_are_no_range(padding, monkeypatch):
    """The mask is dense then; a compiled model, in which nobody can look, has to say so when it runs."""
    every_second = and_masks(causal_mask_function, lambda b, h, q, kv: (q - kv) % 2 == 0)
    mask = key_ranges(2, 5, 5, mask_function=every_second, attention_mask=padding)
    expected = sdpa_mask(2, 5, 5, mask_function=every_second, attention_mask=padding, allow_is_causal_skip=False)
    assert mask.dtype == torch.bool and torch.equal(mask, expected.expand(2, 1, 5, 5))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="attention mask: expected the keys that a query sees to be one range"):
        key_ranges(2, 5, 5, mask_function=every_second)


@pytest.mark.parametrize("kind", ["deepseek", "glm-shared"])
def test_packed_sequences(kind):
    """Positions that start again: each sequence by itself, as eager attention has it."""
    model = make(kind)
    ids, _ = prompt(1, 400)
    positions = torch.cat([torch.arange(n) for n in (150, 1, 249)])[None]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation("dsa_tvm")
        got = model(ids, position_ids=positions, use_cache=False).logits
        alone = model(ids[:, :150], use_cache=False).logits
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(got[:, :150], alone, **CLOSE)


def test_packed_sequences_compiled():
    model = make("deepseek", num_hidden_layers=1)
    ids, _ = prompt(1, 250)
    positions = torch.cat([torch.arange(120), torch.arange(130)])[None]
    model.set_attn_implementation("dsa_tvm")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, position_ids=positions, use_cache=False).logits, expected, **CLOSE)


HOLES = {"between": slice(100, 140), "right": slice(230, 260), "at the end of topk": slice(5, TOPK)}


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("compiling", [False, True])
def test_padding_anywhere(hole, compiling, monkeypatch):
    """Between two turns or on the right: prefill, then decode over it, with and without a selection."""
    model = make("glm-shared")
    ids, mask = prompt(2, 260)
    mask[1, HOLES[hole]] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    made = {}
    for name in ("eager", "dsa_tvm"):
        model.set_attn_implementation(name)
        if name == "dsa_tvm" and compiling:
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        made[name] = []
        for length in (60, 260):
            with torch.no_grad():
                first = model(ids[:, :length], attention_mask=mask[:, :length], position_ids=positions[:, :length])
                longer = torch.nn.functional.pad(mask[:, :length], (0, 1), value=1)
                step = model(
                    ids[:, :1],
                    attention_mask=longer,
                    position_ids=longer.sum(-1, keepdim=True) - 1,
                    past_key_values=first.past_key_values,
                )
            made[name] += [first.logits[mask[:, :length].bool()], step.logits]
    for got, expected in zip(made["dsa_tvm"], made["eager"], strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("length", [TOPK - 10, 250])
@pytest.mark.parametrize("kind", ["deepseek", "glm-shared"])
def test_masks_of_the_caller(kind, length, monkeypatch):
    """Dense ones, boolean or added to the scores, with any gaps, in blocks of queries too."""
    model = make(kind)
    ids, mask = prompt(2, length, 30)
    causal = sdpa_mask(2, length, length, attention_mask=mask.bool(), allow_is_causal_skip=False)
    gaps = causal & (torch.rand(causal.shape, generator=torch.Generator().manual_seed(3)) < 0.8)
    gaps |= torch.eye(length, dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    for dense in (causal, gaps):
        added = torch.zeros(dense.shape).masked_fill(~dense, lowest)
        with torch.no_grad():
            model.set_attn_implementation("eager")
            expected = model(ids, attention_mask=added).logits[mask.bool()]
            model.set_attn_implementation("dsa_tvm")
            for given in (dense, added, added.clamp(min=-torch.inf).masked_fill(~dense, -torch.inf)):
                got = model(ids, attention_mask=given).logits[mask.bool()]
                torch.testing.assert_close(got, expected, **CLOSE)
            with monkeypatch.context() as few:
                few.setattr(layer, "_BLOCK_BYTES", {"cpu": 4 << 20})
                torch.testing.assert_close(model(ids, attention_mask=dense).logits[mask.bool()], expected, **CLOSE)


def test_masks_that_are_refused():
    model = make("deepseek")
    ids, _ = prompt(1, 120)
    model.set_attn_implementation("dsa_tvm")
    causal = sdpa_mask(1, 120, 120, allow_is_causal_skip=False)
    with torch.no_grad():
        with pytest.raises(ArgumentError, match="attention mask: expected 0 or the lowest number, got a bias"):
            model(ids, attention_mask=torch.where(causal, 0.5, torch.finfo(torch.float32).min))
        with pytest.raises(ArgumentError, match=r"attention mask: expected \[\.\.\., 120, 120\] for queries and keys"):
            model(ids, attention_mask=causal[..., :119])
