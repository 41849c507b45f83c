"""Which layer is measured, and how: plain values that go to every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArgumentError

#: What runs the layer, and how the tables call it.
METHODS: Mapping[str, str] = {
    "ours": "ours",
    "dense": "dense MLA",
    "sdpa": "sdpa",
    "eager": "eager",
}
PHASES = ("prefill", "decode")
DTYPES = ("float32", "bfloat16", "float16")

#: Presets with whole layers: the type of Transformers' model, and what differs from the defaults of its configuration.
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LAYERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "deepseek-v3.2": ("deepseek_v32", {"rope_parameters": _YARN}),
    "deepseek-v3.2-tp8": ("deepseek_v32", {"rope_parameters": _YARN, "num_attention_heads": 16}),
    "glm-5": ("glm_moe_dsa", {}),
}


@dataclass(frozen=True)
class Problem:
    """A layer, and what goes through it.

    Parameters
    ----------
    checkpoint : Path, optional
        Where its weights are read; None for a preset's with seeded weights.
    preset : str
        A key of `LAYERS`; of no use with a checkpoint.
    layer : int
        Of the checkpoint.
    changes : mapping
        Settings of the preset's configuration that are others.
    dtype : str
    chunk : int
        Tokens that prefill takes at a time.
    threads : int
    """

    checkpoint: Path | None
    preset: str
    layer: int
    changes: Mapping[str, Any]
    dtype: str
    chunk: int
    threads: int

    @property
    def title(self) -> str:
        """For the heading."""
        if self.checkpoint is not None:
            return f"layer {self.layer} of {self.checkpoint}"
        said = ", ".join(f"{name} {value}" for name, value in self.changes.items())
        return f"a layer of {self.preset}" + (f" with {said}" if said else "")

    def queries(self, phase: str, position: int) -> int:
        """Tokens of a call; the last of them is at the position, counted from 1."""
        return min(self.chunk, position) if phase == "prefill" else 1


def expect_layer(preset: str) -> None:
    """Raise `ArgumentError` where a preset has no whole layer."""
    if preset not in LAYERS:
        raise ArgumentError(f"cost: preset: expected one of {', '.join(LAYERS)}, got {preset!r}")
