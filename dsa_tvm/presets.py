"""Sizes and score scales of the models that use this attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import ArgumentError


def mla_scale(qk_head_dim: int, *, rope_factor: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """Return the `sm_scale` of a model with multi-head latent attention.

    A model scales its scores by the width that its heads have before absorption. Absorbing ``kv_b_proj`` into the
    queries does not change the scores. It only makes the vectors wider (576 numbers instead of 192 in DeepSeek-V3.2),
    so ``d_qk**-0.5`` would be another model.

    Parameters
    ----------
    qk_head_dim : int
        ``qk_nope_head_dim + qk_rope_head_dim`` of the configuration.
    rope_factor : float
        ``factor`` of the rope parameters, for a model whose rope type is YaRN.
    mscale_all_dim : float
        ``mscale_all_dim`` of the rope parameters; 0 if the configuration has none.

    Returns
    -------
    float
        ``qk_head_dim**-0.5``, times the square of YaRN's ``mscale = 0.1 * mscale_all_dim * ln(rope_factor) + 1``
        (YaRN, arXiv 2309.00071, section 3.4, as DeepSeek applies it: to the scores, hence squared).
    """
    mscale = 0.1 * mscale_all_dim * math.log(rope_factor) + 1.0 if rope_factor > 1 else 1.0
    return float(qk_head_dim**-0.5 * mscale**2)


@dataclass(frozen=True)
class Preset:
    """The attention of one model. The lengths are named as in `dsa_tvm.spec.DIMS`.

    Parameters
    ----------
    h_idx, d_idx : int
        Indexer heads and their width.
    topk : int
        Keys that a query attends to.
    h_q, d_qk, d_v : int
        Attention heads, width of a latent row, width of its value part.
    sm_scale : float
        Factor of the attention scores; see `mla_scale`.
    """

    h_idx: int
    d_idx: int
    topk: int
    h_q: int
    d_qk: int
    d_v: int
    sm_scale: float

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths alone, by name."""
        return {name: getattr(self, name) for name in ("h_idx", "d_idx", "topk", "h_q", "d_qk", "d_v")}

    @property
    def q_spread(self) -> float:
        """Standard deviation of random absorbed queries that gives scores a standard deviation of 1 over normal rows.

        Absorption makes queries wider but keeps their scores, so their numbers are smaller.
        """
        return float(self.d_qk**-0.5 / self.sm_scale)


#: As in the published config.json: qk_nope_head_dim 128, qk_rope_head_dim 64, YaRN with factor 40 and mscale_all_dim 1.
_V32_SCALE = mla_scale(128 + 64, rope_factor=40.0, mscale_all_dim=1.0)
_V32 = Preset(h_idx=64, d_idx=128, topk=2048, h_q=128, d_qk=576, d_v=512, sm_scale=_V32_SCALE)
#: DeepSeek-V4 does not absorb: its heads are 512 wide, keys and values are the same rows, and the scale is the plain
#: 512**-0.5. These are sizes this package is built to serve, not the configuration of a published checkpoint.
_V4 = Preset(h_idx=64, d_idx=128, topk=512, h_q=64, d_qk=512, d_v=512, sm_scale=mla_scale(512))

#: tp8: the heads that each of eight GPUs has under tensor parallelism.
PRESETS: Mapping[str, Preset] = {
    "deepseek-v3.2": _V32,
    "deepseek-v3.2-tp8": replace(_V32, h_q=16),
    # qk_nope_head_dim 192, qk_rope_head_dim 64, no YaRN.
    "glm-5": Preset(h_idx=32, d_idx=128, topk=2048, h_q=64, d_qk=576, d_v=512, sm_scale=mla_scale(192 + 64)),
    "deepseek-v4-512": _V4,
    "deepseek-v4-1024": replace(_V4, topk=1024),
}

#: The preset of commands that name none.
DEFAULT = "deepseek-v3.2"


def get(name: str) -> Preset:
    """The preset with this name.

    Raises
    ------
    ArgumentError
        No preset has this name.
    """
    if name not in PRESETS:
        raise ArgumentError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
