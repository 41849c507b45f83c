"""The tuning job: propose, build, check and time, record every trial, and measure the best again beside DEFAULT."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DsaError, RecordError
from ..records import DATE_FORMAT, Log, Record, as_key, spec_hash
from ..terminal.progress import Progress
from . import fleet
from .failures import Losses, WorkerError, failure
from .fleet import Remote
from .source import Decisions, Proposer, Source
from .tasks import Effort, Task, Types
from .trials import Trials
from .workers import BATCH, Request, Workers

#: The number of candidates that are measured again at the end.
FINALISTS = 4
#: How thoroughly to measure, by kind of record.
EFFORT: Mapping[str, Mapping[str, Any]] = {
    "trial": {"seconds": 0.3, "rounds": (2, 9)},
    "final": {"seconds": 2.0, "rounds": (5, 41)},
}
#: If DEFAULT is this much slower than before, something else keeps the machine busy.
_DISTURBED = 1.3
#: The kind of error if no machine of a fleet could be reached. `measure`, which has the class, imports TVM.
_UNREACHABLE = "UnreachableError"
_TIMES = ("seconds", "default_seconds")


@dataclass(frozen=True)
class Options:
    """The options of a job.

    Parameters
    ----------
    trials : int
        For each task, including those of earlier jobs in the log.
    timeout : float
        Seconds after which no new trial begins; infinity for none.
    threads : tuple of int
        Thread counts with which every candidate is timed.
    output : Path
        Directory of the logs.
    machine : str
        Name of this kind of machine. Trials of other machines do not count.
    gflops : mapping
        The machine's multiply-add limit by the element types of a task, then by number of threads.
    remote : Remote, optional
        Measure on a fleet.
    seed : int
    limit : float
        Seconds that one candidate may take to be measured.
    """

    trials: int
    timeout: float
    threads: tuple[int, ...]
    output: Path
    machine: str
    gflops: Mapping[Types, Mapping[int, float]]
    remote: Remote | None = None
    seed: int = 0
    limit: float = 180.0


class Job:
    """One run of ``dsa-tvm tune``.

    Parameters
    ----------
    options : Options
    tasks : sequence of Task
    workers : Workers
        Processes that measure.
    source : Source
        Gives the candidates.
    """

    def __init__(self, options: Options, tasks: Sequence[Task], workers: Workers, source: Source) -> None:
        self._options, self._tasks, self._workers, self._source = options, tasks, workers, source
        self._end = time.monotonic() + options.timeout
        self._usual: dict[tuple[Task, int], float] = {}
        self._lost: set[tuple] = set()

    def run(self, progress: Progress) -> list[Record]:
        """Tune every task. Returns the finals in the order of the tasks.

        Raises
        ------
        DsaError
            DEFAULT itself fails, a log cannot be written, or no machine is left.
        """
        families: dict[tuple, list[Task]] = {}
        for task in self._tasks:
            families.setdefault(task.family, []).append(task)
        # Check all logs now, not after hours of tuning.
        for log in {self._log(task).path: self._log(task) for task in self._tasks}.values():
            log.expect_writable()
        return [final for tasks in families.values() for final in self._tune(tasks, progress)]

    def _tune(self, tasks: Sequence[Task], progress: Progress) -> list[Record]:
        """Tune a family. A candidate is measured at all its sizes."""
        first, options = tasks[0], self._options
        losses = Losses(progress.say)
        log = self._log(first)
        records, damaged = log.read()
        for damage in damaged:
            progress.say(f"skipped {damage}")
        same = [r for r in records if r.machine == options.machine and r.types == first.types]
        search = self._source.search(first, options.seed, BATCH)
        covered = [r for r in same if search.covers(r.decisions)]
        trials, finals = (Trials(tasks, (r for r in covered if r.kind == kind)) for kind in ("trial", "final"))
        progress.advance(min(trials.count, options.trials * len(tasks)))
        search.tell(trials.told())
        for proposals in self._proposals(first, search, covered, trials):
            for record in self._measured(tasks, proposals, "trial", trials, losses):
                log.append(record)
                trials.add(record)
                task = next(t for t in tasks if t.shape == record.shape)
                progress.step(trials.line(task, options.trials))
                if record.error is not None:
                    progress.advance(trials.left_out(record))
            search.tell(trials.told(proposals))
            for decisions in proposals:
                if as_key(decisions) in self._lost:
                    search.skip(decisions)
        finalists = [d for d in trials.best(FINALISTS) if d != self._source.default(first)]
        # A job that was killed during its finals only measures the missing ones.
        missing = [d for d in finalists if not finals.is_done(d)]
        for record in self._measured(tasks, missing, "final", finals, losses):
            log.append(record)
            finals.add(record)
        return [record for decisions in finalists for record in finals.of(decisions)]

    def _log(self, task: Task) -> Log:
        return Log(self._options.output / task.target / f"{task.op}.jsonl")

    def _proposals(
        self, task: Task, search: Proposer, covered: Sequence[Record], trials: Trials
    ) -> Iterator[list[dict[str, int]]]:
        """Batches of new decisions: first begun candidates, DEFAULT and winners at other sizes, then the search's."""
        others = sorted((r for r in covered if r.kind == "final"), key=lambda r: r.speedup, reverse=True)
        known = [*trials.begun(), self._source.default(task), *(dict(r.decisions) for r in others)]
        seeds = [d for i, d in enumerate(known) if search.covers(d) and not trials.is_done(d) and d not in known[:i]]
        while (left := self._options.trials - trials.done) > 0 and time.monotonic() < self._end:
            batch, seeds = (seeds[:BATCH], seeds[BATCH:]) if seeds else (search.ask(), [])
            if not batch:
                return
            yield batch[:left]

    def _measured(
        self, tasks: Sequence[Task], proposals: Sequence[dict[str, int]], kind: str, known: Trials, losses: Losses
    ) -> Iterator[Record]:
        """Build all, then measure all, because on one machine the two would disturb each other.

        A candidate that could not be tried gets no record.
        """
        libraries: dict[int, Path] = {}
        for i, outcome in self._source.libraries(tasks[0], proposals) if proposals else ():
            if not isinstance(outcome, WorkerError):
                libraries[i] = outcome
                continue
            task = next(t for t in tasks if not known.has(t, proposals[i]))
            if not self._is_lost(task, proposals[i], outcome, losses):
                yield self._record(task, kind, proposals[i], outcome)
        for task in tasks:
            missing = {i: library for i, library in libraries.items() if not known.has(task, proposals[i])}
            for i, outcome in self._settled(task, missing, kind):
                if self._is_lost(task, proposals[i], outcome, losses):
                    self._source.discard(libraries.pop(i))
                    continue
                record = self._record(task, kind, proposals[i], outcome)
                if record.error is not None:
                    # It failed, so it need not be measured at other sizes.
                    self._source.discard(libraries.pop(i))
                yield record
        for library in libraries.values():
            self._source.discard(library)

    def _is_lost(self, task: Task, decisions: Decisions, outcome: Any, losses: Losses) -> bool:
        """Whether a candidate could not be tried.

        Raises
        ------
        DsaError
            DEFAULT could not be tried, or several candidates in a row.
        """
        if not (isinstance(outcome, WorkerError) and (outcome.is_surroundings or outcome.kind == _UNREACHABLE)):
            losses.end()
            return False
        if dict(decisions) == self._source.default(task):
            raise DsaError(f"tune: {task.title}: DEFAULT itself could not be tried: {outcome}")
        losses.add(task.title, outcome)
        self._lost.add(as_key(decisions))
        return True

    def _settled(self, task: Task, libraries: Mapping[int, Path], kind: str) -> Iterator[tuple[int, Any | WorkerError]]:
        # A candidate gets another turn if its machine went away, possibly on another machine. The same holds if
        # something else kept the machine busy.
        for chances in (2, 1, 0):
            again = {}
            for i, outcome in self._timed(task, libraries, kind):
                if chances and (_is_remote(outcome) or self._is_disturbed(task, outcome)):
                    again[i] = libraries[i]
                else:
                    yield i, outcome
            libraries = again

    def _is_disturbed(self, task: Task, outcome: Any) -> bool:
        """Whether DEFAULT took much longer beside this candidate than beside others."""
        if isinstance(outcome, WorkerError) or self._options.remote:
            return False
        disturbed = False
        for threads, taken in outcome["default_seconds"].items():
            usual = self._usual.setdefault((task, threads), math.inf)
            self._usual[task, threads] = min(usual, statistics.median(taken))
            disturbed |= statistics.median(taken) > _DISTURBED * usual
        return disturbed

    def _timed(self, task: Task, libraries: Mapping[int, Path], kind: str) -> Iterator[tuple[int, Any | WorkerError]]:
        if not libraries:
            return
        remote = self._options.remote
        # Count them each time, because machines come and go.
        machines = fleet.count(remote) if remote else 1
        effort = Effort(self._options.threads, **EFFORT[kind])
        order = list(libraries)
        requests: list[Request] = [self._source.request(task, libraries[i], effort, remote) for i in order]
        for j, outcome in self._workers.map(requests, self._options.limit, machines):
            yield order[j], outcome

    def _record(self, task: Task, kind: str, decisions: Decisions, outcome: Any) -> Record:
        fields: dict[str, Any] = {
            "kind": kind,
            "op": task.op,
            "spec": spec_hash(task.op),
            "types": task.types,
            "target": task.target,
            "shape": task.shape,
            "decisions": dict(decisions),
            "machine": self._options.machine,
            "versions": {"dsa_tvm": __version__, **self._source.versions},
            "date": datetime.now(UTC).strftime(DATE_FORMAT),
        }
        reason = ""
        if isinstance(outcome, WorkerError):
            if outcome.kind == "LibraryError":
                # The GPU is gone. That is not the fault of this candidate, and all others would fail as well.
                raise DsaError(f"tune: {task.title}: {outcome}")
            reason = failure(outcome)
        else:
            seconds, default_seconds = ({n: tuple(x) for n, x in outcome[m].items()} for m in _TIMES)
            roof = outcome.get("roof")
            if roof is None:
                gflops = outcome["gflops"] or self._options.gflops[task.types]
                roof = task.roof({n: gflops[n] for n in seconds})
            try:
                return Record(**fields, seconds=seconds, default_seconds=default_seconds, roof=roof, error=None)
            except RecordError as error:
                reason = f"implausible: {error}"
        if dict(decisions) == self._source.default(task):
            raise DsaError(f"tune: {task.title}: DEFAULT itself failed: {reason}")
        return Record(**fields, seconds={}, default_seconds={}, roof={}, error=reason)


def _is_remote(outcome: Any) -> bool:
    return isinstance(outcome, WorkerError) and outcome.kind in ("RemoteError", _UNREACHABLE)
