"""The families of DSA models in Transformers, and checks that its version of them is supported.

We replace two methods of its classes (see `transformers`), so their names and arguments are checked first. With an
untested version of Transformers, a small model of each family also has to give the results of its eager attention.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ..errors import ModelError
from ..spec import DIMS

#: The name of the `attn_implementation`.
NAME = "dsa_tvm"

#: The oldest and the newest version of Transformers that the tests passed with.
TESTED = ("5.18.0", "5.24.0")


@dataclass(frozen=True)
class Family:
    """Where Transformers keeps a family of models, and how it rotates the queries and keys of the indexer."""

    model_type: str
    prefix: str
    indexer_rotation: str

    @property
    def module(self) -> Any:
        """The modeling module, which is imported."""
        return importlib.import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")

    @property
    def attention(self) -> Any:
        """The class of its attention."""
        return getattr(self.module, f"{self.prefix}Attention")

    @property
    def indexer(self) -> Any:
        """The class of its indexer."""
        return getattr(self.module, f"{self.prefix}Indexer")


FAMILIES = (
    Family("deepseek_v32", "DeepseekV32", "apply_rotary_pos_emb"),
    Family("glm_moe_dsa", "GlmMoeDsa", "apply_rotary_pos_emb_interleave"),
)


def family_of(model_type: str) -> Family:
    """The family of a model type that is served."""
    return next(family for family in FAMILIES if family.model_type == model_type)


def cache_name(forward: Callable[..., Any]) -> str:
    """What a forward of this version of Transformers calls its cache."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


#: The attributes of the modules that `select` and `attend` read.
_INDEXER_MEMBERS = (
    *("wq_b", "wk", "k_norm", "weights_proj", "n_heads", "head_dim", "qk_rope_head_dim", "index_topk"),
    *("softmax_scale", "layer_idx", "config"),
)
_ATTENTION_MEMBERS = (
    *("indexer", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "config"),
)


def check_module(attention: Any) -> None:
    """Raise `ModelError` unless an attention module has all that we need, in sizes that the operators serve."""
    indexer = getattr(attention, "indexer", None)
    missing = [name for name in _ATTENTION_MEMBERS if not hasattr(attention, name)]
    missing += [f"indexer.{name}" for name in _INDEXER_MEMBERS if indexer is not None and not hasattr(indexer, name)]
    if missing:
        raise ModelError(_changed(f"{type(attention).__name__} without {', '.join(missing)}"))
    config = attention.config
    sizes = {
        "num_attention_heads": (config.num_attention_heads, DIMS["h_q"].maximum),
        "kv_lora_rank": (attention.kv_lora_rank, max(DIMS["d_v"].values)),
        "qk_rope_head_dim": (attention.qk_rope_head_dim, max(DIMS["d_qk"].values) - max(DIMS["d_v"].values)),
        "index_n_heads": (config.index_n_heads, DIMS["h_idx"].maximum),
        "index_head_dim": (config.index_head_dim, max(DIMS["d_idx"].values)),
        "index_topk": (config.index_topk, DIMS["topk"].maximum),
    }
    for name, (value, most) in sizes.items():
        if not 1 <= value <= most:
            raise ModelError(f"{config.model_type}: {name}: expected 1..{most}, got {value}")
    if getattr(attention.kv_b_proj, "bias", None) is not None:
        raise ModelError(f"{config.model_type}: kv_b_proj: expected no bias, which has no absorbed form, got one")


def _changed(what: str) -> str:
    return (
        f"transformers {transformers.__version__}: {what}; dsa_tvm was tested with {TESTED[0]} to {TESTED[1]}, "
        "please install one of those"
    )


def check_family(family: Family) -> None:
    """Raise `ModelError` unless the classes have the methods that we replace, with the arguments that we pass on."""
    try:
        module = family.module
    except ImportError as error:
        raise ModelError(_changed(f"no models of type {family.model_type}")) from error
    for name in (f"{family.prefix}Attention", f"{family.prefix}Indexer", family.indexer_rotation):
        if not hasattr(module, name):
            raise ModelError(_changed(f"no {name} in {module.__name__}"))
    needed = {
        (family.attention, "expand_kv"): {"kv_nope", "k_rot"},
        (family.indexer, "forward"): {
            *("hidden_states", "q_resid", "position_embeddings", "attention_mask", "position_ids"),
        },
    }
    for (owner, name), parameters in needed.items():
        method = getattr(owner, name, None)
        if method is None:
            raise ModelError(_changed(f"{owner.__name__} without {name}"))
        found = set(inspect.signature(method).parameters) - {"self"}
        lacking = sorted(parameters - found)
        unknown = sorted(found - parameters - {"cache", "past_key_values"})
        if lacking or unknown:
            raise ModelError(
                _changed(f"{owner.__name__}.{name} with other arguments (lacking {lacking}, new {unknown})")
            )


def _small_model(family: Family) -> Any:
    """A model of the family, as small as possible, for inputs longer than the number of keys that it selects."""
    config = getattr(transformers, f"{family.prefix}Config")(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        index_topk=8,
        index_n_heads=32,
        index_head_dim=128,
        pad_token_id=0,
        initializer_range=0.2,  # large enough that a wrong result shows
    )
    return getattr(transformers, f"{family.prefix}ForCausalLM")(config).eval()


def _agree(family: Family) -> bool:
    """Whether a small model gives the same logits as with eager attention."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        model = _small_model(family).float()
        tokens = torch.randint(1, 32, (1, 40))
        model.set_attn_implementation("eager")
        expected = model(tokens).logits
        model.set_attn_implementation(NAME)
        return bool(torch.allclose(model(tokens).logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())))


def is_tested() -> bool:
    """Whether the tests passed with this version of Transformers."""
    return _version(TESTED[0]) <= _version(transformers.__version__) <= _version(TESTED[1])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def check_agreement() -> None:
    """Raise `ModelError` unless small models give the same results with our attention as with eager attention."""
    for family in FAMILIES:
        try:
            agree = _agree(family)
        except Exception as error:
            raise ModelError(_changed(f"{family.model_type} fails with {type(error).__name__}: {error}")) from error
        if not agree:
            raise ModelError(_changed(f"{family.model_type} computes something else than its eager attention"))
