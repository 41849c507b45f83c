"""Libraries for measuring on a CPU: one operator, with the kernels of DEFAULT and of one candidate.

TVM's runtime loads them, here or through its RPC on a machine without dsa_tvm, and calls ``call``, ``time``,
``peak`` and ``cpus`` of export/c/src/measure/measure.c.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..schedules import CPU, CpuSpace
from ..spec import DIMS, INT32_MAX, Dim
from . import kernel_table, link, objects, spec_table
from .kernel_table import Kernels

#: The kernel sets of a library in order, by the suffix of their symbols.
SUFFIXES = ("default", "candidate")


def compile_kernel(
    op: str,
    variant: Mapping[str, str],
    target: str,
    decisions: Any,
    symbol_suffix: str,
    path: str | os.PathLike[str],
    module: ModuleType | None = None,
) -> None:
    """Compile one kernel to an object file for `Linker.link`.

    Parameters
    ----------
    op : str
        Key of `schedules.CPU`.
    variant : mapping
        Assignment of the operator's type variables.
    target : str
        Key of `schedules.CPU_TARGETS`.
    decisions : Decisions
    symbol_suffix : str
        One of `SUFFIXES`: the kernel set that the kernel belongs to.
    path : path-like
        The object file.
    module : module, optional
        The kernel module; by default the operator's module in `schedules.CPU`.
    """
    name = objects.symbol(op, variant.values(), target, symbol_suffix)
    kernel = CpuSpace(module or CPU[op], variant, target).kernel(decisions)
    objects.write_object({name: kernel}, target, Path(path))


class Linker:
    """Makes the candidate libraries of one operator. It compiles only a table for each of them.

    Parameters
    ----------
    op : str
        Key of `schedules.CPU`.
    types : sequence of str
        Element types of the type variables, in order.
    target : str
        Key of `schedules.CPU_TARGETS`.
    cc : str
        C compiler for the target.
    dims : mapping
        The dimensions and the values that are served.
    directory : Path, optional
        An empty directory for compiled C files, which the caller removes; by default a temporary one.

    Raises
    ------
    BuildError
        There is no such compiler, or it fails.
    """

    def __init__(
        self,
        op: str,
        types: Sequence[str],
        target: str,
        cc: str = "cc",
        dims: Mapping[str, Dim] = DIMS,
        *,
        directory: Path | None = None,
    ) -> None:
        link.expect_compiler(cc)
        self._op, self._types, self._target, self._cc = op, tuple(types), target, cc
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="dsa-tvm-"))
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._directory = directory
        spec_table.write(self._directory, dims, "0")
        source = link.export_directory() / "src"
        files = [*(source / name for name in (*link.CORE, "measure/measure.c")), directory / "specs.c"]
        core = directory / "core.o"
        link.compile_object(files, core, directory, cc, f"-DMEASURED_OP=OP_{op.upper()}")
        self._core = str(core)

    def link(
        self, default_object: Path, default_decisions: Any, candidate_object: Path, candidate_decisions: Any, out: Path
    ) -> None:
        """Make one library. Several threads may call this at once.

        Parameters
        ----------
        default_object, candidate_object : Path
            From `compile_kernel` with the suffixes "default" and "candidate".
        default_decisions, candidate_decisions : Decisions
            The decisions that they were compiled with.
        out : Path
            The library. Kernel set 0 is the default, kernel set 1 the candidate.

        Raises
        ------
        BuildError
            The compiler fails.
        """
        sets = [
            (self._target, {self._op: [self._kernels(decisions, suffix)]})
            for decisions, suffix in zip((default_decisions, candidate_decisions), SUFFIXES, strict=True)
        ]
        # The table comes from standard input, so that no file is left behind.
        inputs = ("-x", "c", "-", "-x", "none", self._core, str(default_object), str(candidate_object))
        table = kernel_table.source(sets)
        # Without nodelete: a search loads thousands of these.
        link.link_shared(inputs, out, self._directory, self._cc, "measure.map", "-Wl,-z,defs", "-ldl", text=table)

    def _kernels(self, decisions: Any, suffix: str) -> Kernels:
        symbol = objects.symbol(self._op, self._types, self._target, suffix)
        return Kernels(INT32_MAX, INT32_MAX, decisions, {self._types: symbol})
