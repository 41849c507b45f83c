"""The arguments of ``dsa-tvm cost``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ... import presets
from .problem import DTYPES, LAYERS, METHODS, PHASES

#: In the paper's figure, as far as its context goes.
_POSITIONS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
#: Settings of a preset that can be changed, by option.
CHANGES = {"heads": "num_attention_heads", "index_heads": "index_n_heads", "topk": "index_topk"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `command.run` reads."""
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="directory with config.json and .safetensors (default: seeded weights)"
    )
    parser.add_argument(
        "--preset",
        default=presets.DEFAULT,
        help=f"sizes where there is no checkpoint: {', '.join(LAYERS)} (default: {presets.DEFAULT})",
    )
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="which layer of the checkpoint (default: 0)")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads instead of the preset's")
    parser.add_argument("--index-heads", type=int, metavar="N", help="indexer heads instead of the preset's")
    parser.add_argument("--topk", type=int, metavar="N", help="keys that a query attends to instead of the preset's")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="element type (default: float32)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads (default: all)")
    parser.add_argument("--price", type=float, default=2.0, help="dollars that this machine costs an hour (default: 2)")
    parser.add_argument(
        "--positions",
        type=int,
        nargs="+",
        default=[*_POSITIONS],
        metavar="N",
        help="of tokens (default: 2K to 128K)",
    )
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="N", help="tokens that prefill takes at a time (default: 512)"
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=[*PHASES], help="(default: both)")
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="what runs the layer (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure (default: 1)")
    parser.add_argument(
        "--limit", type=float, default=60.0, metavar="SECONDS", help="leave out what would take longer (default: 60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw them into FILE, a PNG, with matplotlib")
