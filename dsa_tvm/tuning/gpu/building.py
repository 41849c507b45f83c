"""Builds candidate libraries for GPUs: nvcc compiles them in workers, on a machine that need not have a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...build.cuda import candidates as cuda_candidates
from ...build.cuda import kernels as cuda_kernels
from ...build.cuda.candidates import Foundation, TunedKernel
from ...build.cuda.space import Space
from ..builder import CandidateBuilder
from ..failures import WorkerError
from ..fleet import Remote
from ..source import Decisions
from ..tasks import Effort, Task
from ..workers import Request, Workers


class CudaBuilder(CandidateBuilder):
    """Builds the candidates of a job for GPUs: its `source.Source`.

    Parameters
    ----------
    workers : Workers
        Workers of the role "nvcc".
    directory : Path
        For headers, objects and libraries; the caller removes it.
    cc, nvcc : str
        Compilers.
    seconds : float
        Time limit of one candidate.
    operators : str
        Name of the module whose ``OPERATORS`` has the kernels.
    """

    def __init__(
        self,
        workers: Workers,
        directory: Path,
        cc: str,
        nvcc: str,
        seconds: float = 900.0,
        operators: str = cuda_kernels.__name__,
    ) -> None:
        super().__init__(workers, directory, seconds)
        self._cc, self._nvcc, self._operators = cc, nvcc, operators
        self._foundations: dict[tuple, Foundation] = {}
        self._baselines: dict[tuple, Path] = {}
        self._space = functools.cache(TunedKernel.space)

    def kernel(self, task: Task) -> TunedKernel:
        """The kernel that the task tunes."""
        return TunedKernel(
            task.op, task.target, task.stage, task.types, tuple(task.preset.lengths.items()), self._operators
        )

    def space(self, task: Task) -> Space:
        """The decisions of the task's kernel."""
        return self._space(self.kernel(task))

    def baseline(self, task: Task) -> Path:
        """The library of DEFAULT. It is built once for each operator and choice of element types.

        Raises
        ------
        DsaError
            It does not compile.
        """
        key = (task.op, task.target, task.types, task.preset)
        if key not in self._baselines:
            path = self._path(task, ".default.so")
            self._baselines[key] = self._expected(task, self.compiled(task, [self.default(task)], [path]))
        return self._baselines[key]

    def libraries(self, task: Task, proposals: Sequence[Decisions]) -> Iterator[tuple[int, Path | WorkerError]]:
        """The library of each proposal, by its position, or the error that left it without one. Any order."""
        # Build this now, not in the middle of a measurement.
        self.baseline(task)
        paths = [self._path(task, ".so") for _ in proposals]
        yield from self.compiled(task, proposals, paths)

    def compiled(
        self, task: Task, proposals: Sequence[Decisions], paths: Sequence[Path]
    ) -> Iterator[tuple[int, Path | WorkerError]]:
        """Like `libraries`, with given paths. A path gets a whole library or nothing."""
        foundation, kernel = self._foundation(task), self.kernel(task)
        requests: list[Request] = [
            ("compile", (kernel, foundation, dict(decisions), path))
            for decisions, path in zip(proposals, paths, strict=True)
        ]
        for i, outcome in self._workers.map(requests, self._seconds):
            yield i, outcome if isinstance(outcome, WorkerError) else paths[i]

    def request(self, task: Task, library: Path, effort: Effort, remote: Remote | None) -> Request:
        """Measure a library in turns with that of DEFAULT."""
        return ("measure", (str(self.baseline(task)), str(library), task, effort))

    def _foundation(self, task: Task) -> Foundation:
        key = (task.op, task.target, task.types, task.preset)
        if key not in self._foundations:
            directory = self._path(task, ".common")
            directory.mkdir(parents=True)
            self._foundations[key] = cuda_candidates.found(self.kernel(task), directory, self._cc, self._nvcc)
        return self._foundations[key]
