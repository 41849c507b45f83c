"""Exported models in ONNX Runtime, with the library and without, against Transformers."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from agreement import generate, reference_logits  # noqa: E402
from small_models import TOPK, make, prompt  # noqa: E402

import dsa_tvm  # noqa: E402
from dsa_tvm import export  # noqa: E402
from dsa_tvm.errors import ArgumentError, ModelError  # noqa: E402
from dsa_tvm.models.onnx import Generator, export_model  # noqa: E402

LENGTH, NEW = 300, 16
#: Of logits of about 2 in float32.
CLOSE = {"rtol": 0, "atol": 2e-5}
#: One with a scaled rotary embedding, and one with a layer that has no indexer.
KINDS = ("deepseek-yarn", "glm-shared")


@pytest.fixture(scope="module")
def models():
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """Directories of the exported models."""
    made = {}
    for kind, model in models.items():
        model.set_attn_implementation("eager")
        made[kind] = tmp_path_factory.mktemp("exported") / "model"
        export_model(model, made[kind])
        assert model.config._attn_implementation == "eager"
    return made


@pytest.fixture(scope="module")
def generators(exported):
    """By kind, and whether with the library."""
    return {(kind, lib): Generator(exported[kind], library=lib, threads=1) for kind in KINDS for lib in (True, False)}


def feeds(generator, ids, mask, capacity):
    """Inputs of one run, with empty caches."""
    caches = {
        name: np.zeros((len(ids), capacity, value.shape[2]), np.float32) for name, value in generator._caches.items()
    }
    positions = np.where(mask.numpy() > 0, mask.numpy().cumsum(-1) - 1, -1)
    return {"input_ids": ids.numpy(), "position_ids": positions, "logits_to_keep": np.arange(ids.shape[1]), **caches}


@pytest.mark.parametrize("library", [True, False], ids=["library", "bodies"])
@pytest.mark.parametrize("s_q", [1, 7, LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill(kind, s_q, library, models, generators):
    """Logits of every token; tokens are dropped in the long ones."""
    assert LENGTH > 3 * TOPK
    generator = generators[kind, library]
    for batch, padding in ((1, 0), (3, min(40, (s_q - 1) // 3))):
        ids, mask = prompt(batch, s_q, padding)
        out = generator.session.run(["logits"], feeds(generator, ids, mask, s_q + 9))[0]
        for implementation in ("eager", "dsa_tvm"):
            models[kind].set_attn_implementation(implementation)
            with torch.no_grad():
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                expected = models[kind](ids, attention_mask=mask, position_ids=positions).logits
            real = mask.bool()
            torch.testing.assert_close(torch.from_numpy(out)[real], expected[real], **CLOSE)


@pytest.fixture(scope="module")
def generated(models):
    """What `model.generate` says, once for each question."""
    kept = {}

    def ask(kind, batch, padding, implementation):
        key = (kind, batch, padding, implementation)
        if key not in kept:
            ids, mask = prompt(batch, LENGTH, padding)
            models[kind].set_attn_implementation(implementation)
            with torch.no_grad():
                made = models[kind].generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
            kept[key] = made[:, LENGTH:].tolist()
        return kept[key]

    return ask


def prompts_of(ids, mask):
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("library", [True, False], ids=["library", "bodies"])
@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens(kind, batch, padding, library, generators, generated):
    """Those of `model.generate`, with the prompt in one piece and in pieces, one of which is padding for some."""
    ids, mask = prompt(batch, LENGTH, padding)
    for chunk in (1000, 71):
        seen: list[tuple[int, int]] = []

        def progress(done, of, seen=seen):
            seen.append((done, of))

        got = generators[kind, library].generate(prompts_of(ids, mask), NEW, chunk=chunk, progress=progress)
        for implementation in ("eager", "dsa_tvm"):
            assert got == generated(kind, batch, padding, implementation)
        assert seen[-1] == (LENGTH, LENGTH) and len(seen) == -(-LENGTH // chunk)
    timing = generators[kind, library].timing
    assert timing.prefill_tokens == int(mask.sum()) and timing.decode_tokens == batch * (NEW - 1)
    assert "prefill" in str(timing) and "decode" in str(timing)


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_agree_with_float64(kind, models, generators, monkeypatch):
    """A prefill of 1, 7 and 512 tokens, then 64 steps: ONNX Runtime with and without the library, Transformers."""
    steps = 64
    for s_q in (1, 7, 512):
        ids, mask = prompt(1, s_q)
        logits = {}
        for library in (True, False):
            generator, outputs = generators[kind, library], []
            run = generator._run
            monkeypatch.setattr(generator, "_run", lambda *a, run=run, to=outputs: to.append(run(*a)) or to[-1])
            tokens = generator.generate(ids.tolist(), steps, chunk=s_q)[0]
            monkeypatch.undo()
            logits["library" if library else "bodies", tuple(tokens)] = np.concatenate(outputs, 1)[0]
        runs = {name: generate(models[kind], name, ids, mask, steps) for name in ("eager", "dsa_tvm")}
        for name, made in runs.items():
            logits[name, tuple(made.tokens[0].tolist())] = made.logits[0].numpy()
        assert len({tokens for _, tokens in logits}) == 1
        whole = torch.cat([ids[0], made.tokens[0, :-1]])
        # Two of them, because each program rounds in its own way, and may select another one of two almost equal keys.
        references = [reference_logits(models[kind], made, whole) for made in runs.values()]
        near = [near for _, near in references]
        for (way, _), got in logits.items():
            error = min(np.abs(got - x[s_q - 1 :]).max() / np.abs(x).max() for x, _ in references)
            print(f"{kind}, prompt of {s_q}, {way}: {error:.1e}; {near} queries select otherwise, within rounding")
            assert error < 1e-5, (way, s_q, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_caches_of_16_bits(dtype, models, tmp_path):
    """Closer to float32 than a model that is of that type altogether; half the memory; in place as well."""
    model = models["deepseek-yarn"]
    export_model(model, tmp_path / "model", cache_dtype=dtype)
    ids, _ = prompt(1, LENGTH)
    errors, tokens = {}, []
    model.set_attn_implementation("eager")
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        exact = model(ids).logits
        errors["whole model"] = (half(ids).logits.float() - exact).square().mean().sqrt()
    for library in (True, False):
        generator, pointers = Generator(tmp_path / "model", library=library, threads=1), []
        logits = []
        run = generator._run

        def watched(now, positions, keep, caches, run=run, pointers=pointers, logits=logits):
            everything = np.arange(now.shape[1])
            pointers.append({name: value.data_ptr() for name, value in caches.items()})
            assert all(value.element_type() == {"bf": 16, "fl": 10}[str(dtype)[6:8]] for value in caches.values())
            logits.append(run(now, positions, everything, caches))
            return logits[-1]

        generator._run = watched
        tokens.append(generator.generate(ids.tolist(), 4, chunk=LENGTH)[0])
        assert all(found == pointers[0] for found in pointers)
        errors[library] = (torch.from_numpy(logits[0]) - exact).square().mean().sqrt()
        assert 0 < errors[library] < errors["whole model"]
    assert tokens[0] == tokens[1]
    with pytest.raises(
        ArgumentError, match=r"cache_dtype: expected float32, float16, bfloat16 or none, got torch\.int8"
    ):
        export_model(model, tmp_path / "other", cache_dtype=torch.int8)


C = Path(__file__).parent.parent.parent / "export" / "c"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The C++ example. Where ONNX Runtime's headers are not installed, it takes our declarations of the interface."""
    libraries = sorted((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.1*"))
    if not libraries:
        pytest.skip(f"onnxruntime {ort.__version__} comes without libonnxruntime.so")
    directory = tmp_path_factory.mktemp("program")
    library = directory / "libonnxruntime.so.1"
    library.symlink_to(libraries[0])
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{C / 'src'}", library, f"-Wl,-rpath,{directory}"]
    subprocess.run(["c++", C / "examples" / "generate.cpp", *flags, "-o", directory / "generate"], check=True)
    return directory / "generate"


def run(program, model, prompt, new, library=None):
    command = [program, model, library or dsa_tvm.get_library_path(), str(new)]
    return subprocess.run(command, input=" ".join(map(str, prompt)), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_from_cpp(kind, program, exported, generators, models):
    """Those of `Generator` and of `model.generate`, after a prompt of more than one piece."""
    ids, mask = prompt(1, 600)
    expected = generators[kind, True].generate(ids.tolist(), NEW)[0]
    done = run(program, exported[kind] / "model.onnx", ids[0].tolist(), NEW)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == " ".join(map(str, expected)) + "\n"
    models[kind].set_attn_implementation("dsa_tvm")
    with torch.no_grad():
        made = models[kind].generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert made[0, 600:].tolist() == expected


def test_errors_from_cpp(program, exported, tmp_path):
    model = exported["deepseek-yarn"] / "model.onnx"
    assert run(program, model, [], 4).returncode == 2
    for done, expected in (
        (run(program, tmp_path / "model.onnx", [1], 4), "generate: Load model from"),
        (run(program, model, [1], 4, tmp_path / "none.so"), "generate: .*none.so"),
        (run(program, model, [1, 256], 4), "generate: .*indices element out of data bounds, idx=256"),
    ):
        assert done.returncode == 1 and re.search(expected, done.stderr), done.stderr


def test_a_sequence_ends_at_its_token(generators, generated):
    """And the others go on as they would without it."""
    ids, mask = prompt(3, LENGTH, 40)
    expected = generated("glm-shared", 3, 40, "eager")
    ends = frozenset([expected[1][4]])
    got = generators["glm-shared", True].generate(prompts_of(ids, mask), NEW, eos_token_ids=ends)
    for mine, whole in zip(got, expected, strict=True):
        stop = next((i + 1 for i, token in enumerate(whole) if token in ends), NEW)
        assert mine == whole[:stop]
    steps = list(generators["glm-shared", True].stream([[5] * 9], NEW, eos_token_ids=frozenset(range(256))))
    assert len(steps) == 1


def test_caches_stay_where_they_are(generators, monkeypatch):
    """One memory from the first chunk to the last step, in which every row has its token."""
    generator, seen = generators["deepseek-yarn", True], []
    run = generator._run

    def watched(ids, positions, keep, caches):
        before = {name: value.numpy().copy() for name, value in caches.items()}
        out = run(ids, positions, keep, caches)
        seen.append({name: value.data_ptr() for name, value in caches.items()})
        for name, value in caches.items():
            changed = (value.numpy() != before[name]).any(-1)
            for row, at in zip(changed, positions, strict=True):
                assert set(np.flatnonzero(row)) == set(at[at >= 0])
        return out

    monkeypatch.setattr(generator, "_run", watched)
    ids, mask = prompt(2, 50, 10)
    generator.generate(prompts_of(ids, mask), 5, chunk=20, capacity=60)
    assert len(seen) == 3 + 4 and all(pointers == seen[0] for pointers in seen)


def test_inputs_and_outputs(exported):
    model = onnx.load(exported["glm-shared"] / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(exported["glm-shared"] / "model.onnx"))

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    caches = {
        f"past_key_values.layers.{layer}.{name}": ["batch", "capacity", width]
        for layer in range(3)
        for name, width in (("keys", 576), ("indexer_keys", 128))
        if (layer, name) != (2, "indexer_keys")
    }
    tokens = ["batch", "s_q"]
    inputs = {"input_ids": tokens, "position_ids": tokens, "logits_to_keep": ["n"]}
    assert shapes(model.graph.input) == inputs | {f"input.{name}": shape for name, shape in caches.items()}
    outputs = {"logits": ["batch", "n", 256]}
    assert shapes(model.graph.output) == outputs | {f"output.{name}": shape for name, shape in caches.items()}
    ours = [node.op_type for node in model.graph.node if node.domain == "ai.dsa"]
    assert {name: ours.count(name) for name in set(ours)} == {"WriteRows": 5, "IndexerTopK": 2, "SparseMLA": 3}
    assert {function.name for function in model.functions} == set(ours)


@pytest.mark.parametrize("library", [True, False], ids=["library", "bodies"])
def test_a_position_behind_the_capacity_is_an_error(library, generators):
    generator = generators["deepseek-yarn", library]
    ids, mask = prompt(2, 10)
    inputs = feeds(generator, ids, mask, 9)
    with pytest.raises(Exception, match=r"'expect_positions_below_the_capacity'.* out of data bounds"):
        generator.session.run(["logits"], inputs)


@pytest.mark.parametrize("library", [True, False], ids=["library", "bodies"])
@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_other_lengths_are_an_error(kind, library, generators):
    """Longer or shorter than the others, or of another batch: no row of another sequence is taken for its own."""
    generator = generators[kind, library]
    ids, mask = prompt(2, 10)
    inputs = feeds(generator, ids, mask, 20)
    generator.session.run(["logits"], inputs)
    for name in generator._caches:
        for capacity in (19, 21):
            changed = inputs | {name: np.zeros((2, capacity, inputs[name].shape[2]), np.float32)}
            with pytest.raises(Exception, match=r"'expect_caches_of_one_capacity'.* out of data bounds"):
                generator.session.run(["logits"], changed)
        with pytest.raises(Exception, match=r"write_rows|WriteRows|Reshape|node_"):
            generator.session.run(["logits"], inputs | {name: np.zeros((3, 20, inputs[name].shape[2]), np.float32)})


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_truncated_models(name, exported, tmp_path):
    directory = shutil.copytree(exported["deepseek-yarn"], tmp_path / "copy")
    whole = (directory / name).read_bytes()
    for keep in (0, len(whole) // 2):
        (directory / name).write_bytes(whole[:keep])
        with pytest.raises(ModelError, match=r"model\.onnx: expected a model that (ONNX Runtime can load|dsa-tvm)"):
            Generator(directory)


def test_arguments(generators, exported, tmp_path):
    generator = generators["deepseek-yarn", True]
    for expected, prompts, new, options in (
        ("prompts: expected one at least, got none", [], 1, {}),
        ("prompts: 1: expected a token at least, got none", [[1], []], 1, {}),
        (r"prompts: 0: expected tokens in 0\.\.255, got 3 to 256", [[3, 256]], 1, {}),
        (r"prompts: 0: expected tokens in 0\.\.255, got -1 to 3", [[3, -1]], 1, {}),
        ("max_new_tokens: expected 1 at least, got 0", [[1]], 0, {}),
        ("chunk: expected 1 at least, got 0", [[1]], 1, {"chunk": 0}),
        (r"expected at most 9 \(capacity\), got 10", [[1, 2]], 8, {"capacity": 9}),
        (r"expected at most 163840 \(max_position_embeddings\), got 163841", [[1]], 163840, {}),
    ):
        with pytest.raises(ArgumentError, match=expected):
            generator.stream(prompts, new, **options)
    with pytest.raises(ArgumentError, match="threads: expected 0 for all"):
        Generator(exported["deepseek-yarn"], threads=-1)
    with pytest.raises(ModelError, match=r"config\.json: expected the file of an exported model, got none"):
        Generator(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"expected a directory with model\.onnx, got none"):
        Generator(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="expected a model that ONNX Runtime can load"):
        Generator(tmp_path)
    for changes, expected in (
        ({"vocab_size": "many"}, "vocab_size: expected a positive integer, got many"),
        ({"max_position_embeddings": None}, "max_position_embeddings: expected a positive integer, got None"),
        ({"eos_token_id": ["a"]}, r"eos_token_id: expected an integer or several, got \['a'\]"),
    ):
        other = copy.copy(generator)
        other.config = generator.config | changes
        with pytest.raises(ModelError, match=expected):
            other.generate([[1]], 1)
    (tmp_path / "model.onnx").write_bytes(export.build_model("topk", topk=4).SerializeToString())
    with pytest.raises(ModelError, match="expected a model that dsa-tvm export has made, got inputs logits, ks, ke"):
        Generator(tmp_path)
