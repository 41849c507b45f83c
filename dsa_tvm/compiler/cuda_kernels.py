"""The CUDA kernels of each operator: with which decisions, for which types and lengths, and what launching them takes.

An operator joins with a function here and its entry in `OPERATORS`, a struct of the same name in cuda.h that has the
fields of `Kernel.facts`, and its launches in cuda_stages.c.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..schedules.cuda import topk
from ..spec import Dim

#: Key of a module's DEFAULT for every GPU that has no decisions of its own.
ANY = "cuda"


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Parameters
    ----------
    stage : str
        Which of the operator's launches it serves. All kernels of a stage have the same parameters.
    decisions : Decisions
    make : callable
        Makes the PrimFunc.
    shared_bytes : int
        The most shared memory that a launch takes.
    facts : mapping
        What the launching code must know of the decisions: fields of ``struct cuda_<op>``.
    variant : mapping
        Element types of the type variables; none where one kernel serves all.
    sizes : mapping
        Lengths of dimensions that the code is made for.
    """

    stage: str
    decisions: Any
    make: Callable[[], Any] = field(compare=False)
    shared_bytes: int
    facts: Mapping[str, int]
    variant: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


def _topk(arch: str, dims: Mapping[str, Dim]) -> Iterator[Kernel]:
    c = topk.DEFAULT.get(arch, topk.DEFAULT[ANY])
    facts = {name: getattr(c, name) for name in ("list_factor", "list_min", "list_max")}
    facts["selector_bytes"] = c.shared_bytes(1) - 8 * c.capacity(1)
    for stage in topk.STAGES:
        make = functools.partial(topk.tensor_ir, {}, c, stage)
        yield Kernel(stage, c, make, c.shared_bytes(dims["topk"].maximum), facts)


#: Operator to a function of the architecture, or `ANY`, and the dimensions with their served values.
OPERATORS: Mapping[str, Callable[[str, Mapping[str, Dim]], Iterator[Kernel]]] = {
    "topk": _topk,
}
