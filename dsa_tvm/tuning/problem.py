"""What a candidate has to compute, and what the reference says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..benchmark.check import OF_KEYS, check
from ..benchmark.workload import Workload
from ..ops.element_types import decode, encode


@dataclass(frozen=True)
class Problem:
    """Inputs in some element types, the queries to look at, and their reference.

    Parameters
    ----------
    work : Workload
        float32; what the type variables stand for is rounded to `variant`.
    variant : mapping
        Element types by type variable.
    rows : sequence of int
        Queries.
    references : tuple of ndarray
        The float64 outputs of these, for the rounded inputs.
    """

    work: Workload
    variant: Mapping[str, str]
    rows: Sequence[int]
    references: tuple[Any, ...]

    @classmethod
    def of(cls, work: Workload, variant: Mapping[str, str], rows: Sequence[int]) -> Problem:
        """With the reference computed."""
        exact = {}
        for tensor in work.spec.inputs:
            if tensor.name in work.inputs:
                x = work.inputs[tensor.name]
                cut = x if tensor.name in OF_KEYS else x[list(rows)]
                dtype = work.spec.dtype_of(tensor, variant)
                exact[tensor.name] = decode(encode(cut, dtype), dtype)
        return cls(work, variant, rows, work.spec.reference(**exact, **work.attrs))

    def inputs(self) -> list[tuple[str, np.ndarray] | None]:
        """Element type and bits of every input in the operator's order; None for an optional one that is left out."""
        given = self.work.inputs
        types = {t.name: self.work.spec.dtype_of(t, self.variant) for t in self.work.spec.inputs}
        return [(types[n], encode(given[n], types[n])) if n in given else None for n in types]

    def results(self) -> list[tuple[str, tuple[int, ...]]]:
        """Element type and shape of every output."""
        spec, attrs = self.work.spec, self.work.attrs
        lengths = {**self.work.lengths, **{a.dim: attrs[a.name] for a in spec.attrs if a.dim}}
        return [(spec.dtype_of(t, self.variant), tuple(lengths[d] for d in t.shape)) for t in spec.outputs]

    def check(self, outputs: Sequence[np.ndarray], dtype: str = "") -> None:
        """Hold outputs of the queries `rows` against the reference.

        Parameters
        ----------
        outputs : sequence of ndarray
        dtype : str
            Element type whose tolerances hold; by default that of the first type variable.

        Raises
        ------
        CheckError
        """
        dtype = dtype or next(iter(self.variant.values()), "float32")
        check(self.work, outputs, range(len(self.rows)), known=self.references, dtype=dtype)
