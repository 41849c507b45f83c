"""The kernel factories, by operator, and the targets they are compiled for.

A kernel factory lives beside its decisions, not in `ops`: tile shapes and vector widths shape the code, and importing
an operator's description must not import TVM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ops import OPS, sparse_mla_fp8
from .cpu import lightning_indexer, sparse_mla, topk

#: Kernel modules by operator. The other operators are made of these three.
CPU = {"lightning_indexer": lightning_indexer, "topk": topk, "sparse_mla": sparse_mla}

#: Element types that there is a kernel for, by operator.
CPU_VARIANTS: Mapping[str, tuple[Mapping[str, str], ...]] = {op: OPS[op].variants for op in CPU} | {
    "sparse_mla": (*OPS["sparse_mla"].variants, sparse_mla_fp8.KERNEL)
}

#: CPU targets, best last: a library holds several and picks the last one the machine runs.
CPU_TARGETS: Mapping[str, dict[str, Any]] = {
    "x86-64-v2": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"},
    "x86-64-v3": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    "x86-64-v4": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"},
    "x86-64-v4-bf16": {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "x86-64-v4",
        "mattr": ["+avx512bf16"],
    },
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
}

#: GPU architectures that a library has machine code for by default. Of Hopper's own instructions, which sm_90a has and
#: sm_90 lacks, there are kernels; sm_100 and sm_120 without an ``a`` serve the later GPUs of their generations, too.
CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

#: Targets that have kernels for some element types only, which are better there, and where the others are from.
BASES: Mapping[str, str] = {"x86-64-v4-bf16": "x86-64-v4"}


def cpu_variants(op: str, target: str) -> tuple[Mapping[str, str], ...]:
    """Element types that a target has kernels of its own for; none where those of its base are as good."""
    if target not in BASES:
        return CPU_VARIANTS[op]
    takes = getattr(CPU[op], "takes_bf16", None)
    return tuple(variant for variant in CPU_VARIANTS[op] if takes and takes(variant))


def cpu_kernel(op: str, variant: Mapping[str, str], target: str, decisions: Any) -> Any:
    """The PrimFunc of a CPU kernel."""
    options = {"bf16": True} if target in BASES else {}
    return CPU[op].tensor_ir(variant, decisions, **options)
