"""``attn_implementation="dsa_tvm"`` for Transformers' DeepSeek-V3.2 and GLM-5 (`deepseek_v32`, `glm_moe_dsa`).

Importing this module registers it. Then ``from_pretrained(..., attn_implementation="dsa_tvm")`` loads a model that uses
the operators of this package, and `accelerate` changes a loaded model. The forward method of the attention stays that
of Transformers. So do projections, norms, rotary embeddings, caches, selections that layers share, and `generate`. If,
and only if, the configuration says "dsa_tvm", four things are different:

- the mask is a range of keys for each query instead of ``[b, 1, s_q, s_kv]`` (`ranges.key_ranges`);
- the indexer's forward selects with `indexer_topk` instead of holding every score (`layer.select`);
- `expand_kv` returns the latents instead of expanding them;
- the attention is `sparse_mla` in the absorbed form (`layer.attend`).

Registries of Transformers take the first and the last. The other two replace methods of its classes, which are checked
when this module is imported. An untested version of Transformers also has to give the results of its eager attention on
a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..errors import ModelError
from .families import FAMILIES, NAME, TESTED, Family, check_agreement, check_family, check_module, is_tested
from .layer import HOOKED, attend, select
from .ranges import key_ranges
from .row_cache import RowCache

Model = TypeVar("Model", bound=torch.nn.Module)

__all__ = ["NAME", "TESTED", "RowCache", "accelerate", "restore"]

#: Where `accelerate` keeps the previous implementation.
_BEFORE = "_dsa_tvm_before"


def accelerate(model: Model) -> Model:
    """Put the attention of a loaded model on the operators of this package.

    Parameters
    ----------
    model : torch.nn.Module
        `DeepseekV32ForCausalLM`, `GlmMoeDsaForCausalLM`, or anything that contains their attention. It is changed in
        place. ``model.set_attn_implementation(...)`` and `restore` change it back.

    Returns
    -------
    model : torch.nn.Module
        The same.

    Raises
    ------
    ModelError
        The model has no attention of these families, a size that the operators do not serve, or a module that lacks
        an attribute.
    """
    attentions = [m for m in model.modules() if isinstance(m, _attention_classes())]
    if not attentions:
        served = " or ".join(f.model_type for f in FAMILIES)
        raise ModelError(f"accelerate: expected a model of type {served}, got {type(model).__name__} without any of it")
    for attention in attentions:
        check_module(attention)
    for holder in _holders(model):
        if _implementation(holder) != NAME:
            setattr(holder, _BEFORE, _implementation(holder))
        _set_implementation(holder, NAME)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`. Each part of the model gets its previous attention back, or "sdpa" if that is unknown.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. A model that is not accelerated does not change.

    Returns
    -------
    model : torch.nn.Module
        The same.
    """
    for holder in _holders(model):
        if _implementation(holder) == NAME:
            _set_implementation(holder, getattr(holder, _BEFORE, None) or "sdpa")
        if hasattr(holder, _BEFORE):
            delattr(holder, _BEFORE)
    return model


def _attention_classes() -> tuple[type, ...]:
    return tuple(family.attention for family in FAMILIES)


def _holders(model: torch.nn.Module) -> list[Any]:
    """The parts of a model, one for each configuration with DSA attention, whose implementation can be set."""
    classes, found, seen = _attention_classes(), [], set()
    for module in model.modules():  # outer ones first
        holds = isinstance(module, PreTrainedModel) and any(isinstance(m, classes) for m in module.modules())
        if (holds or isinstance(module, classes)) and id(module.config) not in seen:
            seen.add(id(module.config))
            found.append(module)
    return found


def _implementation(holder: Any) -> str | None:
    return holder.config._attn_implementation


def _set_implementation(holder: Any, name: str) -> None:
    if isinstance(holder, PreTrainedModel):
        holder.set_attn_implementation(name)
    else:
        holder.config._attn_implementation = name


def _install(family: Family) -> None:
    attention, indexer, module = family.attention, family.indexer, family.module
    if hasattr(attention, HOOKED):  # this module was imported before
        return
    expand, forward = attention.expand_kv, indexer.forward

    def expand_kv(self, kv_nope, k_rot):
        if self.config._attn_implementation == NAME:
            return kv_nope, k_rot
        if kv_nope.shape[-1] != self.kv_lora_rank:  # rows of a RowCache
            kv_nope, k_rot = kv_nope.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        return expand(self, kv_nope, k_rot)

    def indexer_forward(
        self,
        hidden_states,
        q_resid,
        position_embeddings,
        attention_mask,
        position_ids=None,
        cache=None,
        past_key_values=None,  # the name of `cache` up to Transformers 5.23
    ):
        cache = past_key_values if cache is None else cache
        if self.config._attn_implementation != NAME:
            return forward(self, hidden_states, q_resid, position_embeddings, attention_mask, position_ids, cache)
        rotate = getattr(module, family.indexer_rotation)
        return select(self, rotate, hidden_states, q_resid, position_embeddings, attention_mask, cache)

    setattr(attention, HOOKED, True)
    attention.expand_kv, indexer.forward = expand_kv, indexer_forward


def _register() -> None:
    for family in FAMILIES:
        check_family(family)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, key_ranges)
    for family in FAMILIES:
        _install(family)
    if not is_tested():
        try:
            check_agreement()
        except ModelError as error:
            AttentionInterface.register(NAME, _refusing(str(error)))
            raise


def _refusing(message: str) -> Callable:
    """An attention that always raises, for models that use the implementation although importing this module failed."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ModelError(message)

    return refuse


_register()
