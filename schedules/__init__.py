"""Every kernel of a target: which operator, for which element types, with which decisions.

A kernel factory lives beside its decisions, not in `ops`: tile shapes and vector widths shape the code, and importing
an operator's description must not import TVM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..ops import OPS
from .cpu import lightning_indexer, sparse_mla, topk

#: Kernel modules by operator. `indexer_topk` and `dsa_attention` are made of these three.
CPU = {"lightning_indexer": lightning_indexer, "topk": topk, "sparse_mla": sparse_mla}

#: CPU targets, best last: a library holds several and picks the last one the machine runs.
CPU_TARGETS: Mapping[str, dict[str, Any]] = {
    "x86-64-v2": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"},
    "x86-64-v3": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    "x86-64-v4": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"},
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
}


@dataclass(frozen=True)
class Kernel:
    """A compiled function of the library.

    Parameters
    ----------
    op : str
        Key of `CPU`.
    types : tuple of str
        Element types of the type variables, in the order T, K.
    func : PrimFunc
        Its ``global_symbol`` names the target too, so that objects of several targets link together.
    """

    op: str
    types: tuple[str, ...]
    func: tirx.PrimFunc

    @property
    def symbol(self) -> str:
        return str(self.func.attrs["global_symbol"])


def default_decisions(target: str) -> dict[str, Any]:
    """The hand-made decisions of every kernel module for `target`."""
    return {op: module.DEFAULT[target] for op, module in CPU.items()}


def kernels(target: str, decisions: Mapping[str, Any]) -> list[Kernel]:
    """All kernels of a CPU target.

    Parameters
    ----------
    target : str
        Key of `CPU_TARGETS`.
    decisions : mapping
        Operator to the decisions its factory takes.
    """
    found = []
    for op, module in CPU.items():
        for variant in OPS[op].variants:
            types = tuple(variant.values())
            args = (variant, decisions[op]) if variant else (decisions[op],)
            symbol = "__".join((op, *types, target.replace("-", "_")))
            func = module.tensor_ir(*args).with_attr("global_symbol", symbol)
            found.append(Kernel(op, types, func))
    return found
