"""The kernel factories of each operator, and the targets that they are compiled for.

A kernel factory lives beside its decisions and not in `ops`, because importing the description of an operator must not
import TVM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import OPS, sparse_mla_fp8
from .cpu import lightning_indexer, products, sparse_mla, topk

#: Kernel modules by operator. All other operators use these three.
CPU = {"lightning_indexer": lightning_indexer, "topk": topk, "sparse_mla": sparse_mla}

#: Element types that have a kernel, by operator.
CPU_VARIANTS: Mapping[str, tuple[Mapping[str, str], ...]] = {op: OPS[op].variants for op in CPU} | {
    "sparse_mla": (*OPS["sparse_mla"].variants, sparse_mla_fp8.KERNEL)
}

#: CPU targets, the best last. A library holds several, and picks the last one that runs on the machine. What CPUID has
#: to say of that machine follows from the level (``mcpu``) and from the features beside it (``mattr``).
CPU_TARGETS: Mapping[str, dict[str, Any]] = {
    "x86-64-v2": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"},
    "x86-64-v3": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    "x86-64-v3-vnni": {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "x86-64-v3",
        "mattr": ["+avxvnni"],
    },
    "x86-64-v4": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"},
    "x86-64-v4-vnni": {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "x86-64-v4",
        "mattr": ["+avx512vnni"],
    },
    "x86-64-v4-bf16": {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "x86-64-v4",
        "mattr": ["+avx512vnni", "+avx512bf16"],
    },
    "x86-64-v4-amx": {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "x86-64-v4",
        "mattr": ["+avx512vnni", "+avx512bf16", "+amx-tile", "+amx-bf16", "+amx-int8"],
    },
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
    "aarch64-dotprod": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod"]},
    "aarch64-i8mm": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod", "+i8mm"]},
    "aarch64-bf16": {
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mattr": ["+neon", "+dotprod", "+i8mm", "+bf16"],
    },
}

#: GPU architectures that a library has machine code for by default. sm_90a rather than sm_90, because some kernels use
#: instructions that sm_90 lacks. sm_100 and sm_120 without ``a`` also serve later GPUs of their generations.
CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

#: Targets that have kernels for some element types only, and the target whose kernels they use for all others.
BASES: Mapping[str, str] = {
    "x86-64-v3-vnni": "x86-64-v3",
    "x86-64-v4-vnni": "x86-64-v4",
    "x86-64-v4-bf16": "x86-64-v4-vnni",
    "x86-64-v4-amx": "x86-64-v4-bf16",
    "aarch64-dotprod": "aarch64",
    "aarch64-i8mm": "aarch64-dotprod",
    "aarch64-bf16": "aarch64-i8mm",
}

#: The dot products that the kernels of these targets multiply with.
DOTS: Mapping[str, str] = {
    "x86-64-v3-vnni": products.INT8X8,
    "x86-64-v4-vnni": products.INT8X16,
    "x86-64-v4-bf16": products.BF16X16,
    "x86-64-v4-amx": products.AMX,
    "aarch64-dotprod": products.INT8X4,
    "aarch64-i8mm": products.INT8X2X2,
    "aarch64-bf16": products.BF16X2X2,
}


def chain(target: str) -> tuple[str, ...]:
    """A target, its base, the base of that and so on; the last one has kernels for all element types."""
    found = [target]
    while found[-1] in BASES:
        found.append(BASES[found[-1]])
    return tuple(found)


def cpu_variants(op: str, target: str) -> tuple[Mapping[str, str], ...]:
    """Element types for which a target has its own kernels."""
    if target not in DOTS:
        return CPU_VARIANTS[op]
    takes = getattr(CPU[op], "takes", None)
    return tuple(variant for variant in CPU_VARIANTS[op] if takes and takes(variant, DOTS[target]))


@dataclass(frozen=True)
class CpuSpace:
    """The decisions of one CPU kernel, a `space.Module`: those of its operator that some element types can have.

    Parameters
    ----------
    module : module
        The operator's, such as those of `CPU`.
    variant : mapping
        Element types by type variable.
    target : str
    """

    module: Any
    variant: Mapping[str, str]
    target: str

    @property
    def Decisions(self) -> Any:
        """The dataclass."""
        return self.module.Decisions

    @property
    def DEFAULT(self) -> Mapping[str, Any]:
        """The hand-made decisions by target."""
        return self.module.DEFAULT

    def choices(self, target: str) -> dict[str, tuple[int, ...]]:
        """The values of each decision that are worth trying."""
        return self.module.choices(target)

    def check(self, decisions: Any) -> None:
        """Raise ValueError for what the kernel cannot be made of."""
        if self.target in DOTS:
            self.module.check_dots(decisions, DOTS[self.target])

    def kernel(self, decisions: Any) -> Any:
        """Make the PrimFunc."""
        options = {"dots": DOTS[self.target]} if self.target in DOTS else {}
        return self.module.tensor_ir(self.variant, decisions, **options)


def cpu_kernel(op: str, variant: Mapping[str, str], target: str, decisions: Any) -> Any:
    """Make the PrimFunc of a CPU kernel."""
    return CpuSpace(CPU[op], variant, target).kernel(decisions)
