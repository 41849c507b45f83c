"""``python -m dsa_tvm.models.sample.make DIR``: export the sample model and let Transformers write its tokens.

The largest logit of each step has to stand out: programs that round differently have to agree on it. So of some seeds
the one with the widest margin is taken.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from ...runtime.files import scratch, write_atomically
from ..onnx import export_model
from ..transformers import accelerate, restore
from . import EXPECTED, MODEL, prompt

_SEEDS = range(12)
_NEW_TOKENS = 32
#: Of a file in the archive: its own would make every archive another one.
_DATE = (1980, 1, 1, 0, 0, 0)
_CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 256,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Smaller weights repeat a token for ever.
    "initializer_range": 0.2,
}


def model(seed: int) -> Any:
    """The model with the weights of a seed, in float32 with the values of bfloat16.

    Returns
    -------
    DeepseekV32ForCausalLM
    """
    torch.manual_seed(seed)
    made = DeepseekV32ForCausalLM(DeepseekV32Config(**_CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:  # 1 and 0 would hide mistakes
                torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
            parameter.copy_(parameter.bfloat16())
    return made


def generate(of: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of the prompt, and the logits [tokens, vocab] that they were chosen by."""
    ids = torch.tensor([prompt()])
    with torch.no_grad():
        done = of.generate(
            ids, max_new_tokens=_NEW_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    return done.sequences[0, ids.shape[1] :].tolist(), torch.cat(done.scores)


def margin(logits: torch.Tensor) -> float:
    """The least distance between the largest logit of a step and the next one."""
    first, second = logits.topk(2).values.T
    return float((first - second).min())


def pack(directory: Path) -> bytes:
    """The files of an exported model as an archive; equal files give equal bytes."""
    with scratch() as path:
        with zipfile.ZipFile(path / "archive", "w") as archive:
            for file in sorted(directory.iterdir()):
                info = zipfile.ZipInfo(file.name, _DATE)
                info.compress_type = zipfile.ZIP_BZIP2  # a quarter less than deflate
                archive.writestr(info, file.read_bytes(), compresslevel=9)
        return (path / "archive").read_bytes()


def main(directory: Path) -> None:
    """Make ``model.zip`` and ``expected.json`` in a directory."""
    widest, seed = max((margin(generate(accelerate(model(seed)))[1]), seed) for seed in _SEEDS)
    chosen = model(seed)
    tokens, logits = generate(chosen)
    accelerate(chosen)
    same, others = generate(chosen)
    restore(chosen)
    error = float((logits - others).abs().max())
    print(f"seed {seed}: margin {widest:.3f}, largest difference of a logit {error:.1e}, tokens {tokens}")
    if same != tokens or margin(logits) < 10 * error:
        raise SystemExit("the tokens are not clear enough: other seeds are needed")
    with scratch() as path:
        export_model(chosen, path / "model")
        onnx.checker.check_model(path / "model" / "model.onnx")
        write_atomically(directory / MODEL.name, pack(path / "model"))
    found = {
        "seed": seed,
        "tokens": tokens,
        "made_by": f"transformers {transformers.__version__}",
        "margin": round(margin(logits), 4),
        "error": error,
    }
    write_atomically(directory / EXPECTED.name, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
