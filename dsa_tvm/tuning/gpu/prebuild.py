"""``dsa-tvm tune --build-only``: compiles candidates for a GPU into a directory, for another machine to measure."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DsaError
from ...records import Log, spec_hash
from ...runtime.files import owned
from ...terminal.progress import Progress
from .. import prebuilt
from ..failures import Losses, WorkerError, failure, no_default
from ..prebuilt import Built, Contents, Family
from ..tasks import Task
from ..trials import Trials
from ..workers import BATCH

if TYPE_CHECKING:
    from .building import CudaBuilder


def build(args: argparse.Namespace, tasks: list[Task], builder: CudaBuilder) -> list[str]:
    """Fill the directory with candidates for the kernels of the tasks. Returns the lines to print at the end.

    Raises
    ------
    DsaError
        The directory belongs to another job, another process is using it, or DEFAULT does not compile.
    """
    directory: Path = args.build_only
    with ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(owned(directory))
        except BlockingIOError as error:
            got = f"{directory}, which another process is filling"
            raise DsaError(f"tune: build-only: expected a directory of its own, got {got}") from error
        except OSError as error:
            raise DsaError(f"tune: build-only: expected a directory to write to, got {error}") from error
        return _fill(directory, args, tasks, builder)


def _fill(directory: Path, args: argparse.Namespace, tasks: list[Task], builder: CudaBuilder) -> list[str]:
    families: dict[tuple, list[Task]] = {}
    for task in tasks:
        families.setdefault(task.family, []).append(task)
    groups = list(families.values())
    contents = _contents(directory, args.target, groups, builder)
    contents.save(directory)
    end = time.monotonic() + args.timeout
    with Progress(len(groups) * args.trials, estimate=True) as progress:
        for family, members in zip(contents.families, groups, strict=True):
            _propose(family, members, builder, args)
            contents.save(directory)
            _compile(directory, contents, family, members[0], builder, progress, end)
    built = sum(bool(c.sha256) for family in contents.families for c in family.candidates)
    failed = sum(bool(c.error) for family in contents.families for c in family.candidates)
    return [f"{directory}: {built} candidates for {args.target}{f', {failed} failed' if failed else ''}"]


def _contents(directory: Path, target: str, groups: list[list[Task]], builder: CudaBuilder) -> Contents:
    """The contents of a new directory, or of one whose build goes on."""
    families = []
    for members in groups:
        first, default = members[0], builder.default(members[0])
        name = ".".join((first.op, *first.types))
        shapes = [[task.s_q, task.s_kv] for task in members]
        baseline = Built(default, f"{name}.default.so")
        families.append(
            Family(first.op, first.stage, list(first.types), spec_hash(first.op), shapes, default, baseline)
        )
    new = Contents(target, groups[0][0].preset, dict(builder.versions), families)
    if not prebuilt.exists(directory):
        return new
    old = prebuilt.load(directory)

    def description(contents: Contents) -> list[Any]:
        kernels = [[f.op, f.stage, f.types, f.spec, f.shapes, f.default] for f in contents.families]
        return [contents.target, contents.preset, contents.versions, kernels]

    if description(old) != description(new):
        raise DsaError(f"tune: build-only: expected an empty directory or one of the same job, got {directory}")
    return old


def _propose(family: Family, members: list[Task], builder: CudaBuilder, args: argparse.Namespace) -> None:
    """Fill the list of candidates: DEFAULT first, then proposals of a search that knows what was measured so far."""
    first = members[0]
    search = builder.search(first, args.seed, BATCH)
    records, damaged = Log(args.output / first.target / f"{first.op}.jsonl").read()
    for damage in damaged:
        print(f"skipped {damage}", file=sys.stderr)
    same = [r for r in records if r.kind == "trial" and r.types == first.types and search.covers(r.decisions)]
    known = Trials(members, same)
    search.tell(known.told())
    listed = [c.decisions for c in family.candidates]
    for decisions in listed:
        search.skip(decisions)
    batch = [d for d in [family.default] if d not in listed and not known.is_done(d)]
    while len(listed) < args.trials and (batch := batch or search.ask()):
        for decisions in batch[: args.trials - len(listed)]:
            search.skip(decisions)
            listed.append(decisions)
            name = ".".join((family.op, *family.types, family.stage, f"{len(listed):04}"))
            family.candidates.append(Built(decisions, f"{name}.so"))
        batch = []


def _compile(
    directory: Path,
    contents: Contents,
    family: Family,
    task: Task,
    builder: CudaBuilder,
    progress: Progress,
    end: float,
) -> None:
    """Compile the candidates that are missing. None is begun after the time `end`."""
    losses = Losses(progress.say)
    missing = []
    for built in (family.baseline, *family.candidates):
        if built.error or contents.is_built(directory, built):
            progress.advance(built is not family.baseline)
        else:
            missing.append(built)
    while missing and time.monotonic() < end:
        batch, missing = missing[:BATCH], missing[BATCH:]
        paths = [directory / built.file for built in batch]
        for i, outcome in builder.compiled(task, [built.decisions for built in batch], paths):
            built = batch[i]
            if not isinstance(outcome, WorkerError):
                built.sha256 = prebuilt.sha256(paths[i])
                losses.end()
            elif built is family.baseline:
                raise no_default(task.title, outcome)
            elif outcome.is_surroundings:
                # The next build in this directory tries it again.
                losses.add(task.title, outcome)
                continue
            else:
                built.error = failure(outcome)
                losses.end()
            contents.save(directory)
            if built is not family.baseline:
                done = sum(bool(c.sha256 or c.error) for c in family.candidates)
                progress.step(f"{task.op} {task.stage}  candidate {done}/{len(family.candidates)}")
