"""Published checkpoints: names, shapes and types as on the hub, and what is wrong with damaged ones."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from small_models import KINDS, config_of, make, prompt  # noqa: E402

from dsa_tvm.cli import main  # noqa: E402
from dsa_tvm.errors import ArgumentError, ModelError  # noqa: E402
from dsa_tvm.models import checkpoint  # noqa: E402
from dsa_tvm.models.checkpoint import load_model  # noqa: E402
from dsa_tvm.models.onnx import export_checkpoint, export_model, exporting  # noqa: E402
from dsa_tvm.runtime.files import owned  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories with what Transformers saves, one for each kind of model, experts one by one."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp("checkpoint") / kind
        make(kind).save_pretrained(made[kind])
    return made


@pytest.fixture
def copy_of(saved, tmp_path):
    """A checkpoint to change."""

    def copy(kind="deepseek"):
        return shutil.copytree(saved[kind], tmp_path / "copy")

    return copy


#: As published models have it.
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "scale_fmt": "ue8m0"}


def change_config(directory, **changes):
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | changes))


def change(directory, changes=None, removed=(), config=None):
    """Rewrite tensors and settings."""
    path = directory / "model.safetensors"
    tensors = safetensors.load_file(path)
    safetensors.save_file({n: x for n, x in (tensors | (changes or {})).items() if n not in removed}, path)
    change_config(directory, **(config or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves(kind, saved):
    names = safetensors.load_file(saved[kind] / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in names  # as published
    expected, got = make(kind).state_dict(), load_model(saved[kind])
    assert not got.training
    assert got.state_dict().keys() == expected.keys()
    for name, value in got.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ids, _ = prompt(1, 50)
    with torch.no_grad():  # with what is computed and not saved, the rotary embedding
        assert torch.equal(got(ids).logits, make(kind)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(dtype, saved):
    """As `from_pretrained` has them: some stay in float32."""
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(saved["glm-shared"], dtype=dtype)
    got = load_model(saved["glm-shared"], dtype=dtype)
    for name, value in expected.state_dict().items():
        assert got.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(got.state_dict()[name], value), name


def test_files_with_an_index(saved, tmp_path):
    make("glm-shared").save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = make("glm-shared").state_dict()
    assert all(torch.equal(x, expected[n]) for n, x in load_model(tmp_path).state_dict().items())
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(ModelError, match=r"model-00001-of.*: expected a file that the index names, got none"):
        load_model(tmp_path)


def quantized(weight, block=128):
    """fp8 weights and the factor of each block, as the published checkpoints have them."""
    rows, columns = (-(-n // block) for n in weight.shape)
    scale = torch.ones(rows, columns)
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[part].abs().max() / 448
            out[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return out, scale


@pytest.mark.parametrize("piece", [checkpoint._PIECE_BYTES, 4 << 10])
def test_fp8(piece, copy_of, monkeypatch):
    """Each weight is within the step of its block's fp8 of what it was; and a factor belongs to its own block."""
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", piece)
    monkeypatch.setattr(checkpoint, "_MAPPED_BYTES", 2 * piece)
    directory = copy_of()
    tensors = safetensors.load_file(directory / "model.safetensors")
    fp8 = [n for n in tensors if "_proj" in n and "weights_proj" not in n] + [
        "model.layers.0.self_attn.indexer.wk.weight"
    ]
    changes = {}
    for i, name in enumerate(fp8):
        x = tensors[name] * (1 + i)
        x[:, 100:] *= 64  # blocks of different size: a factor in the wrong place shows
        tensors[name] = x
        changes[name], changes[f"{name}_scale_inv"] = quantized(x)
    change(directory, changes, config={"quantization_config": FP8})
    got = load_model(directory).state_dict()
    assert any(max(tensors[n].shape) > 128 for n in fp8) and any(min(tensors[n].shape) % 128 for n in fp8)
    for name in fp8:
        if ".experts." not in name:
            assert_dequantized(got[name], tensors[name], changes[f"{name}_scale_inv"])
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    merged = got["model.layers.1.mlp.experts.gate_up_proj"]
    assert_dequantized(merged[3, merged.shape[1] // 2 :], tensors[up], changes[f"{up}_scale_inv"])
    change(directory, removed=[f"{up}_scale_inv"])
    with pytest.raises(ModelError, match=f"{up}: expected {up}_scale_inv and a quantization_config beside fp8 weights"):
        load_model(directory)
    change(directory, {f"{up}_scale_inv": torch.ones(1, 2)})
    with pytest.raises(ModelError, match=rf"{up}_scale_inv: expected shape \[1, 1\], got \[1, 2\]"):
        load_model(directory)


def assert_dequantized(got, expected, scale):
    step = scale.repeat_interleave(128, 0)[: got.shape[0]].repeat_interleave(128, 1)[:, : got.shape[1]]
    assert ((got - expected).abs() <= expected.abs() / 16 + step * 2**-9).all()


def test_layers(saved, copy_of):
    """Some of them, without those of the prediction of further tokens."""
    whole = make("glm-shared").state_dict()
    part = load_model(saved["glm-shared"], layers=(1, 3))
    assert part.config.num_hidden_layers == 2 and part.config.indexer_types == ["full", "shared"]
    for name, value in part.state_dict().items():
        source = name.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1.") if "layers" in name else name
        assert torch.equal(value, whole[source]), name
    for layers, expected in (
        ((2, 3), "layers: expected a first layer with an indexer, got 2"),
        ((1, 4), "layers: expected a range within 0:3, got 1:4"),
        ((1, 1), "layers: expected a range within 0:3, got 1:1"),
    ):
        with pytest.raises(ArgumentError, match=expected):
            load_model(saved["glm-shared"], layers=layers)
    directory = copy_of()
    change(directory, {"model.layers.2.eh_proj.weight": torch.zeros(2, 2)})
    load_model(directory)


NORM = "model.layers.1.self_attn.indexer.k_norm.bias"
EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"
DAMAGE = {
    f"checkpoint: tensors missing in the files: {NORM}$": {"removed": [NORM]},
    f"tensors missing in the files: {EXPERT}$": {"removed": [EXPERT]},
    "tensors not expected of the model: model.layers.0.self_attn.q_proj.weight": {
        "changes": {"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}
    },
    rf"{NORM}: expected shape \[128\], got \[127\]": {"changes": {NORM: torch.zeros(127)}},
    rf"{EXPERT}: expected shape \[128, 64\], got \[64, 128\]": {"changes": {EXPERT: torch.zeros(64, 128)}},
    f"{NORM}: expected one of F64, F32, F16, BF16, F8_E4M3, got I8": {
        "changes": {NORM: torch.zeros(128, dtype=torch.int8)}
    },
    "quantization_config: expected quant_method fp8 with weight_block_size of two numbers, got awq": {
        "config": {"quantization_config": {"quant_method": "awq"}}
    },
    "model_type: expected deepseek_v32 or glm_moe_dsa, got llama": {"config": {"model_type": "llama"}},
    "quantization_config: expected quant_method fp8 .*, got None with None": {"config": {"quantization_config": "fp8"}},
    r"quantization_config: expected .* of two numbers, got fp8 with \[0, 128\]": {
        "config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}
    },
    "expected a configuration of deepseek_v32, got: .*num_hidden_layers.* expected int": {
        "config": {"num_hidden_layers": "two"}
    },
    "expected a configuration of deepseek_v32, got: KeyError: 'wow'": {"config": {"hidden_act": "wow"}},
    "expected a configuration of deepseek_v32, got: KeyError: 'warp'": {
        "config": {"rope_parameters": {"rope_type": "warp", "rope_theta": 1e4}}
    },
    r"embed_tokens\.weight: expected shape \[256, 1000000000000000\], got \[256, 128\]": {
        "config": {"hidden_size": 10**15}
    },
    "n_group: expected a divisor of 8 n_routed_experts, got 3": {"config": {"n_group": 3}},
    r"topk_group: expected 1\.\.2, got 3": {"config": {"topk_group": 3}},
    r"num_experts_per_tok: expected 1\.\.4, got 5": {"config": {"num_experts_per_tok": 5}},
    r"index_topk: expected 1\.\.4096, got 0": {"config": {"index_topk": 0}},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_what_is_wrong_is_named(message, copy_of, tmp_path):
    directory = copy_of()
    change(directory, **DAMAGE[message])
    with pytest.raises(ModelError, match=message):
        export_checkpoint(directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("kinds", [["full"], ["full", "nope", "shared"], ["shared", "full", "full"], []])
def test_wrong_kinds_of_indexers(kinds, copy_of):
    directory = copy_of("glm-shared")
    change_config(directory, indexer_types=kinds)
    with pytest.raises(ModelError, match="expected 3 times full or shared, the first one full, got"):
        load_model(directory)


@pytest.mark.parametrize("name", ["../copy/model.safetensors", "/etc/passwd", ".", "..", "", 5, ["a"]])
def test_an_index_that_leads_elsewhere(name, copy_of):
    directory = copy_of()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(
        ModelError, match=r"index\.json: expected (names of files beside it|JSON with a weight_map), got"
    ):
        load_model(directory)


@pytest.mark.parametrize("keep", [0, 7, 5000, -1])
def test_truncated_files(keep, copy_of, tmp_path, capsys):
    directory = copy_of()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert main(["export", str(directory), "--out", str(tmp_path / "out")]) == 1
    assert f"{path}: expected a whole safetensors file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    for path, expected in (("nowhere", "with config.json, got none"), ("file", "with config.json, got a file")):
        with pytest.raises(ModelError, match=expected):
            load_model(tmp_path / path)
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ModelError, match=r"config\.json: expected JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v32"}')
    with pytest.raises(ModelError, match=r"expected \.safetensors files, got none"):
        load_model(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_nothing_half_written(error, tmp_path, monkeypatch):
    """Whatever stops the export when the weights are on the disk already."""

    def stop(graph):
        assert list(tmp_path.glob(".out.*/model.onnx.data"))
        raise error

    monkeypatch.setattr(exporting, "_name_lengths", stop)
    model = make("deepseek", num_hidden_layers=1)
    with pytest.raises((KeyboardInterrupt, OSError)):
        export_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert model.config._attn_implementation != "dsa_tvm"


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from dsa_tvm.cli import main
sys.exit(main(["export", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("bytes_written", [0, 100_000, 3_000_000])
def test_a_file_that_cannot_be_written(bytes_written, saved, tmp_path):
    """Not at all, in the middle of the weights, or as a whole and then not put in order."""
    weights = sum(x.nbytes for x in safetensors.load_file(saved["deepseek"] / "model.safetensors").values())
    assert weights > 3_000_000
    out = tmp_path / "out"
    command = [sys.executable, "-c", LIMITED, str(bytes_written), str(saved["deepseek"]), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith(f"[Errno 27] File too large: '{out}'\n")
    assert not list(tmp_path.iterdir())


SMALL_DISK = """
import shutil, sys
from pathlib import Path
from types import SimpleNamespace
shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 60)  # as if somebody else filled the disk meanwhile
from dsa_tvm.cli import main
status = main(["export", sys.argv[1], "--out", sys.argv[2] + "/out"])
assert not list(Path(sys.argv[2]).iterdir())
sys.exit(status)
"""


def test_a_full_disk(saved, tmp_path):
    """A file system of 1 MB."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"']
    if subprocess.run([*mount, tmp_path, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    command = [*mount, tmp_path, sys.executable, "-c", SMALL_DISK, saved["deepseek"], tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith(f"[Errno 28] No space left on device: '{tmp_path}/out'\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_is_killed(number, saved, tmp_path):
    """Nothing of that name, nothing else that the next export to it does not remove."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dsa_tvm.cli", "export", str(saved["deepseek"]), "--out", str(out), "--layers=0:1"]
    process = subprocess.Popen(command)
    while not list(tmp_path.glob(".out.*.partial/model.onnx.data")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() in (-number, 128 + number)
    assert len(list(tmp_path.iterdir())) == (number == signal.SIGKILL)
    living = tmp_path / ".out.0123abcd.partial"
    living.mkdir()
    with owned(living):
        subprocess.run(command, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", living.name}


MEMORY = """
import sys
from pathlib import Path
from dsa_tvm.models.onnx import exporting

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10

before = peak()
exporting.export_checkpoint(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


def test_a_checkpoint_larger_than_memory(tmp_path):
    """1.4 GiB of weights in three layers, from fp8: the peak grows by less than half of them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 40960, "num_hidden_layers": 3, "first_k_dense_replace": 3}
    config = config_of(**sizes)
    config.save_pretrained(tmp_path / "checkpoint")
    change_config(tmp_path / "checkpoint", quantization_config=FP8)
    with torch.device("meta"):
        weights = transformers.DeepseekV32ForCausalLM(config).state_dict()
    assert sum(4 * x.numel() for x in weights.values()) > 1.4 * 2**30
    for layer in (*range(3), ""):
        shard = {}
        for name, x in weights.items():
            if name.startswith(f"model.layers.{layer}.") if layer != "" else ".layers." not in name:
                shard[name] = torch.zeros(x.shape, dtype=torch.bfloat16)
                if ".mlp." in name:
                    shard[name] = shard[name].to(torch.float8_e4m3fn)
                    shard[f"{name}_scale_inv"] = torch.ones(*(-(-n // 128) for n in x.shape))
        safetensors.save_file(shard, tmp_path / "checkpoint" / f"layer{layer}.safetensors")
    command = [sys.executable, "-c", MEMORY, tmp_path / "checkpoint", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 700
    shutil.rmtree(tmp_path)


def test_what_is_not_served_is_known_before_the_work(copy_of, tmp_path, monkeypatch):
    directory = copy_of()
    change(directory, config={"index_topk": 5000})
    monkeypatch.setattr(exporting, "_weight_file", None)
    with pytest.raises(ModelError, match=r"index_topk: expected 1\.\.4096, got 5000"):
        export_checkpoint(directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("loaded", [False, True], ids=["from files", "from memory"])
def test_one_matrix_for_embedding_and_head(loaded, tmp_path):
    """It is looked up as it is and multiplied with transposed."""
    from dsa_tvm.models.onnx import Generator

    model = make("deepseek", num_hidden_layers=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "checkpoint")
    if loaded:
        export_model(model, tmp_path / "out")
    else:
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    ids, _ = prompt(1, 120)
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert Generator(tmp_path / "out").generate(ids.tolist(), 6) == expected[:, 120:].tolist()


def test_a_full_disk_is_known_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_GRAPH_BYTES", 1 << 60)
    monkeypatch.setattr(exporting, "_program", None)
    with pytest.raises(OSError, match="No space left on device for 0"):
        export_model(make("deepseek", num_hidden_layers=1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    model = make("deepseek", num_hidden_layers=1)
    for path, expected in (("out", "or is empty, got one with files"), ("out/mine", "is not there yet, got a file")):
        with pytest.raises(ArgumentError, match=expected):
            export_model(model, tmp_path / path)
    with pytest.raises(ArgumentError, match="export: dtype: expected float32 or float16, got bfloat16: ONNX Runtime"):
        export_model(model.bfloat16(), tmp_path / "other")
    assert (tmp_path / "out" / "mine").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def words_tokenizer(path):
    """A tokenizer of the words w0 to w255."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def test_commands(copy_of, tmp_path, capsys):
    """From a checkpoint to tokens, in float16 too; numbers without a tokenizer, and words with one."""
    directory, ids = copy_of("glm-shared"), prompt(1, 120)[0]
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 300]}')
    model = make("glm-shared")
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    expected = expected[0, 120:].tolist()
    numbers, words = tmp_path / "numbers", tmp_path / "words"
    numbers.write_text(" ".join(map(str, ids[0].tolist())))
    words.write_text(" ".join(f"w{i}" for i in ids[0].tolist()))
    out = tmp_path / "out"
    assert main(["export", str(directory), "--out", str(out), "--no-bodies"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.onnx", "model.onnx.data")
    }
    generate = ["generate", str(out), "--max-new-tokens", "6", "--threads", "1", "--prompt"]
    assert main([*generate, str(numbers)]) == 0
    said = capsys.readouterr()
    assert said.out == " ".join(map(str, expected)) + "\n"
    assert said.err.startswith("prefill 120 tokens in") and "decode 5 tokens in" in said.err
    assert main([*generate, str(words)]) == 1
    assert "expected numbers of tokens, as there is no tokenizer, got 'w" in capsys.readouterr().err
    words_tokenizer(out / "tokenizer.json")
    assert main([*generate, str(words), "--chunk", "50"]) == 0
    assert capsys.readouterr().out == " ".join(f"w{i}" for i in expected) + "\n"
    assert main([*generate, str(words), "--tokenizer", str(words)]) == 1
    assert "expected a tokenizer.json, got" in capsys.readouterr().err
    assert main([*generate, str(words), "--no-library"]) == 1  # it was made without bodies
    assert "expected a model that ONNX Runtime can load" in capsys.readouterr().err


def test_float16(saved, tmp_path):
    """Close to float32 in the probabilities: rounded hidden states select other tokens in later layers."""
    from dsa_tvm.models.onnx import Generator

    export_checkpoint(saved["deepseek"], tmp_path / "out", dtype=torch.float16, layers=(0, 1))
    generator = Generator(tmp_path / "out", threads=1)
    ids, _ = prompt(1, 80)
    caches = {n: np.zeros((1, 90, x.shape[2]), np.float16) for n, x in generator._caches.items()}
    positions = np.arange(80)[None]
    out = generator.session.run(
        ["logits"], {"input_ids": ids.numpy(), "position_ids": positions, "logits_to_keep": np.arange(80), **caches}
    )[0]
    with torch.no_grad():
        expected = load_model(saved["deepseek"], layers=(0, 1))(ids).logits.numpy()
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, expected, atol=0.02 * np.abs(expected).max())
    assert len(generator.generate([ids[0].tolist()], 4)[0]) == 4


def test_generating_needs_no_torch(saved):
    code = (
        "import sys, dsa_tvm.models.onnx.generator, dsa_tvm.models.command; "
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dtypes_are_named():
    assert set(checkpoint.DTYPES) == {"float32", "float16", "bfloat16"}
