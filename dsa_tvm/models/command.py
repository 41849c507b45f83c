"""``dsa-tvm export`` and ``dsa-tvm generate``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

_DTYPES = ("float32", "float16")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run_export`."""
    parser.add_argument("checkpoint", type=Path, help="directory with config.json and .safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--layers", type=_layers, metavar="A:B", help="layers A to B - 1 only, for a model that does not fit"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="element type (default: float32)")
    parser.add_argument(
        "--no-bodies", action="store_true", help="leave out the bodies that run without the library, more slowly"
    )


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run_generate`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="what dsa-tvm export has made")
    parser.add_argument(
        "--prompt", type=Path, required=True, metavar="FILE", help="text; without a tokenizer, numbers of tokens"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: that in DIR)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="stop after N (default: 64)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads (default: all)")
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="N", help="tokens of the prompt at a time (default: 512)"
    )
    parser.add_argument("--no-library", action="store_true", help="run the bodies of standard operators instead")


def _layers(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected A:B, such as 0:4, got {text}")
    return int(first), int(last)


def run_export(args: argparse.Namespace) -> None:
    """Export a checkpoint."""
    from .checkpoint import DTYPES
    from .onnx import export_checkpoint

    # On SIGTERM, clean up as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        export_checkpoint(
            args.checkpoint, args.out, layers=args.layers, dtype=DTYPES[args.dtype], bodies=not args.no_bodies
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


def run_generate(args: argparse.Namespace) -> None:
    """Print tokens as they come. Progress and times go to standard error."""
    tokenizer = _tokenizer(args)
    prompt = _prompt(args.prompt, tokenizer)
    from .onnx import Generator

    generator = Generator(args.directory, library=not args.no_library, threads=args.threads)
    steps = generator.stream([prompt], args.max_new_tokens, chunk=args.chunk, progress=_progress())
    say = _Text(tokenizer) if tokenizer is not None else _Numbers()
    for (token,) in steps:
        if token is not None:
            print(say(token), end="", flush=True)
    print(flush=True)
    print(generator.timing, file=sys.stderr)


def _tokenizer(args: argparse.Namespace) -> Any:
    path = args.tokenizer or args.directory / "tokenizer.json"
    if args.tokenizer is None and not path.is_file():
        return None
    from tokenizers import Tokenizer

    path.open("rb").close()  # for an OSError that names the file; the library's errors do not
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own for errors
        raise ArgumentError(f"{path}: expected a tokenizer.json, got: {error}") from error


def _prompt(path: Path, tokenizer: Any) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: expected text in UTF-8, got: {error}") from None
    if tokenizer is not None:
        return tokenizer.encode(text).ids
    words = text.split()
    wrong = next((word for word in words if not word.isdecimal()), None)
    if wrong is not None:
        raise ArgumentError(f"{path}: expected numbers of tokens, as there is no tokenizer, got {wrong[:40]!r}")
    return [int(word) for word in words]


def _progress() -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(done: int, of: int) -> None:
        print(f"\rprefill {done} of {of} tokens", end="\n" if done == of else "", file=sys.stderr, flush=True)

    return show


class _Numbers:
    """Tokens as numbers."""

    def __init__(self) -> None:
        self.between = ""

    def __call__(self, token: int) -> str:
        said = f"{self.between}{token}"
        self.between = " "
        return said


class _Text:
    """Tokens as text. An incomplete character waits for its remaining tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.said = 0

    def __call__(self, token: int) -> str:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self.said = text[self.said :], len(text)
        return new
