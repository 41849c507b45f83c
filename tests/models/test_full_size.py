"""One layer of DeepSeek-V3.2 at its full size, from a checkpoint with the published names, shapes and types, to tokens.

Only what is not attention is small: vocabulary, experts, layers. ``python tests/models/test_full_size.py`` runs
it with the model's own topk of 2048, which takes a few minutes.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("onnxruntime")

from dsa_tvm.models.checkpoint import load_model  # noqa: E402
from dsa_tvm.models.transformers import accelerate  # noqa: E402

#: config.json as published, and what is made smaller of it.
CONFIG = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "v_head_dim": 128,
}
SMALL = {
    "vocab_size": 512,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
ATTENTION = {
    "q_a_proj": (1536, 7168),
    "q_b_proj": (128 * 192, 1536),
    "kv_a_proj_with_mqa": (576, 7168),
    "kv_b_proj": (128 * 256, 512),
    "o_proj": (7168, 128 * 128),
    "indexer.wq_b": (64 * 128, 1536),
    "indexer.wk": (128, 7168),
}


def write_checkpoint(directory: Path, topk: int) -> None:
    """Random weights under the published names, in two files with an index."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | SMALL | {"index_topk": topk}))
    generator = torch.Generator().manual_seed(0)

    def fp8(*shape):
        x = torch.randn(shape, generator=generator).mul_(100).to(torch.float8_e4m3fn)
        # Powers of two; a hundredth of 1 / sqrt(width), but for what is lost of it in the rounding.
        exponents = torch.randint(-1, 2, [-(-n // 128) for n in shape], generator=generator)
        return x, torch.exp2(exponents + math.floor(math.log2(shape[1] ** -0.5 / 100)))

    def norm(n):
        return 1 + 0.2 * torch.randn(n, generator=generator)

    layer, quantized, rest = "model.layers.0", {}, {}
    for name, shape in ATTENTION.items():
        quantized[f"{layer}.self_attn.{name}.weight"] = fp8(*shape)
    hidden, inner = CONFIG["hidden_size"], SMALL["moe_intermediate_size"]
    for expert in (*(f"experts.{i}" for i in range(SMALL["n_routed_experts"])), "shared_experts"):
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
            quantized[f"{layer}.mlp.{expert}.{name}.weight"] = fp8(*shape)
    attention = f"{layer}.self_attn"
    rest[f"{attention}.q_a_layernorm.weight"] = norm(1536).bfloat16()
    rest[f"{attention}.kv_a_layernorm.weight"] = norm(512).bfloat16()
    rest[f"{attention}.indexer.k_norm.weight"] = norm(128)
    rest[f"{attention}.indexer.k_norm.bias"] = norm(128) - 1
    rest[f"{attention}.indexer.weights_proj.weight"] = torch.randn(64, hidden, generator=generator) * hidden**-0.5
    rest[f"{layer}.input_layernorm.weight"] = norm(hidden).bfloat16()
    rest[f"{layer}.post_attention_layernorm.weight"] = norm(hidden).bfloat16()
    experts = SMALL["n_routed_experts"]
    rest[f"{layer}.mlp.gate.weight"] = (torch.randn(experts, hidden, generator=generator) * hidden**-0.5).bfloat16()
    rest[f"{layer}.mlp.gate.e_score_correction_bias"] = 0.1 * torch.randn(experts, generator=generator)
    rest["model.embed_tokens.weight"] = torch.randn(SMALL["vocab_size"], hidden, generator=generator).bfloat16()
    rest["lm_head.weight"] = (torch.randn(SMALL["vocab_size"], hidden, generator=generator) * hidden**-0.5).bfloat16()
    rest["model.norm.weight"] = norm(hidden).bfloat16()
    # The layer that predicts further tokens, which the model does without.
    rest["model.layers.1.eh_proj.weight"] = torch.zeros(4, 8).bfloat16()
    both = [{}, rest]
    for name, (x, scale) in quantized.items():
        both[0] |= {name: x, f"{name}_scale_inv": scale}
    names = {}
    for i, tensors in enumerate(both):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.save_file(tensors, directory / file)
        names |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def prompt(length: int) -> torch.Tensor:
    return torch.randint(2, SMALL["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))


GENERATE = """
import json, sys
from pathlib import Path
import numpy as np
from dsa_tvm.models.onnx import Generator
directory, new, prompt = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
generator, logits = Generator(directory), []
run = generator._run
generator._run = lambda *args: logits.append(run(*args)) or logits[-1]
tokens = generator.generate([prompt], new, eos_token_ids=frozenset())[0]
np.save(directory + "/logits.npy", np.concatenate([x[0] for x in logits if x.size]))
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(json.dumps([tokens, str(generator.timing), peak]))
"""


def peak() -> int:
    """MiB of memory that this process has taken at most."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10


def through(directory: Path, topk: int, length: int, new: int, implementations: tuple[str, ...]) -> None:
    """From the checkpoint to tokens and logits, by Transformers and by ONNX Runtime."""

    def say(what: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {what}", flush=True)

    started = time.perf_counter()
    checkpoint, exported = directory / "checkpoint", directory / "exported"
    write_checkpoint(checkpoint, topk)
    say(f"checkpoint of {sum(p.stat().st_size for p in checkpoint.iterdir()) / 2**20:.0f} MiB")
    model = load_model(checkpoint)
    model.generation_config.eos_token_id = None
    say(f"loaded, peak {peak()} MiB")
    shard = safetensors.load_file(checkpoint / "model-00001-of-00002.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # half a block at its end
    factors = np.kron(shard[f"{name}_scale_inv"].numpy(), np.ones((128, 128), np.float32))[:576]
    assert (model.state_dict()[name].numpy() == shard[name].float().numpy() * factors).all()
    del shard
    ids, made = prompt(length), {}
    for implementation in implementations:
        model.set_attn_implementation("eager") if implementation == "eager" else accelerate(model)
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad():
            got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
        made[implementation] = got.sequences[0, length:].tolist(), torch.cat(got.logits).numpy()
        say(f"{implementation}: {new} tokens after {length}, peak {peak()} MiB")
    del model
    subprocess.run([sys.executable, "-m", "dsa_tvm.cli", "export", checkpoint, "--out", exported], check=True)
    say("exported")
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, exported, str(new)],
        input=json.dumps(ids[0].tolist()),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tokens, timing, most = json.loads(done.stdout)
    say(f"ONNX Runtime: {timing}, peak {int(most) >> 10} MiB")
    made["ONNX Runtime"] = tokens, np.load(exported / "logits.npy")
    tokens, logits = made[implementations[0]]
    for way, (other_tokens, other_logits) in made.items():
        error = np.abs(other_logits - logits).max() / np.abs(logits).max()
        say(f"{way}: {len(set(tokens))} different tokens, logits within {error:.1e}")
        assert other_tokens == tokens and error < 1e-5, way


def test_load_accelerate_export_run(tmp_path):
    through(tmp_path, topk=128, length=300, new=4, implementations=("eager", "dsa_tvm"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        through(Path(place), topk=2048, length=2200, new=16, implementations=("dsa_tvm",))
