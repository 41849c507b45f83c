"""`dsa-tvm recall` against float64, computed another way: keys of every head expanded, whole, and argsort."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from agreement import layer_of  # noqa: E402
from small_models import make, weights_of  # noqa: E402

from dsa_tvm.cli import main  # noqa: E402
from dsa_tvm.errors import ArgumentError, ModelError  # noqa: E402
from dsa_tvm.models import reference  # noqa: E402
from dsa_tvm.models.recall import mass, report  # noqa: E402
from dsa_tvm.models.recall.measure import recall  # noqa: E402

LENGTH = 230
TOKENS = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
TOPKS = [1, 16, 96, 1000]
KINDS_READ = ("deepseek-yarn", "glm-shared")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints, and the hidden states before each layer as Transformers' eager attention computes them."""
    made = {}
    for kind in KINDS_READ:
        directory = tmp_path_factory.mktemp("checkpoint") / kind
        model = make(kind)
        model.save_pretrained(directory)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            hidden = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
        made[kind] = (directory, model, [h[0] for h in hidden])
    return made


def dense_probabilities(layer, w, x):
    """[heads, s, s] float64 of dense attention, nothing absorbed and nothing in blocks."""
    s = len(x)
    angles = reference._angles(layer, np.arange(s))
    norm = reference._rms_norm
    q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"]) @ w["q_b_proj.weight"].T
    q = q.reshape(s, layer.heads, -1)
    q_rope = reference._rotate(q[..., layer.qk_nope :], angles, interleaved=True)
    compressed = x @ w["kv_a_proj_with_mqa.weight"].T
    latent = norm(compressed[:, : layer.kv_rank], w["kv_a_layernorm.weight"])
    k_rope = reference._rotate(compressed[:, None, layer.kv_rank :], angles, interleaved=True)[:, 0]
    k = (latent @ w["kv_b_proj.weight"].T).reshape(s, layer.heads, -1)[..., : layer.qk_nope]
    logits = np.einsum("qhd,khd->hqk", q[..., : layer.qk_nope], k) + np.einsum("qhd,kd->hqk", q_rope, k_rope)
    logits = np.where(np.tri(s, dtype=bool), logits * layer.sm_scale, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def expected_masses(kind, model, hidden, topks):
    """[layers, topks, s] by kind of selection."""
    layer = layer_of(model.config)
    found = {name: [] for name in report.KINDS}
    scores = None
    for block, h in zip(model.model.layers, hidden, strict=False):
        with torch.no_grad():
            x = block.input_layernorm(h).double().numpy()
        w = weights_of(block.self_attn)
        p = dense_probabilities(layer, w, x).mean(0)
        if block.self_attn.indexer is not None:
            scores = reference.index_scores(layer, w, x, np.arange(len(x)))
        rows = {name: np.zeros((len(topks), len(x))) for name in found}
        for i, k in enumerate(topks):
            for t in range(len(x)):
                best = np.argsort(-scores[t, : t + 1], kind="stable")[:k]
                rows["selected"][i, t] = p[t, best].sum()
                rows["best"][i, t] = np.sort(p[t])[::-1][:k].sum()
                rows["recent"][i, t] = p[t, max(0, t + 1 - k) : t + 1].sum()
        for name, values in rows.items():
            found[name].append(values)
    return {name: np.stack(x) for name, x in found.items()}


@pytest.mark.parametrize("kind", KINDS_READ)
def test_against_float64(kind, saved, monkeypatch):
    """Every query of every layer; the model drops tokens itself on the way. Blocks of few queries, and one of all."""
    directory, model, hidden = saved[kind]
    expected = expected_masses(kind, model, hidden, TOPKS)
    for block in (mass._BLOCK_BYTES, 4 * LENGTH * 8 * 7):
        monkeypatch.setattr(mass, "_BLOCK_BYTES", block)
        said = []
        found = recall(directory, TOKENS, TOPKS, queries=10**6, say=said.append)
        assert found.layers == list(range(len(model.model.layers))) and len(said) == len(found.layers)
        assert found.positions.tolist() == list(range(LENGTH))
        for name, values in expected.items():
            close = np.isclose(found.mass[name], values, rtol=0, atol=2e-5)
            # Where two scores are a rounding apart, another key may be selected: a few queries at most.
            assert close.mean() > 0.995 and (name == "selected" or close.all()), name
        assert (found.mass["selected"] <= found.mass["best"] + 1e-6).all()
        np.testing.assert_allclose(found.mass["selected"][:, 3], 1, atol=1e-6)  # topk above the text: all keys


def test_sampled_queries_and_layers(saved):
    """As in a run over all; the first layer of interest shares the selection of one that is not."""
    directory, _, _ = saved["glm-shared"]
    whole = recall(directory, TOKENS, [16, 96], queries=10**6)
    found = recall(directory, TOKENS, [16, 96], queries=9, layers=(2, 3))
    assert found.layers == [2] and len(found.positions) == 9 and found.positions[-1] == LENGTH - 1
    np.testing.assert_allclose(found.mass["selected"][0], whole.mass["selected"][2][:, found.positions], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS_READ)
def test_one_token(kind, saved):
    directory, _, _ = saved[kind]
    found = recall(directory, TOKENS[:1], [1, 256])
    assert found.positions.tolist() == [0]
    for name in report.KINDS:
        np.testing.assert_allclose(found.mass[name], 1.0)
    assert any("all" in line for line in report.lines(found))


def seen_of(rows, index_keys, model, positions):
    attention = model.model.layers[0].self_attn
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as module

    n = len(positions)
    x = torch.randn(n, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    cos, sin = model.model.rotary_emb(x[None], positions[None])
    return mass.Seen(
        attention,
        module.apply_rotary_pos_emb_interleave,
        module.apply_rotary_pos_emb,
        positions,
        x,
        (cos, sin),
        rows,
        index_keys,
    )


def test_ties_go_to_the_lower_index():
    """All keys alike, and keys that repeat with a period: what counts is the position."""
    model = make()
    s, topk = 60, 7
    rows = torch.randn(s, 576, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([3, 30, 59])
    for keys in (torch.ones(1, 128).expand(s, -1), torch.randn(5, 128).repeat(12, 1)):
        seen = seen_of(rows, keys.contiguous(), model, positions)
        chosen = mass.selections(seen, [topk])[topk]
        assert chosen[0].tolist() == [0, 1, 2, 3, -1, -1, -1]
        first, step = int(chosen[2, 0]), 1 if len(keys.unique(dim=0)) == 1 else 5
        assert first < step and chosen[2].tolist() == list(range(first, first + topk * step, step))
        found = mass.masses(seen, {topk: chosen})
        with torch.no_grad():
            p = mass._probabilities(seen, slice(None))
        for i in range(3):
            kept = [j for j in chosen[i].tolist() if j >= 0]
            np.testing.assert_allclose(found["selected"][topk][i], p[i, kept].sum(), atol=1e-12)
        np.testing.assert_allclose(found["selected"][topk][0], 1.0, atol=1e-6)  # fewer keys than topk


def test_equal_rows_share_the_mass():
    """Without anything to tell keys apart, k of n hold k / n: selected, best and recent."""
    model = make()
    s = 50
    rows = torch.zeros(s, 576)
    seen = seen_of(rows, torch.zeros(s, 128), model, torch.tensor([19, 49]))
    found = mass.masses(seen, mass.selections(seen, [10]))
    for name in report.KINDS:
        np.testing.assert_allclose(found[name][10], [10 / 20, 10 / 50], atol=1e-9)


def test_random_keys():
    """The mean over every choice of k of n keys; all of them where there are no more than k."""
    from itertools import combinations

    p = np.random.default_rng(0).dirichlet(np.ones(6))
    n = np.zeros((2, 3, 3))
    found = report.Recall([1, 2, 6], [0, 1], np.array([0, 3, 5]), dict.fromkeys(report.KINDS, n))
    for i, k in enumerate(found.topks[:2]):
        mean = np.mean([p[list(chosen)].sum() for chosen in combinations(range(6), k)])
        np.testing.assert_allclose(found._mass("random")[1, i, 2], mean)
    np.testing.assert_allclose(found.by_layer("random")[0], [(1 / 4 + 1 / 6) / 2, (2 / 4 + 2 / 6) / 2, np.nan])
    assert any(
        line == "as many random keys hold, on average, 0.208 (1), 0.417 (2), all (6)" for line in report.lines(found)
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text(" ".join(map(str, TOKENS)))
    return path


def test_command(saved, text, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    directory, _, _ = saved["deepseek-yarn"]
    picture, figures = tmp_path / "new" / "recall.png", tmp_path / "recall.json"
    arguments = ["recall", str(directory), "--text", str(text), "--topk", "96", "16", "4096", "--queries", "20"]
    assert main([*arguments, "--threads", "1", "--out", str(picture), "--json", str(figures)]) == 0
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines()]
    assert ["topk", "16", "topk", "96", "topk", "4096"] in rows
    (layer,) = (row for row in rows if row[:2] == ["layer", "1"])
    assert layer[-1] == "all" and 0 < float(layer[2]) < float(layer[4]) < 1
    assert "[2/2]" in said.err
    document = json.loads(figures.read_bytes())
    found = np.array(document["mass"]["selected"])
    assert found.shape == (2, 3, 20) and document["topk"] == [16, 96, 4096] and document["tokens"] == LENGTH
    positions = np.array(document["positions"])
    assert f"{found[1, 0, positions >= 16].mean():.3f}" == layer[2]
    assert image.imread(picture).shape[:2] == (380, 960)


def test_bytes_and_a_tokenizer(saved, tmp_path, capsys):
    """The same tokens in three ways."""
    tokenizers = pytest.importorskip("tokenizers")
    directory, _, _ = saved["glm-shared"]
    words = {f"w{i}": i for i in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    values = list(b"one two three four five six seven" * 3)
    said = []
    for name, content, options in (
        ("numbers", " ".join(map(str, values)), []),
        ("bytes", bytes(values).decode(), ["--bytes"]),
        ("words", " ".join(f"w{i}" for i in values), ["--tokenizer", str(tmp_path / "tokenizer.json")]),
    ):
        (tmp_path / name).write_text(content)
        assert main(["recall", str(directory), "--text", str(tmp_path / name), "--topk", "8", *options]) == 0
        said.append(capsys.readouterr().out.partition("\n")[2])
    assert said[0] == said[1] == said[2] and "0." in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topk", "0"], "topk: expected 1..4096, got 0"),
        (["--topk", "5000"], "topk: expected 1..4096, got 5000"),
        (["--queries", "0"], "queries: expected at least 1, got 0"),
        (["--tokens", "-1"], "tokens: expected at least 1, got -1"),
        (["--threads", "100000"], "threads: expected 1..1024, got 100000"),
        (["--layers", "1:1"], "layers: expected a range within 0:2, got 1:1"),
        (["--layers", "0:9"], "layers: expected a range within 0:2, got 0:9"),
        (["--out", "."], "out: expected a file that can be written, got .*Is a directory"),
        (["--json", "/dev/null/x"], "json: expected a file that can be written, got .*Not a directory"),
        (["--bytes", "--tokenizer", "x"], "expected --bytes or --tokenizer, got both"),
    ],
)
def test_refusals(options, message, saved, text, capsys):
    import re

    directory, _, _ = saved["deepseek-yarn"]
    assert main(["recall", str(directory), "--text", str(text), *options]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_texts_that_do_not_serve(saved, tmp_path, capsys):
    directory, _, _ = saved["deepseek-yarn"]
    empty, words = tmp_path / "empty", tmp_path / "words"
    empty.touch()
    words.write_text("no numbers")
    for path, message in ((empty, "at least one token"), (words, "no tokenizer"), (tmp_path / "none", "none")):
        assert main(["recall", str(directory), "--text", str(path)]) == 1
        assert message in capsys.readouterr().err
    assert main(["recall", str(directory), "--text", str(empty), "--bytes"]) == 1
    assert "at least one token" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match=r"text: expected tokens 0\.\.255, got 256"):
        recall(directory, [1, 256], [4])
    with pytest.raises(ModelError, match="expected a directory with config"):
        recall(tmp_path / "none", [1], [4])


def test_without_packages(saved, text, capsys, monkeypatch):
    directory, _, _ = saved["deepseek-yarn"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["recall", str(directory), "--text", str(text), "--out", "x.png"]) == 1
    assert "pip install 'dsa_tvm[plot]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["recall", str(directory), "--text", str(text)]) == 1
    assert "pip install 'dsa_tvm[models]'" in capsys.readouterr().err
