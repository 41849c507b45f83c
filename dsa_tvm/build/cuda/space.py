"""The decisions of one CUDA kernel as a search space. It stands in for a kernel module in `schedules.space`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...gpu.architectures import shared_bytes
from ...ops import OPS
from ...spec import DIMS, Dim
from .kernels import OPERATORS, Chosen, Kernel

Operators = Mapping[str, Callable[[str, Mapping[str, Dim], Chosen], Iterator[Kernel]]]


class Space:
    """The decisions of one stage on one architecture.

    Parameters
    ----------
    op : str
        Key of `operators`.
    arch : str
        An architecture, such as ``sm_90a``.
    stage : str
        Which of the operator's kernels, by the name that it gives to `kernels.Chosen`.
    types : sequence of str
        Element types of the type variables, in order.
    lengths : mapping
        Lengths of the model. The kernel is made for those that its code depends on.
    operators : mapping
        As `kernels.OPERATORS`.

    Raises
    ------
    ValueError
        The operator has no such stage for these element types.
    """

    def __init__(
        self,
        op: str,
        arch: str,
        stage: str,
        types: Sequence[str],
        lengths: Mapping[str, int],
        operators: Operators = OPERATORS,
    ) -> None:
        self._make, self._arch, self._stage = operators[op], arch, stage
        self._variant = next(v for v in OPS[op].variants if tuple(v.values()) == tuple(types))
        self._dims = {n: replace(d, values=(lengths[n],)) if d.values else d for n, d in DIMS.items()}
        defaults: list[Any] = []

        def note(default: Any) -> Any:
            defaults.append(default)
            return default

        self._kernels(note)
        if not defaults:
            raise ValueError(f"{op}: there is no stage {stage} for {', '.join(types) or 'it'}")
        default = defaults[0]
        # The names of a kernel module.
        self.Decisions = type(default)
        self.DEFAULT = {arch: default}
        #: `choices` is in the module of the class `Decisions`.
        self.choices: Callable[[str], Mapping[str, tuple[int, ...]]] = sys.modules[self.Decisions.__module__].choices

    def kernels(self, decisions: Any = None) -> list[Kernel]:
        """The operator's kernels for these element types and lengths. Those of the stage have `decisions`, if given.

        Raises
        ------
        ValueError
            The kernel factory refuses the decisions.
        """
        return self._kernels(lambda default: default if decisions is None else decisions)

    def check(self, decisions: Any) -> None:
        """Raise ValueError if no kernel can have these decisions, or if a block has too little shared memory for it."""
        limit = shared_bytes(self._arch)
        for kernel in self.kernels(decisions):
            if kernel.shared_bytes > limit:
                taken = f"{kernel.shared_bytes} bytes of shared memory, of which {self._arch} has {limit}"
                raise ValueError(f"{kernel.stage}: {decisions} takes {taken}")

    def _kernels(self, choose: Callable[[Any], Any]) -> list[Kernel]:
        def chosen(stage: str, variant: Mapping[str, str], sizes: Mapping[str, int], default: Any) -> Any:
            return choose(default) if (stage, variant) == (self._stage, self._variant) else default

        made = self._make(self._arch, self._dims, chosen)
        return [kernel for kernel in made if not kernel.variant or kernel.variant == self._variant]
