"""Transformers' models with ``attn_implementation="dsa_tvm"`` against the same models with eager attention."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import KINDS, TOPK, make, prompt  # noqa: E402

from dsa_tvm.errors import ArgumentError, ModelError  # noqa: E402
from dsa_tvm.models import layer  # noqa: E402
from dsa_tvm.models import transformers as door  # noqa: E402

LENGTH, NEW = 260, 8
#: Of logits of about 2 in float32.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def models():
    """One model of each kind; tests that change more than its implementation take a copy."""
    made = {}

    def model(kind):
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return model


@contextlib.contextmanager
def implementation(model, name):
    model.set_attn_implementation(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that Transformers 5.24 gave to some arguments
        yield model


def generate(model, ids, mask, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got = model.generate(ids, attention_mask=mask, **settings | options)
    return got.sequences, torch.stack(got.logits, 1) if got.logits else None


@pytest.fixture(scope="module")
def eager(models):
    """Tokens and logits with Transformers' eager attention, once for each question."""
    kept = {}

    def ask(kind, batch, padding, **options):
        key = (kind, batch, padding, *sorted(options.items()))
        if key not in kept:
            ids, mask = prompt(batch, LENGTH, padding)
            with implementation(models(kind), "eager") as model:
                kept[key] = (model(ids, attention_mask=mask).logits, *generate(model, ids, mask, **options))
        return kept[key]

    return ask


CACHES = {
    "dynamic": lambda config: {},
    "static": lambda config: {"cache_implementation": "static", "disable_compile": True},
    "rows": lambda config: {"past_key_values": door.RowCache(config, capacity=100)},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 30)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_tokens(kind, batch, padding, cache, models, eager):
    logits, tokens, step_logits = eager(kind, batch, padding)
    ids, mask = prompt(batch, LENGTH, padding)
    assert mask.sum(-1).min() > 2 * TOPK  # tokens are dropped in each sequence
    with implementation(models(kind), "dsa_tvm") as model:
        real = mask.bool()
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], logits[real], **CLOSE)
        got, got_logits = generate(model, ids, mask, **CACHES[cache](model.config))
    assert torch.equal(got, tokens)
    torch.testing.assert_close(got_logits, step_logits, **CLOSE)


@pytest.mark.parametrize("cache", CACHES)
def test_chunked_prefill(cache, models, eager):
    ids, mask = prompt(3, LENGTH, 30)
    with implementation(models("deepseek"), "dsa_tvm") as model:
        got, logits = generate(model, ids, mask, prefill_chunk_size=77, **CACHES[cache](model.config))
    _, tokens, expected = eager("deepseek", 3, 30)
    assert torch.equal(got, tokens)
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "rows"])
@pytest.mark.parametrize("kind", ["deepseek", "glm-shared"])
def test_beams(kind, cache, models, eager):
    ids, mask = prompt(3, LENGTH, 30)
    options = {"num_beams": 3, "output_logits": False}
    with implementation(models(kind), "dsa_tvm") as model:
        got, _ = generate(model, ids, mask, **options, **CACHES[cache](model.config))
    assert torch.equal(got, eager(kind, 3, 30, **options)[1])


@pytest.mark.parametrize("cache", ["dynamic", "rows"])
def test_assisted_decoding(cache, models, eager):
    """A draft is guessed from the prompt and taken back where it is wrong, so caches are cropped."""
    ids, mask = prompt(1, LENGTH)
    with implementation(models("glm"), "dsa_tvm") as model:
        got, _ = generate(model, ids, mask, prompt_lookup_num_tokens=4, **CACHES[cache](model.config))
    assert torch.equal(got, eager("glm", 1, 0)[1])


def test_assistant_model(models, eager):
    ids, mask = prompt(1, LENGTH)
    draft = door.accelerate(make("deepseek", num_hidden_layers=1))
    with implementation(models("deepseek"), "dsa_tvm") as model:
        got, _ = generate(model, ids, mask, assistant_model=draft)
    assert torch.equal(got, eager("deepseek", 1, 0)[1])


def test_nothing_is_scored_where_all_is_selected(models, monkeypatch):
    """Up to topk tokens, in a cache of any capacity: the selection is the range."""
    monkeypatch.setattr(layer, "indexer_topk", None)
    ids, mask = prompt(2, TOPK - NEW, 20)
    for cache in CACHES.values():
        with implementation(models("glm-shared"), "eager") as model:
            tokens, logits = generate(model, ids, mask)
        with implementation(model, "dsa_tvm"):
            got, got_logits = generate(model, ids, mask, **cache(model.config))
        assert torch.equal(got, tokens)
        torch.testing.assert_close(got_logits, logits, **CLOSE)


@pytest.mark.parametrize("kind", ["deepseek", "glm-shared"])
def test_blocks_change_nothing(kind, models, monkeypatch):
    """Queries in blocks of a few give the bits of all at once: first blocks unscored, one block on the border."""
    ids, mask = prompt(2, LENGTH, 30)
    with implementation(models(kind), "dsa_tvm") as model:
        whole = model(ids, attention_mask=mask).logits
        monkeypatch.setattr(layer, "_BLOCK_BYTES", {"cpu": 4 << 20})
        blocks = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(blocks[mask.bool()], whole[mask.bool()], **CLOSE)


def test_prefill_takes_the_memory_of_a_block(models, monkeypatch):
    """What is under way of absorbed queries does not grow with the prompt."""
    largest = []

    def sparse_mla(q, *rest, **attrs):
        largest.append(q.shape[0])
        return right(q, *rest, **attrs)

    right = layer.sparse_mla
    monkeypatch.setattr(layer, "sparse_mla", sparse_mla)
    monkeypatch.setattr(layer, "_BLOCK_BYTES", {"cpu": 4 << 20})
    sizes = {}
    for length in (200, 400):
        with implementation(models("deepseek"), "dsa_tvm") as model:
            largest.clear()
            model(prompt(1, length)[0], logits_to_keep=1)
        sizes[length] = max(largest)
    assert sizes[200] == sizes[400] < 100


def test_decode_reads_the_selected_rows_only(models, monkeypatch):
    """With caches that keep latent and rope key apart, a step joins topk rows and not the whole cache."""
    rows = []

    def sparse_mla(q, kv, *rest, **attrs):
        rows.append(kv.shape[0])
        return right(q, kv, *rest, **attrs)

    right = layer.sparse_mla
    monkeypatch.setattr(layer, "sparse_mla", sparse_mla)
    ids, mask = prompt(2, LENGTH, 30)
    with implementation(models("deepseek"), "dsa_tvm") as model:
        generate(model, ids, mask, max_new_tokens=2)
    assert rows == [2 * LENGTH] * 2 + [2 * TOPK] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["deepseek", "glm-shared"])
def test_half_precision(kind, dtype):
    """As far from float32 as eager attention is, and no farther."""
    ids, mask = prompt(2, LENGTH, 30)
    model = make(kind)
    with implementation(model, "eager"):
        exact = model(ids, attention_mask=mask).logits
    model = model.to(dtype)
    errors = {}
    for name in ("eager", "dsa_tvm"):
        with implementation(model, name):
            logits = model(ids, attention_mask=mask).logits.float()
            generate(model, ids, mask, max_new_tokens=2)
        errors[name] = (logits - exact)[mask.bool()].square().mean().sqrt()
    assert errors["dsa_tvm"] <= 1.25 * errors["eager"] + 1e-4


def test_autocast(models):
    ids, mask = prompt(2, LENGTH, 30)
    made = {}
    for name in ("eager", "dsa_tvm"):
        with implementation(models("deepseek"), name) as model, torch.autocast("cpu", torch.bfloat16):
            made[name] = model(ids, attention_mask=mask).logits.float()[mask.bool()]
            generate(model, ids, mask, max_new_tokens=2)
    assert (made["eager"] - made["dsa_tvm"]).square().mean().sqrt() < 0.05


def test_saved_loaded_copied(tmp_path, models):
    """Through a checkpoint and through deepcopy; the implementation is no part of the checkpoint."""
    ids, mask = prompt(2, LENGTH, 30)
    with implementation(models("glm-shared"), "dsa_tvm") as model:
        expected = model(ids, attention_mask=mask).logits
        model.save_pretrained(tmp_path)
        copied = copy.deepcopy(model)
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="dsa_tvm").eval()
        for other in (copied, loaded):
            assert other.config._attn_implementation == "dsa_tvm"
            assert torch.equal(other(ids, attention_mask=mask).logits, expected)
    plain = type(model).from_pretrained(tmp_path)
    assert plain.config._attn_implementation != "dsa_tvm"


def test_back_and_forth(models):
    """Two models in one process, one of them changed in between: each computes what it is set to."""
    one, two = make("deepseek"), models("glm")
    ids, _ = prompt(1, LENGTH)
    one.set_attn_implementation("eager")
    before = one(ids).logits.detach()
    with implementation(two, "dsa_tvm"):
        two_before = two(ids).logits
        assert door.accelerate(one) is one and one.config._attn_implementation == "dsa_tvm"
        assert torch.equal(door.accelerate(one)(ids).logits, one(ids).logits)
        assert door.restore(one) is one and one.config._attn_implementation == "eager"
        assert torch.equal(one(ids).logits, before)
        assert torch.equal(two(ids).logits, two_before)
    door.restore(two)  # set without accelerate: nobody knows what was before
    assert two.config._attn_implementation == "sdpa"


def test_rows_of_a_cache_serve_eager_too(models, eager):
    ids, mask = prompt(3, LENGTH, 30)
    with implementation(models("deepseek"), "eager") as model:
        got, _ = generate(model, ids, mask, past_key_values=door.RowCache(model.config))
    assert torch.equal(got, eager("deepseek", 3, 30)[1])


def test_compiled_whole(models, eager):
    """As one graph: prefill without a cache, and decode over a static one, with padding."""
    ids, mask = prompt(3, LENGTH, 30)
    logits, tokens, _ = eager("glm-shared", 3, 30)
    torch._dynamo.reset()
    with implementation(models("glm-shared"), "dsa_tvm") as model:
        model.set_experts_implementation("batched_mm")  # the default cannot be traced by this backend on a CPU
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[mask.bool()], logits[mask.bool()], **CLOSE)
        cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + NEW)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        step = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
        made = [step[:, -1].argmax(-1, keepdim=True)]
        for _ in range(NEW - 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = mask.sum(-1, keepdim=True) - 1
            step = compiled(
                made[-1], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
            made.append(step[:, -1].argmax(-1, keepdim=True))
        model.set_experts_implementation("grouped_mm")
    assert torch.equal(torch.cat(made, 1), tokens[:, LENGTH:])


class Doubled(torch.nn.Module):
    """A projection that is no `torch.nn.Linear`, as with adapters or quantized weights."""

    def __init__(self, linear):
        super().__init__()
        self.base, self.weight = linear, linear.weight  # the weight alone would be wrong

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize("how", ["module", "hook", "forward"])
def test_projections_that_are_more_than_their_weight(how):
    model = make("deepseek")
    for block in model.model.layers:
        attention = block.self_attn
        if how == "module":
            attention.kv_b_proj = Doubled(attention.kv_b_proj)
        elif how == "hook":
            attention.kv_b_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
        else:
            attention.kv_b_proj.forward = Doubled(copy.deepcopy(attention.kv_b_proj)).forward
    ids, mask = prompt(2, LENGTH, 30)
    made = {}
    for name in ("eager", "dsa_tvm"):
        with implementation(model, name):
            made[name] = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(made["dsa_tvm"], made["eager"], **CLOSE)


def test_sizes_that_no_kernel_has():
    """Smaller latents, rope parts and indexers than the library has kernels for are widened with zeros."""
    sizes = {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "index_head_dim": 40, "qk_nope_head_dim": 24}
    model = make("glm-shared", **sizes)
    ids, mask = prompt(2, LENGTH, 30)
    with implementation(model, "eager"):
        logits = model(ids, attention_mask=mask).logits
        tokens, _ = generate(model, ids, mask)
    with implementation(model, "dsa_tvm"):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()], **CLOSE)
        for cache in CACHES.values():
            assert torch.equal(generate(model, ids, mask, **cache(model.config))[0], tokens)


# What is refused.


def test_no_gradients(models):
    model = models("deepseek")
    model.set_attn_implementation("dsa_tvm")
    loss = model(prompt(1, 40)[0]).logits.sum()  # a forward alone may run without no_grad
    with pytest.raises(NotImplementedError, match="sparse_mla has no backward"):
        loss.backward()


def test_no_dropout():
    model = door.accelerate(make("deepseek", attention_dropout=0.1))
    with torch.no_grad():
        model(prompt(1, 40)[0])
        with pytest.raises(ArgumentError, match=r"attention dropout: expected 0, got 0\.1"):
            model.train()(prompt(1, 40)[0])


def test_no_attention_weights(models):
    with (
        implementation(models("glm"), "dsa_tvm") as model,
        pytest.raises(ArgumentError, match="output_attentions: expected False, got True"),
    ):
        model(prompt(1, 40)[0], output_attentions=True)


def test_no_other_models():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ModelError, match="expected a model of type deepseek_v32 or glm_moe_dsa, got LlamaForCausalLM"):
        door.accelerate(model)
    model.set_attn_implementation("dsa_tvm")
    with pytest.raises(ModelError, match="expected the attention of a DSA model that is served, got LlamaAttention"):
        model(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"index_n_heads": 96}, r"index_n_heads: expected 1\.\.64, got 96"),
        ({"kv_lora_rank": 640}, r"kv_lora_rank: expected 1\.\.512, got 640"),
        ({"index_topk": 5000}, r"index_topk: expected 1\.\.4096, got 5000"),
        ({"num_attention_heads": 160, "num_key_value_heads": 160}, r"num_attention_heads: expected 1\.\.128, got 160"),
    ],
    ids=str,
)
def test_sizes_that_are_not_served(sizes, message):
    model = make("deepseek", num_hidden_layers=1, qk_nope_head_dim=8, v_head_dim=8, **sizes)
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=message):
        door.accelerate(model)
    assert model.config._attn_implementation == before


def test_no_bias_in_the_expansion():
    model = make("deepseek", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj.bias = torch.nn.Parameter(torch.zeros(attention.kv_b_proj.out_features))
    with pytest.raises(ModelError, match="kv_b_proj: expected no bias"):
        door.accelerate(model)
    model.set_attn_implementation("dsa_tvm")
    with pytest.raises(ModelError, match="kv_b_proj: expected no bias"):
        model(prompt(1, 40)[0])


def test_no_float64(models):
    model = copy.deepcopy(models("deepseek")).double()
    message = r"expected a model in float32, bfloat16 or float16, got torch\.float64"
    with implementation(model, "dsa_tvm"), pytest.raises(ArgumentError, match=message):
        model(prompt(1, LENGTH)[0])
