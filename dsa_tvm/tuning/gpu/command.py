"""``dsa-tvm tune`` for GPUs: all on a machine with a GPU, or built on one machine and measured on another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DsaError
from ...gpu.architectures import ANY_GPU, best_for, is_arch, runs_on
from ...presets import Preset
from ...records.selection import gpu
from ...runtime.files import scratch
from ...runtime.machine import usable_cpus
from ...terminal.extras import keep_tvm_from_torch
from ...terminal.progress import Progress
from .. import prebuilt
from ..failures import WorkerError
from ..job import Job, Options
from ..prebuilt import Prebuilt
from ..source import Source
from ..summary import summary
from ..tasks import Task, variants_of
from ..workers import Workers, pool_size
from . import prebuild as cuda_prebuild

if TYPE_CHECKING:
    from .building import CudaBuilder


def is_asked_for(args: argparse.Namespace) -> bool:
    """Whether the arguments ask for a GPU."""
    return bool(args.measure) or args.target == ANY_GPU or is_arch(args.target)


def check(args: argparse.Namespace) -> None:
    """Check the arguments, before any slow import.

    Raises
    ------
    ArgumentError
        Two arguments contradict each other, or one is missing.
    """
    if args.build_only and not is_arch(args.target):
        got = args.target or "none"
        raise ArgumentError(f"tune: build-only: expected --target ARCH such as sm_90a beside it, got {got}")
    if args.build_only and args.measure:
        raise ArgumentError("tune: measure: expected a directory that was built before, got --build-only beside it")
    if args.measure and args.target:
        raise ArgumentError("tune: target: expected none beside --measure, whose directory says it")
    if args.measure and args.types:
        raise ArgumentError("tune: types: expected none beside --measure, whose directory says them")
    if not is_asked_for(args):
        return
    for name in ("threads", "rpc"):
        if getattr(args, name):
            raise ArgumentError(f"tune: {name}: expected none with a GPU, got {getattr(args, name)}")


def run(args: argparse.Namespace, preset: Preset, shapes: Sequence[tuple[int, int]]) -> list[str]:
    """Do what the command line asks for. Returns the lines to print at the end.

    Raises
    ------
    ArgumentError
        The GPU does not run the target.
    DsaError
        A driver, a GPU or nvcc is missing, a directory is damaged, or DEFAULT itself fails.
    """
    ops = list(gpu.BUCKETS) if args.op == "all" else [args.op]
    if args.measure:
        return _measure(args, ops)
    keep_tvm_from_torch()

    def tasks(target: str) -> list[Task]:
        sizes = {op: shapes or gpu.BUCKETS[op] for op in ops}
        return [
            Task(op, target, preset, *size, types)
            for op in ops
            for types in variants_of(op, args.types, gpu.TIMED[op])
            for size in sizes[op]
        ]

    with (
        scratch() as directory,
        Workers(pool_size(usable_cpus()), {"TMPDIR": str(directory)}, role="nvcc") as compilers,
    ):
        if args.build_only:
            return cuda_prebuild.build(args, tasks(args.target), _builder(compilers, directory, args))
        with Workers(1, role="gpu") as workers:
            facts = _facts(workers)
            from ...schedules import CUDA_ARCHS

            target = best_for(facts["capability"], CUDA_ARCHS if args.target == ANY_GPU else [args.target])
            if target is None:
                raise _other_gpu("target", args.target, facts)
            return _tune(args, tasks(target), workers, _builder(compilers, directory, args), facts, args.trials)


def _builder(compilers: Workers, directory: Path, args: argparse.Namespace) -> CudaBuilder:
    from .building import CudaBuilder

    return CudaBuilder(compilers, directory, args.cc, args.nvcc)


def _facts(workers: Workers) -> dict[str, Any]:
    try:
        return workers.ask(("facts", ()), 120)
    except WorkerError as error:
        raise DsaError(f"tune: expected a GPU to measure on, got: {error}") from error


def _other_gpu(name: str, target: str, facts: dict[str, Any]) -> ArgumentError:
    capability = facts["capability"]
    got = f"{facts['name']} of compute capability {capability // 10}.{capability % 10}"
    return ArgumentError(f"tune: {name}: expected a GPU that runs code for {target}, got {got}")


def _tune(
    args: argparse.Namespace, tasks: list[Task], workers: Workers, source: Source, facts: dict[str, Any], trials: int
) -> list[str]:
    options = Options(
        trials=trials,
        timeout=args.timeout,
        threads=(1,),
        output=args.output,
        machine=facts["name"],
        gflops={},
        seed=args.seed,
    )
    with Progress(len(tasks) * trials, estimate=True) as progress:
        progress.say(f"{tasks[0].target} on {facts['name']}")
        finals = Job(options, tasks, workers, source).run(progress)
    return summary(tasks, finals)


def _measure(args: argparse.Namespace, ops: Sequence[str]) -> list[str]:
    contents = prebuilt.load(args.measure)
    contents.families = [family for family in contents.families if family.op in ops]
    source = Prebuilt(args.measure, contents)
    counts = [sum(bool(c.sha256 or c.error) for c in family.candidates) for family in contents.families]
    if not sum(counts):
        raise DsaError(f"tune: measure: expected candidates of {', '.join(ops)} in {args.measure}, got none")
    if missing := sum(len(family.candidates) for family in contents.families) - sum(counts):
        print(f"dsa-tvm tune: {missing} candidates in {args.measure} are not built yet", file=sys.stderr, flush=True)
    with Workers(1, role="gpu") as workers:
        facts = _facts(workers)
        if not runs_on(contents.target, facts["capability"]):
            raise _other_gpu("measure", contents.target, facts)
        return _tune(args, contents.tasks(), workers, source, facts, max(counts))
