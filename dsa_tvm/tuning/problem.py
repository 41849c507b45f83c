"""What a candidate has to compute, with the reference results."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..benchmark.check import OF_KEYS, check
from ..benchmark.workload import Workload
from ..ops.element_types import decode, encode
from .tasks import Task, checks


@dataclass(frozen=True)
class Problem:
    """Inputs in given element types, the queries to check, and their reference results.

    Parameters
    ----------
    work : Workload
        The inputs in float32. Those of type variables are rounded to the types in `variant`.
    variant : mapping
        Element types by type variable.
    rows : sequence of int
        The queries to check.
    references : tuple of ndarray
        Their float64 outputs for the rounded inputs.
    """

    work: Workload
    variant: Mapping[str, str]
    rows: Sequence[int]
    references: tuple[Any, ...]

    @classmethod
    def of(cls, work: Workload, variant: Mapping[str, str], rows: Sequence[int]) -> Problem:
        """Make a problem and compute its reference results."""
        exact = {}
        for tensor in work.spec.inputs:
            if tensor.name in work.inputs:
                x = work.inputs[tensor.name]
                cut = x if tensor.name in OF_KEYS else x[list(rows)]
                dtype = work.spec.dtype_of(tensor, variant)
                exact[tensor.name] = decode(encode(cut, dtype), dtype)
        return cls(work, variant, rows, work.spec.reference(**exact, **work.attrs))

    def inputs(self) -> list[tuple[str, np.ndarray] | None]:
        """Element type and bits of each input, in the operator's order; None for an optional input that is left out."""
        given = self.work.inputs
        types = {t.name: self.work.spec.dtype_of(t, self.variant) for t in self.work.spec.inputs}
        return [(types[n], encode(given[n], types[n])) if n in given else None for n in types]

    def results(self) -> list[tuple[str, tuple[int, ...]]]:
        """Element type and shape of every output."""
        spec, attrs = self.work.spec, self.work.attrs
        lengths = {**self.work.lengths, **{a.dim: attrs[a.name] for a in spec.attrs if a.dim}}
        return [(spec.dtype_of(t, self.variant), tuple(lengths[d] for d in t.shape)) for t in spec.outputs]

    def check(self, outputs: Sequence[np.ndarray], dtype: str = "") -> None:
        """Check the outputs of the queries `rows` against the reference.

        Parameters
        ----------
        outputs : sequence of ndarray
        dtype : str
            Element type whose tolerances apply; by default that of the first type variable.

        Raises
        ------
        CheckError
            An output is not within the tolerance.
        """
        dtype = dtype or next(iter(self.variant.values()), "float32")
        check(self.work, outputs, range(len(self.rows)), known=self.references, dtype=dtype)


@functools.lru_cache(maxsize=1)
def problems(task: Task) -> tuple[Problem, ...]:
    """The inputs that check the candidates of the latest task and, last, the inputs to time."""
    odd = [Problem.of(work, task.variant, _ends(work.lengths["s_q"])) for work in checks(task)]
    last = task.s_q - 1
    return *odd, Problem.of(task.inputs(), task.variant, sorted({0, last // 2, last}))


def _ends(count: int) -> list[int]:
    """Queries to check: all if there are few, else those at both ends. The first ones are irregular."""
    return sorted({*range(min(count, 48)), *range(max(count - 16, 0), count)})
