"""Libraries made for measuring on a GPU: the C doors and the CUDA kernels of one operator, for one architecture.

What the kernels share is compiled once. A candidate then costs its CUDA code, a table and a link. Such a library has no
CPU kernels, and loading it needs neither TVM nor this package.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import BuildError
from ...runtime.files import write_atomically
from ...schedules import space
from ...spec import DIMS
from .. import kernel_table, link, spec_table
from . import fatbins
from . import kernels as cuda_kernels
from . import table as cuda_table
from .fatbins import KernelSet, Unit
from .space import Operators, Space

#: The object with the C files that all candidates share.
_CORE = "core.o"


@dataclass(frozen=True)
class TunedKernel:
    """What is tuned: one stage of an operator. All other stages have DEFAULT decisions.

    Parameters
    ----------
    op, arch, stage : str
    types : tuple of str
        Element types of the type variables, in order.
    lengths : tuple of (str, int)
        The lengths of the model, by dimension.
    operators : str
        Name of the module whose ``OPERATORS`` has the operator.
    """

    op: str
    arch: str
    stage: str
    types: tuple[str, ...]
    lengths: tuple[tuple[str, int], ...]
    operators: str = cuda_kernels.__name__

    def space(self) -> Space:
        """The search space of its decisions."""
        return Space(self.op, self.arch, self.stage, self.types, dict(self.lengths), self.operator_table())

    def operator_table(self) -> Operators:
        """``OPERATORS`` of the module, which is imported."""
        return importlib.import_module(self.operators).OPERATORS


@dataclass(frozen=True)
class Foundation:
    """What the libraries of one operator and one choice of element types share.

    Parameters
    ----------
    directory : Path
        Holds headers and objects.
    unit : Unit
        The operator's kernels with DEFAULT decisions.
    cc, nvcc : str
    """

    directory: Path
    unit: Unit
    cc: str
    nvcc: str


def found(kernel: TunedKernel, directory: Path, cc: str, nvcc: str) -> Foundation:
    """Compile the C files into an empty directory.

    Raises
    ------
    BuildError
        There is no compiler, or it fails.
    """
    link.expect_compiler(cc)
    link.expect_nvcc(nvcc)
    unit = fatbins.make_unit(kernel.op, kernel.space().kernels())
    spec_table.write(directory, DIMS, "0")
    (directory / "table.c").write_text(kernel_table.source([]))
    header = cuda_table.header([KernelSet((kernel.arch,), None, (unit,))])
    (directory / "cuda_launch.h").write_text(header + "".join((*_absent(kernel), *_tuned(kernel))))
    source = link.export_directory() / "src"
    files = [source / name for name in (*link.CORE, *link.DOOR, *link.CUDA)]
    files += [directory / name for name in link.GENERATED]
    link.compile_object(files, directory / _CORE, directory, cc)
    return Foundation(directory, unit, cc, nvcc)


def _absent(kernel: TunedKernel) -> Iterator[str]:
    """Stages of other operators: the launching code names them, but this library lacks them."""
    for op, make in kernel.operator_table().items():
        if op != kernel.op:
            for stage in {k.stage: None for k in make(kernel.arch, DIMS, lambda *described: described[-1])}:
                yield f"#define dsa_shape_{op}_{stage}(call) NULL\n"
                yield f"#define dsa_launch_{op}_{stage}(call, ...) dsa_cuda_unserved(call)\n"


def _tuned(kernel: TunedKernel) -> Iterator[str]:
    """Fix which of two stages is launched, so that every GPU measures the kernel with the candidate's decisions.

    Otherwise the launcher chooses by the number of multiprocessors.
    """
    if kernel.op == "lightning_indexer":
        yield f"#define DSA_TUNED_FOR_FEW {int(kernel.stage.endswith('few'))}\n"


def make(kernel: TunedKernel, foundation: Foundation, decisions: Mapping[str, int], out: Path) -> None:
    """Compile and link one library. `out` gets the whole library or, after an error, nothing.

    Raises
    ------
    ValueError
        The kernel factory refuses the decisions.
    BuildError
        nvcc or the C compiler fails, or the kernel has other parameters than the default one.
    """
    own = kernel.space()
    unit = fatbins.make_unit(kernel.op, own.kernels(space.kernel_decisions(own, decisions)))
    if [f.parameters for f in unit.functions] != [f.parameters for f in foundation.unit.functions]:
        raise BuildError(f"{unit.op}: expected a kernel with the parameters of the default one")
    with tempfile.TemporaryDirectory(prefix="dsa-tvm-") as name:
        work = Path(name)
        fatbin, _ = fatbins.compile_unit(unit, (kernel.arch,), work / f"{unit.op}.fatbin", foundation.nvcc)
        sets = [KernelSet((kernel.arch,), None, (unit,))]
        table = cuda_table.source(sets, {(0, unit.op): fatbin}, link.nvcc_version(foundation.nvcc))
        (work / "cuda_table.c").write_text(table)
        library = work / "candidate.so"
        inputs = (str(work / "cuda_table.c"), str(foundation.directory / _CORE))
        options = ("exports.map", "-Wl,-z,defs", "-ldl")
        link.link_shared(inputs, library, foundation.directory, foundation.cc, *options)
        write_atomically(out, library.read_bytes(), 0o755)
