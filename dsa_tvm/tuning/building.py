"""From decisions to candidate libraries: kernels compiled in workers, linked here."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import tvm

from ..build.candidates import Linker
from ..errors import BuildError
from ..runtime.machine import usable_cpus
from ..schedules import CPU, space
from .failures import WorkerError, no_default, patiently
from .fleet import Remote
from .search import Search
from .source import Decisions
from .tasks import Effort, Task
from .workers import Request, Workers


class Builder:
    """Builds the candidates of a job for CPUs: its `source.Source`.

    Parameters
    ----------
    workers : Workers
    directory : Path
        For the objects and libraries; the caller removes it.
    cc : str
        C compiler for the target.
    seconds : float
        Limit for one compilation.
    modules : mapping
        Kernel module by operator.
    """

    def __init__(
        self,
        workers: Workers,
        directory: Path,
        cc: str,
        seconds: float = 120.0,
        modules: Mapping[str, ModuleType] = CPU,
    ) -> None:
        self._workers, self._directory, self._cc, self._seconds = workers, directory, cc, seconds
        self.modules = modules
        self._numbers = itertools.count()
        self._linkers: dict[str, tuple[Linker, Path]] = {}
        self.versions = {"tvm": tvm.__version__}

    def default(self, task: Task) -> dict[str, int]:
        """DEFAULT of the task's kernel as plain values."""
        return asdict(self.modules[task.op].DEFAULT[task.target])

    def search(self, task: Task, seed: int, batch: int) -> Search:
        """MetaSchedule's, over the decisions of the task's kernel."""
        return Search(task.op, self.modules[task.op], task.target, seed=seed, batch=batch)

    def request(self, task: Task, library: Path, effort: Effort, remote: Remote | None) -> Request:
        """Measure a library, here or on a machine of a fleet."""
        return ("measure", (str(library), task, effort, remote))

    def discard(self, library: Path) -> None:
        """Remove it: a job makes thousands."""
        library.unlink()

    def baseline(self, task: Task) -> Path:
        """A library whose candidate is DEFAULT itself.

        Raises
        ------
        DsaError
            It does not compile or link.
        """
        ((_, outcome),) = self.libraries(task, [self.default(task)])
        if isinstance(outcome, WorkerError):
            raise no_default(task.title, outcome)
        return outcome

    def libraries(self, task: Task, proposals: Sequence[Decisions]) -> Iterator[tuple[int, Path | WorkerError]]:
        """A library for each of `proposals`, in any order, or why there is none."""
        linker, default = self._linker(task)
        module = self.modules[task.op]
        # A name of its own for every library: the loader takes one of the same name for one that it has.
        paths = [self._directory / f"{task.op}.{next(self._numbers)}.o" for _ in proposals]
        requests = [self._request(task, d, p) for d, p in zip(proposals, paths, strict=True)]

        def link(i: int) -> Path | WorkerError:
            chosen = space.kernel_decisions(module, proposals[i])
            library = paths[i].with_suffix(".so")
            try:
                linker.link(default, module.DEFAULT[task.target], paths[i], chosen, library)
            except (BuildError, OSError) as error:
                outcome = WorkerError("BuildError", str(error))
                if not outcome.is_surroundings:
                    raise
                return outcome
            paths[i].unlink()
            return library

        with ThreadPoolExecutor(usable_cpus()) as pool:
            linking = []
            for i, outcome in self._workers.map(requests, self._seconds):
                if isinstance(outcome, WorkerError):
                    yield i, outcome
                else:
                    linking.append((i, pool.submit(patiently, functools.partial(link, i))))
            for i, future in linking:
                yield i, future.result()

    def _linker(self, task: Task) -> tuple[Linker, Path]:
        """Made once for each operator, with the object of DEFAULT that every candidate is measured against."""
        if task.op not in self._linkers:
            default = self._directory / f"{task.op}.default.o"
            try:
                self._workers.ask(self._request(task, self.default(task), default, "default"), self._seconds)
            except WorkerError as error:
                raise no_default(task.title, error) from error
            self._linkers[task.op] = (self._new_linker(task), default)
        return self._linkers[task.op]

    def _new_linker(self, task: Task) -> Linker:
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        return Linker(task.op, task.types, task.target, self._cc, directory=directory)

    def _request(self, task: Task, decisions: Decisions, path: Path, suffix: str = "candidate") -> Request:
        module = self.modules[task.op].__name__
        return ("compile", (module, task.op, task.target, dict(decisions), suffix, str(path)))
