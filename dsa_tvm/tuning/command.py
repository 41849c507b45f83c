"""``dsa-tvm tune``: arguments to a job, the job's results to a table."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import env, presets
from ..build import link
from ..errors import ArgumentError, DsaError
from ..ops import OPS
from ..records.selection import cpu, gpu
from ..runtime import library
from ..runtime.files import expect_writable_directory, scratch
from ..runtime.machine import check_threads, usable_cpus
from ..terminal.extras import expect_installed, keep_tvm_from_torch
from ..terminal.progress import Progress
from . import fleet
from .failures import WorkerError
from .fleet import Remote
from .gpu import command as cuda_command
from .summary import summary
from .tasks import Task, Types, parse_shape, variants_of
from .workers import Workers, pool_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dsa-tvm tune``."""
    parser.add_argument(
        "op", nargs="?", help=f"kernel to tune: {', '.join(cpu.BUCKETS)}, on GPUs sparse_mla_fp8, or all"
    )
    parser.add_argument(
        "--target",
        default="",
        help="CPU target (default: the best this machine runs), cuda for this machine's GPU, or a GPU architecture "
        "such as sm_90a",
    )
    parser.add_argument("--preset", default=presets.DEFAULT, help=f"sizes of a model (default: {presets.DEFAULT})")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="S_QxS_KV", help="sizes (default: every bucket)")
    parser.add_argument(
        "--types",
        nargs="+",
        default=[],
        metavar="TYPE",
        help="element types of the queries (default: float32 on CPUs; on GPUs bfloat16 and float8_e4m3fn)",
    )
    parser.add_argument("--trials", type=int, default=64, help="candidates for each kernel and size (default: 64)")
    parser.add_argument("--timeout", type=float, default=math.inf, metavar="S", help="start no trial after S seconds")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[], help="thread counts to time with (default: 1 and all CPUs)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("tuning_logs"), help="directory of the logs (default: tuning_logs)"
    )
    parser.add_argument("--rpc", default="", metavar="HOST:PORT", help="measure on the machines of this TVM tracker")
    parser.add_argument("--key", default="", help="key of the RPC servers")
    link.add_arguments(parser)
    parser.add_argument(
        "--build-only", type=Path, metavar="DIR", help="build candidates for a GPU architecture into DIR, and stop"
    )
    parser.add_argument(
        "--measure", type=Path, metavar="DIR", help="measure what --build-only left in DIR, on this machine's GPU"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the search (default: 0)")


def run(args: argparse.Namespace) -> None:
    """Tune what the command line asks for and print what held.

    Raises
    ------
    ArgumentError
        An unknown operator, target or preset, or a number out of range.
    DsaError
        No worker, no fleet, no place for the log, or DEFAULT itself fails.
    """
    # Before `import tvm`, which takes seconds: a typing error is answered at once.
    remote, preset, shapes = _checked(args)
    if not args.measure:
        needed = ("tvm", "xgboost", "psutil", "cloudpickle", *(("tornado",) if remote else ()))
        expect_installed("tune", "tune", *needed)
    if not args.build_only:
        _try_output(args.output)
    if cuda_command.is_asked_for(args):
        print("\n".join(cuda_command.run(args, preset, shapes)))
        return
    keep_tvm_from_torch()
    cpus = usable_cpus()
    servers = fleet.count(remote) if remote else 1
    # What a worker leaves behind when it is killed goes with the job's own files.
    with scratch() as directory, Workers(pool_size(max(cpus, servers)), {"TMPDIR": str(directory)}) as workers:
        # The workers import TVM while this process does.
        from .building import Builder
        from .job import Job, Options

        tasks = _tasks(args, preset, shapes)
        builder = Builder(workers, directory, args.cc)
        target, types = tasks[0].target, tuple(dict.fromkeys(task.types for task in tasks))
        print(f"dsa-tvm tune: measuring the peak of this machine for {target}", file=sys.stderr, flush=True)
        request = ("machine", (str(builder.baseline(tasks[0])), tuple(args.threads), types, remote))
        try:
            gflops = workers.ask(request, 120)
        except WorkerError as error:
            if error.is_surroundings:
                raise DsaError(f"tune: this machine was not measured: {error}") from error
            expected = "expected one that the measuring machine runs"
            raise DsaError(f"tune: target: {expected}, got {target}: {error}") from error
        options = Options(
            trials=args.trials,
            timeout=args.timeout,
            threads=tuple(gflops[types[0]]),
            output=args.output,
            machine=f"rpc {remote.key}" if remote else f"{env.cpu_model()}, {cpus} CPUs",
            gflops=gflops,
            remote=remote,
            seed=args.seed,
        )
        with Progress(len(tasks) * args.trials, estimate=True) as progress:
            for of in types:
                limits = ", ".join(f"{rate:.0f} GFLOP/s with {n}" for n, rate in gflops[of].items())
                serving = f" for {'/'.join(dict.fromkeys(of))}" if of else ""
                progress.say(
                    f"{target} on {options.machine}; the limit of its multiply-adds{serving}: {limits} threads"
                )
            finals = Job(options, tasks, workers, builder).run(progress)
    print("\n".join(summary(tasks, finals)))


def _tasks(args: argparse.Namespace, preset: presets.Preset, shapes: Sequence[tuple[int, int]]) -> list[Task]:
    """What a job for CPUs is to tune.

    Raises
    ------
    ArgumentError
        An unknown target, or one that has no kernels of its own for what was asked for.
    """
    from ..schedules import BASES, CPU_TARGETS, chain, cpu_variants

    if args.target and args.target not in CPU_TARGETS:
        raise ArgumentError(f"tune: target: expected one of {', '.join(CPU_TARGETS)}, got {args.target!r}")
    ops = list(cpu.BUCKETS) if args.op == "all" else [args.op]

    def own(op: str, target: str) -> list[Types]:
        """The element types that a target has kernels of its own for, and that the operator is called with."""
        known = [tuple(variant.values()) for variant in OPS[op].variants]
        return [types for variant in cpu_variants(op, target) if (types := tuple(variant.values())) in known]

    # The best target of the machine may have kernels for some element types only.
    possible = [args.target] if args.target else chain(library.active_target())
    serving = (t for t in possible if {types[0] for op in ops for types in own(op, t) if types}.issuperset(args.types))
    target = possible[-1] if args.target or not args.types else next(serving, possible[-1])
    tasks = []
    for op in ops:
        kernels = own(op, target)
        if not kernels:
            if args.op == "all":
                continue
            raise ArgumentError(
                f"tune: target: expected one with kernels of {op}, such as {chain(target)[-1]}, got {target}"
            )
        default: Sequence[Types | None] = [None] if target not in BASES else kernels[:1]
        wanted = variants_of(op, args.types, default)
        if foreign := [types for types in wanted if types is not None and types not in kernels]:
            expected = f"expected some of {', '.join(dict.fromkeys(types[0] for types in kernels))}"
            raise ArgumentError(f"tune: types: {expected} with {target}, got {foreign[0][0]}")
        tasks += [Task(op, target, preset, *shape, types) for types in wanted for shape in shapes or cpu.buckets(op)]
    return tasks


def _checked(args: argparse.Namespace) -> tuple[Remote | None, presets.Preset, list[tuple[int, int]]]:
    if args.measure:
        args.op = args.op or "all"
    known = gpu.BUCKETS if cuda_command.is_asked_for(args) else cpu.BUCKETS
    if args.op != "all" and args.op not in known:
        raise ArgumentError(f"tune: operator: expected all or one of {', '.join(known)}, got {args.op!r}")
    if args.trials < 1:
        raise ArgumentError(f"tune: trials: expected at least 1, got {args.trials}")
    if not args.timeout > 0:
        raise ArgumentError(f"tune: timeout: expected a positive number of seconds, got {args.timeout}")
    queries = {variant["T"] for op in known for variant in OPS[op].variants if variant and args.op in ("all", op)}
    for dtype in args.types:
        if dtype not in queries:
            expected = f"one of {', '.join(sorted(queries))}" if queries else f"none with {args.op}"
            raise ArgumentError(f"tune: types: expected {expected}, got {dtype!r}")
    check_threads("tune", args.threads)
    cuda_command.check(args)
    remote = fleet.parse(args.rpc, args.key) if args.rpc else None
    if args.key and not remote:
        raise ArgumentError("tune: key: expected --rpc HOST:PORT beside it, got none")
    return remote, presets.get(args.preset), [parse_shape(text) for text in args.shapes]


def _try_output(directory: Path) -> None:
    """Now, not after the first minutes of measuring."""
    try:
        expect_writable_directory(directory)
    except OSError as error:
        raise DsaError(f"tune: output: expected a directory to write to, got {directory}: {error}") from error
