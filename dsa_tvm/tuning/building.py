"""Builds candidate libraries for CPUs: workers compile kernels, and this process links them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from ..build.candidates import Linker
from ..errors import BuildError
from ..runtime.machine import usable_cpus
from ..schedules import CPU, CpuSpace, space
from .builder import CandidateBuilder
from .failures import WorkerError, no_default, patiently
from .fleet import Remote
from .source import Decisions
from .tasks import Effort, Task, Types
from .workers import Request, Workers


class Builder(CandidateBuilder):
    """Builds the candidates of a job for CPUs: its `source.Source`.

    Parameters
    ----------
    workers : Workers
    directory : Path
        For objects and libraries; the caller removes it.
    cc : str
        C compiler for the target.
    seconds : float
        Time limit of one compilation.
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
        super().__init__(workers, directory, seconds)
        self._cc, self.modules = cc, modules
        self._linkers: dict[tuple[str, str, Types], tuple[Linker, Path]] = {}

    def space(self, task: Task) -> space.Module:
        """The decisions of the task's kernel."""
        return CpuSpace(self.modules[task.op], task.variant, task.target)

    def request(self, task: Task, library: Path, effort: Effort, remote: Remote | None) -> Request:
        """Measure a library, here or on a machine of a fleet."""
        return ("measure", (str(library), task, effort, remote))

    def baseline(self, task: Task) -> Path:
        """A library whose candidate is DEFAULT itself.

        Raises
        ------
        DsaError
            It does not compile or link.
        """
        return self._expected(task, self.libraries(task, [self.default(task)]))

    def libraries(self, task: Task, proposals: Sequence[Decisions]) -> Iterator[tuple[int, Path | WorkerError]]:
        """The library of each proposal, by its position, or the error that left it without one. Any order."""
        linker, default = self._linker(task)
        module = self.space(task)
        paths = [self._path(task, ".o") for _ in proposals]
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
        """The linker of a kernel, made once, and the object of DEFAULT with which its candidates are compared."""
        key = (task.op, task.target, task.types)
        if key not in self._linkers:
            default = self._path(task, ".default.o")
            try:
                self._workers.ask(self._request(task, self.default(task), default, "default"), self._seconds)
            except WorkerError as error:
                raise no_default(task.title, error) from error
            self._linkers[key] = (self._new_linker(task), default)
        return self._linkers[key]

    def _new_linker(self, task: Task) -> Linker:
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        return Linker(task.op, task.types, task.target, self._cc, directory=directory)

    def _request(self, task: Task, decisions: Decisions, path: Path, suffix: str = "candidate") -> Request:
        module = self.modules[task.op].__name__
        return ("compile", (module, task.op, dict(task.variant), task.target, dict(decisions), suffix, str(path)))
