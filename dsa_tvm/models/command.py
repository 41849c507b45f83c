"""``dsa-tvm export``, ``dsa-tvm generate`` and ``dsa-tvm recall``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..runtime import machine
from ..runtime.files import expect_output, write_output
from ..spec import DIMS
from ..terminal.extras import expect_installed
from ..terminal.progress import Progress
from ..terminal.signals import exits_on_sigterm

_DTYPES = ("float32", "float16")
_TOPKS = (256, 512, 1024, 2048, 4096)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run_export`."""
    parser.add_argument("checkpoint", type=Path, help="directory with config.json and .safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--layers", type=_layers, metavar="A:B", help="layers A to B - 1 only, for a model that does not fit"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="element type (default: float32)")
    parser.add_argument(
        "--cache-dtype", choices=(*_DTYPES, "bfloat16"), help="element type of caches and attention (default: --dtype)"
    )
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


def add_recall_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run_recall` reads."""
    parser.add_argument("checkpoint", type=Path, help="directory with config.json and .safetensors")
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="text; without a tokenizer, numbers of tokens"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: the checkpoint's)")
    parser.add_argument("--bytes", action="store_true", help="take the bytes of the text as tokens")
    parser.add_argument(
        "--topk", type=int, nargs="+", default=[*_TOPKS], metavar="N", help="keys to select (default: 256 to 4096)"
    )
    parser.add_argument("--layers", type=_layers, metavar="A:B", help="layers A to B - 1 only (default: all)")
    parser.add_argument("--tokens", type=int, metavar="N", help="the first N tokens only (default: all)")
    parser.add_argument(
        "--queries", type=int, default=256, metavar="N", help="tokens that are looked at, evenly spread (default: 256)"
    )
    parser.add_argument(
        "--dtype", choices=(*_DTYPES, "bfloat16"), default="float32", help="element type (default: float32)"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE as well")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw them into FILE, a PNG, with matplotlib")


def _layers(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected A:B, such as 0:4, got {text}")
    return int(first), int(last)


def run_export(args: argparse.Namespace) -> None:
    """Export a checkpoint."""
    from .checkpoint import DTYPES
    from .onnx import export_checkpoint

    with exits_on_sigterm():
        export_checkpoint(
            args.checkpoint,
            args.out,
            layers=args.layers,
            dtype=DTYPES[args.dtype],
            cache_dtype=DTYPES[args.cache_dtype or args.dtype],
            bodies=not args.no_bodies,
        )
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


def run_generate(args: argparse.Namespace) -> None:
    """Print tokens as they come. Progress and times go to standard error."""
    tokenizer = _tokenizer(args.tokenizer, args.directory)
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


def run_recall(args: argparse.Namespace) -> None:
    """Print tables of what the selected tokens hold, and write what is asked for."""
    threads = args.threads or machine.usable_cpus()
    _check_recall(args, threads)
    expect_installed("recall", "models", "torch", "transformers", "safetensors", "tokenizers")
    if args.out:
        expect_installed("recall: out", "plot", "matplotlib")
    tokens = _text(args)[: args.tokens]
    import torch

    from ..runtime.library import set_num_threads
    from .recall import picture, report
    from .recall.measure import recall

    torch.set_num_threads(threads)
    set_num_threads(threads)
    with Progress(args.layers[1] if args.layers else _number_of_layers(args.checkpoint)) as progress:
        found = recall(
            args.checkpoint,
            tokens,
            sorted(set(args.topk)),
            queries=args.queries,
            layers=args.layers,
            dtype=args.dtype,
            say=progress.step,
        )
    title = f"{args.checkpoint}, {args.text}: {len(tokens)} tokens, {len(found.positions)} queries, {args.dtype}"
    print(title)
    for line in report.lines(found):
        print(line)
    if args.json:
        document = {"checkpoint": str(args.checkpoint), "text": str(args.text), "tokens": len(tokens)}
        text = json.dumps({**document, "dtype": args.dtype, **found.document()})
        write_output("recall: json", args.json, text.encode() + b"\n")
    if args.out:
        write_output("recall: out", args.out, picture.as_png(found, title))


def _check_recall(args: argparse.Namespace, threads: int) -> None:
    machine.check_threads("recall", [threads])
    most = DIMS["topk"].maximum
    for topk in args.topk:
        if not 1 <= topk <= most:
            raise ArgumentError(f"recall: topk: expected 1..{most}, got {topk}")
    for name in ("tokens", "queries"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ArgumentError(f"recall: {name}: expected at least 1, got {value}")
    if args.bytes and args.tokenizer:
        raise ArgumentError("recall: expected --bytes or --tokenizer, got both")
    for name in ("json", "out"):
        expect_output(f"recall: {name}", getattr(args, name))


def _number_of_layers(checkpoint: Path) -> int:
    from .checkpoint import config_of, read_config

    return config_of(read_config(checkpoint)).num_hidden_layers


def _text(args: argparse.Namespace) -> list[int]:
    """The tokens of the text of `run_recall`."""
    if args.bytes:
        return list(args.text.read_bytes())
    tokens = _prompt(args.text, _tokenizer(args.tokenizer, args.checkpoint))
    if not tokens:
        raise ArgumentError(f"{args.text}: expected at least one token, got none")
    return tokens


def _tokenizer(chosen: Path | None, directory: Path) -> Any:
    path = chosen or directory / "tokenizer.json"
    if chosen is None and not path.is_file():
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
