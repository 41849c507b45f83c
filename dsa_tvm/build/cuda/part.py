"""The CUDA part of a library: compiled kernels, and their entry in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...spec import Dim
from .. import link
from . import fatbins as cuda
from . import report
from . import table as cuda_table
from .kernels import Kernel
from .plan import Plan


def add(
    work: Path,
    archs: Sequence[str],
    dims: Mapping[str, Dim],
    plan: Plan,
    nvcc: str,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Compile the CUDA kernels, and put what `link.link_library` needs of them into `work`.

    Returns
    -------
    dict
        The entry ``cuda`` of the manifest.

    Raises
    ------
    BuildError
        A kernel cannot be made, or nvcc fails.
    """
    sets = cuda.generate(archs, dims, plan)
    fatbins, said = cuda.compile_sets(sets, work, nvcc, progress)
    (work / "cuda_launch.h").write_text(cuda_table.header(sets))
    toolkit = link.nvcc_version(nvcc)
    (work / "cuda_table.c").write_text(cuda_table.source(sets, fatbins, toolkit))
    return {
        "toolkit": "{}.{}".format(*toolkit),
        "archs": list(archs),
        "ptx": next(kernels.ptx for kernels in sets if kernels.ptx),
        "chosen": plan.made(),
        "kernels": [
            {
                "archs": kernels.targets,
                **{unit.op: {f.symbol: _decisions(f.kernel) for f in unit.functions} for unit in kernels.units},
            }
            for kernels in sets
        ],
        "resources": report.parse(said, sets),
        "remarks": report.remarks(said),
    }


def _decisions(kernel: Kernel) -> dict[str, int]:
    return asdict(kernel.decisions) if kernel.decisions else {}
