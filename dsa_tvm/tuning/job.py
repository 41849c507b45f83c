"""The tuning job: propose, build, check and time, keep every trial, and measure the best once more against DEFAULT."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tvm

from .. import __version__
from ..errors import DsaError, RecordError
from ..progress import Progress
from ..records import DATE_FORMAT, Log, Record, as_key, spec_hash
from ..report import duration
from . import fleet
from .building import Builder, Decisions
from .fleet import Remote
from .search import Search
from .tasks import Effort, Task
from .workers import Request, WorkerError, Workers

#: Candidates proposed, built and measured at a time.
BATCH = 8
#: Trials that are measured again at the end.
FINALISTS = 4
#: Measuring effort by kind of record.
EFFORT: Mapping[str, Mapping[str, Any]] = {
    "trial": {"seconds": 0.3, "rounds": (2, 9)},
    "final": {"seconds": 2.0, "rounds": (5, 41)},
}
#: DEFAULT this much slower than it was: something else keeps the machine busy.
_DISTURBED = 1.3
_TIMES = ("seconds", "default_seconds")


@dataclass(frozen=True)
class Options:
    """What a job was asked for.

    Parameters
    ----------
    trials : int
        For each task, those of earlier jobs in the log included.
    timeout : float
        Seconds after which no new trial begins; infinity for none.
    threads : tuple of int
        Thread counts that every candidate is timed with.
    output : Path
        Directory of the logs.
    machine : str
        Name of this kind of machine; trials of another are not taken for its own.
    gflops : mapping
        The machine's multiply-add limit by number of threads.
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
    gflops: Mapping[int, float]
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
    builder : Builder
    """

    def __init__(self, options: Options, tasks: Sequence[Task], workers: Workers, builder: Builder) -> None:
        self._options, self._tasks, self._workers, self._builder = options, tasks, workers, builder
        self._end = time.monotonic() + options.timeout
        self._usual: dict[tuple[Task, int], float] = {}

    def run(self, progress: Progress) -> list[Record]:
        """Tune every task; the finals in the order of the tasks.

        Raises
        ------
        DsaError
            DEFAULT itself fails, the log cannot be written, or no machine is left.
        """
        return [final for task in self._tasks for final in self._tune(task, progress)]

    def _tune(self, task: Task, progress: Progress) -> list[Record]:
        log = Log(self._options.output / task.target / f"{task.op}.jsonl")
        records, damaged = log.read()
        for damage in damaged:
            progress.say(f"skipped {damage}")
        same = [r for r in records if r.machine == self._options.machine and r.types == task.types]
        here = [r for r in same if r.shape == task.shape]
        known = {as_key(r.decisions): r for r in here if r.kind == "trial"}
        progress.advance(min(len(known), self._options.trials))
        module = self._builder.modules[task.op]
        search = Search(task.op, module, task.target, seed=self._options.seed, batch=BATCH)
        search.tell([(r.decisions, r.speedup or None) for r in known.values() if search.covers(r.decisions)])
        for proposals in self._proposals(task, search, same, known):
            told = []
            for record in self._measured(task, proposals, "trial"):
                log.append(record)
                known[as_key(record.decisions)] = record
                told.append((record.decisions, record.speedup or None))
                progress.step(_line(task, known, self._options.trials))
            search.tell(told)
        best = sorted(known.values(), key=lambda r: r.speedup, reverse=True)
        finalists = [r for r in best[:FINALISTS] if r.speedup > 1 and dict(r.decisions) != self._builder.default(task)]
        # A job that was killed during its finals goes on with those that are missing.
        finals = {as_key(r.decisions): r for r in here if r.kind == "final"}
        missing = [dict(r.decisions) for r in finalists if as_key(r.decisions) not in finals]
        for record in self._measured(task, missing, "final"):
            log.append(record)
            finals[as_key(record.decisions)] = record
        return [finals[as_key(r.decisions)] for r in finalists]

    def _proposals(
        self, task: Task, search: Search, same: Sequence[Record], known: Mapping[Any, Record]
    ) -> Iterator[list[dict[str, int]]]:
        """Batches of new decisions: DEFAULT and what won at other sizes first, then the search's own."""
        others = sorted((r for r in same if r.kind == "final"), key=lambda r: r.speedup, reverse=True)
        seeds = [self._builder.default(task), *(dict(r.decisions) for r in others if search.covers(r.decisions))]
        seeds = [d for i, d in enumerate(seeds) if as_key(d) not in known and d not in seeds[:i]]
        while (left := self._options.trials - len(known)) > 0 and time.monotonic() < self._end:
            batch, seeds = (seeds[:BATCH], seeds[BATCH:]) if seeds else (search.ask(), [])
            if not batch:
                return
            yield batch[:left]

    def _measured(self, task: Task, proposals: Sequence[dict[str, int]], kind: str) -> Iterator[Record]:
        """Build, then measure: on one machine the two would disturb each other."""
        libraries: dict[int, Path] = {}
        for i, outcome in self._builder.libraries(task, proposals) if proposals else ():
            if isinstance(outcome, WorkerError):
                yield self._record(task, kind, proposals[i], outcome)
            else:
                libraries[i] = outcome
        # A machine that went away costs a candidate its turn, so it gets another one, on another machine perhaps. So
        # does a candidate that was measured while something else kept the machine busy.
        for chances in (2, 1, 0):
            again = {}
            for i, outcome in self._timed(task, libraries, kind):
                if chances and (_is_lost(outcome) or self._is_disturbed(task, outcome)):
                    again[i] = libraries[i]
                    continue
                libraries[i].unlink()
                yield self._record(task, kind, proposals[i], outcome)
            libraries = again

    def _is_disturbed(self, task: Task, outcome: Any) -> bool:
        """Whether DEFAULT took much longer beside this candidate than beside another."""
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
        # Asked each time, because machines come and go.
        machines = fleet.count(remote) if remote else 1
        effort = Effort(self._options.threads, **EFFORT[kind])
        order = list(libraries)
        requests: list[Request] = [("measure", (str(libraries[i]), task, effort, remote)) for i in order]
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
            "versions": {"dsa_tvm": __version__, "tvm": tvm.__version__},
            "date": datetime.now(UTC).strftime(DATE_FORMAT),
        }
        reason = ""
        if isinstance(outcome, WorkerError):
            reason = _reason(outcome)
        else:
            seconds, default_seconds = ({n: tuple(x) for n, x in outcome[m].items()} for m in _TIMES)
            gflops = outcome["gflops"] or self._options.gflops
            roof = task.roof({n: gflops[n] for n in seconds})
            try:
                return Record(**fields, seconds=seconds, default_seconds=default_seconds, roof=roof, error=None)
            except RecordError as error:
                reason = f"implausible: {error}"
        if dict(decisions) == self._builder.default(task):
            raise DsaError(f"tune: {task.title}: DEFAULT itself failed: {reason}")
        return Record(**fields, seconds={}, default_seconds={}, roof={}, error=reason)


def _line(task: Task, known: Mapping[Any, Record], trials: int) -> str:
    best = max(known.values(), key=lambda r: r.speedup)
    line = f"{task.title}  trial {len(known)}/{trials}"
    if not best.seconds:
        return f"{line}  no candidate has worked yet"
    threads = max(best.seconds)
    taken = duration(statistics.median(best.seconds[threads]))
    return f"{line}  best {taken} on {threads} threads, {best.speedup:.2f} x DEFAULT"


def _is_lost(outcome: Any) -> bool:
    return isinstance(outcome, WorkerError) and outcome.kind == "RemoteError"


def _reason(error: WorkerError) -> str:
    if error.kind == "CheckError":
        return f"wrong result: {error}"
    return str(error) if error.kind in ("crashed", "timed out") else f"{error.kind}: {error}"
