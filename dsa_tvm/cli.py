"""The command ``dsa-tvm``. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from . import __version__, presets
from .errors import DsaError
from .terminal import streams


def _env(args: argparse.Namespace) -> None:
    from . import env

    report = env.report()
    print(json.dumps(report, indent=2) if args.json else "\n".join(env.lines(report)))


def _config(args: argparse.Namespace) -> None:
    import os
    import shlex

    from .errors import LibraryError
    from .runtime import library, package_files

    path = os.path.abspath(library.default_path())
    include = os.path.abspath(package_files.find("include"))
    lib = os.path.dirname(path)
    # -Wl, splits its argument at commas.
    rpath = ["-Wl,-rpath", "-Xlinker", lib] if "," in lib else [f"-Wl,-rpath,{lib}"]
    paths = {
        "cmakedir": os.path.abspath(package_files.find("lib/cmake/dsa_tvm")),
        "pkgconfigdir": os.path.abspath(package_files.find("lib/pkgconfig")),
        "includedir": include,
        "libdir": lib,
        "library": path,
    }
    flags = {"cflags": [f"-I{include}"], "libs": [f"-L{lib}", *rpath, "-ldsa_tvm", "-lm"]}
    asked = [name for name in (*paths, *flags) if getattr(args, name)]
    for name in asked or (*paths, *flags):
        if name in paths and not os.path.exists(paths[name]):
            raise LibraryError(f"config: expected {paths[name]} to be there; reinstall dsa_tvm")
        if name == "pkgconfigdir" and asked and (odd := set(paths[name]) & set("'\"\\#")):
            expected = "config: pkgconfigdir: expected a path that pkg-config can take flags from, got one with"
            raise LibraryError(f"{expected} {' '.join(sorted(odd))}: {paths[name]}; use --cflags and --libs instead")
        # As in pkg-config, flags are quoted for a shell, and paths are not.
        answer = paths[name] if name in paths else shlex.join(flags[name])
        print(answer if asked else f"{name}: {answer}")


def _build(args: argparse.Namespace) -> None:
    from .build import command as build

    print(build.run(args, __version__))


def _bench(args: argparse.Namespace) -> None:
    from .benchmark import command

    command.run(args)


def _tune(args: argparse.Namespace) -> None:
    from .tuning import command

    command.run(args)


def _records(args: argparse.Namespace) -> None:
    from .records import command

    command.run(args)


def _demo(args: argparse.Namespace) -> None:
    from .benchmark import demo

    demo.run(args)


def _export(args: argparse.Namespace) -> None:
    from .models import command

    command.run_export(args)


def _generate(args: argparse.Namespace) -> None:
    from .models import command

    command.run_generate(args)


def _cost(args: argparse.Namespace) -> None:
    from .benchmark.cost import command

    command.run(args)


def _recall(args: argparse.Namespace) -> None:
    from .models import command

    command.run_recall(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsa-tvm", description="DeepSeek Sparse Attention kernels")
    parser.add_argument("--version", action="version", version=f"dsa-tvm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "a small model and sparse attention over a text, in ONNX Runtime, checked and timed")
    demo.add_argument("file", nargs="?", type=Path, help="text to read (default: one that comes with Python)")
    demo.add_argument(
        "--tokens", type=int, help="use at most this many bytes (default: 32768, or fewer where memory is short)"
    )
    demo.add_argument("--threads", type=int, default=0, help="threads (default: all)")

    bench = command("bench", _bench, "time the operators against torch, plain ONNX Runtime and others")
    bench.add_argument("op", nargs="*", help="operators (default: all)")
    bench.add_argument("--suite", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    bench.add_argument("--s-q", type=int, nargs="+", default=[], help="query tokens")
    bench.add_argument("--s-kv", type=int, nargs="+", default=[], help="key tokens")
    bench.add_argument("--threads", type=int, nargs="+", default=[], help="threads (default: 1 and all)")
    bench.add_argument(
        "--preset",
        default=presets.DEFAULT,
        help=f"sizes of a model: {', '.join(presets.PRESETS)} (default: {presets.DEFAULT})",
    )
    bench.add_argument(
        "--dtype", help="element type: float32, bfloat16, float16, float8_e4m3fn, int8 (default: float32)"
    )
    bench.add_argument(
        "--seconds", type=float, help="time for each figure (default: 1; 0.4 with --growth; 0.2 on a GPU)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    bench.add_argument(
        "--growth", action="store_true", help="vary s_kv, s_q, topk and threads one at a time instead, beside no others"
    )
    bench.add_argument("--topk", type=int, nargs="+", default=[], help="with --growth: selected keys")
    bench.add_argument("--out", type=Path, metavar="PNG", help="with --growth: draw it into PNG, with matplotlib")

    build = command("build", _build, "compile a library for other targets or sizes")
    from .build.command import add_arguments

    add_arguments(build)

    tune = command("tune", _tune, "search for faster kernels on this machine or on others")
    from .tuning.command import add_arguments as add_tune_arguments

    add_tune_arguments(tune)

    records = command("records", _records, "check, compare, merge and show tuning records")
    from .records.command import add_arguments as add_records_arguments

    add_records_arguments(records)

    from .models.command import add_export_arguments, add_generate_arguments, add_recall_arguments

    export = command("export", _export, "make an ONNX model of a DSA checkpoint")
    add_export_arguments(export)

    generate = command("generate", _generate, "generate tokens with an exported model in ONNX Runtime")
    add_generate_arguments(generate)

    cost = command("cost", _cost, "time and price of a token in one attention layer, by position, ours and others")
    from .benchmark.cost.arguments import add_arguments as add_cost_arguments

    add_cost_arguments(cost)

    recall = command("recall", _recall, "how much of dense attention the selected tokens hold, on a text of yours")
    add_recall_arguments(recall)

    env = command("env", _env, "describe the environment, for a bug report")
    env.add_argument("--json", action="store_true")

    config = command("config", _config, "where C and CMake projects find the library")
    for flag in ("cmakedir", "pkgconfigdir", "includedir", "libdir", "library"):
        config.add_argument(f"--{flag}", action="store_true", help="print this path")
    for flag in ("cflags", "libs"):
        config.add_argument(f"--{flag}", action="store_true", help="print these flags, quoted for a shell")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns
    -------
    int
        The exit status: 0; 1 after an error, which standard error names; 130 after Ctrl-C, and 141 if nobody reads
        standard output any more, which is how a shell reports these signals.
    """
    streams.prepare()
    try:
        try:
            args = _parser().parse_args(argv)
            args.run(args)
        finally:
            # After --help and --version, too.
            streams.finish()
    except BrokenPipeError:
        streams.discard()
        return 141
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except (DsaError, OSError) as error:
        return _failed(str(error))
    except ImportError as error:
        if (error.name or "").startswith("dsa_tvm"):
            raise
        return _failed(f"{error.name}: expected an installed package that can be imported, got: {error}")
    except MemoryError as error:
        return _failed(f"out of memory{f': {error}' if str(error) else ''}")
    return 0


def _failed(message: str, status: int = 1) -> int:
    with contextlib.suppress(OSError):
        print(f"dsa-tvm: {message}", file=sys.stderr, flush=True)
    streams.discard()
    return status


if __name__ == "__main__":
    sys.exit(main())
