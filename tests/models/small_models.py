"""Small models of both families with random weights. topk is far below the length of prompts, so they drop tokens."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

#: With fewer index heads there would be exact ties: scores of 0, because relu removes all their products.
INDEX_HEADS = 32
TOPK = 96

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

#: A family and what is special in its model: layers that share a selection, a scaled rotary embedding.
KINDS = {
    "deepseek": ("deepseek", {}),
    "deepseek-yarn": ("deepseek", {"rope_parameters": YARN}),
    "glm": ("glm", {}),
    "glm-shared": ("glm", {"num_hidden_layers": 3, "indexer_types": ["full", "full", "shared"]}),
}


def config_of(kind: str = "deepseek", **changes):
    """The configuration of `make`."""
    family, special = KINDS[kind]
    settings = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "index_topk": TOPK,
        "index_head_dim": 128,
        "index_n_heads": INDEX_HEADS,
        "max_position_embeddings": 163840,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    if family == "deepseek":
        return DeepseekV32Config(**settings | {"n_group": 2, "topk_group": 1} | special | changes)
    return GlmMoeDsaConfig(**settings | special | changes)


def make(kind: str = "deepseek", **changes):
    """A model in evaluation mode. Equal arguments give equal weights."""
    torch.manual_seed(0)
    config = config_of(kind, **changes)
    model = (DeepseekV32ForCausalLM if KINDS[kind][0] == "deepseek" else GlmMoeDsaForCausalLM)(config)
    for name, parameter in model.named_parameters():  # what is initialized to 1 or 0 would hide mistakes
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    return model.eval()


def prompt(batch: int, length: int, padding: int = 0, seed: int = 1):
    """Token ids and attention mask. Sequence i has i * padding tokens of padding on its left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 256, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, : i * padding] = 0
    ids[mask == 0] = 0
    return ids, mask


def weights_of(attention: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights of an attention module, in the form that `dsa_tvm.models.reference` takes."""
    return {name: value.detach().double().numpy() for name, value in attention.state_dict().items()}
