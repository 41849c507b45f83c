"""Head sizes of the models that use this attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ArgumentError


@dataclass(frozen=True)
class Preset:
    """One model's sizes; the names are those of `dsa_tvm.spec.DIMS`.

    Parameters
    ----------
    h_idx, d_idx : int
        Indexer heads and their width.
    topk : int
        Keys that a query attends to.
    h_q, d_qk, d_v : int
        Attention heads, width of a latent row, width of its value part.
    """

    h_idx: int
    d_idx: int
    topk: int
    h_q: int
    d_qk: int
    d_v: int

    @property
    def sm_scale(self) -> float:
        """Factor of the attention scores, ``d_qk**-0.5``."""
        return float(self.d_qk**-0.5)


#: Those without deepseek-v4 in their names follow the published configurations; tp8 is the share of the heads that each
#: of eight GPUs has. The deepseek-v4 entries are sizes this package is built to serve (512-wide rows, top 512 or 1024),
#: not the configuration of a published checkpoint.
PRESETS: Mapping[str, Preset] = {
    "deepseek-v3.2": Preset(h_idx=64, d_idx=128, topk=2048, h_q=128, d_qk=576, d_v=512),
    "deepseek-v3.2-tp8": Preset(h_idx=64, d_idx=128, topk=2048, h_q=16, d_qk=576, d_v=512),
    "glm-5": Preset(h_idx=32, d_idx=128, topk=2048, h_q=64, d_qk=576, d_v=512),
    "deepseek-v4-512": Preset(h_idx=64, d_idx=128, topk=512, h_q=64, d_qk=512, d_v=512),
    "deepseek-v4-1024": Preset(h_idx=64, d_idx=128, topk=1024, h_q=64, d_qk=512, d_v=512),
}

#: What commands take where no preset is named.
DEFAULT = "deepseek-v3.2"


def get(name: str) -> Preset:
    """The preset of that name.

    Raises
    ------
    ArgumentError
        There is none.
    """
    if name not in PRESETS:
        raise ArgumentError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
