"""CUDA kernels: TVM turns TensorIR into CUDA source, and nvcc compiles it to fatbins. Neither needs a GPU."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import BuildError
from ...gpu.architectures import ANY_GPU, is_arch, number_of
from ...runtime.machine import usable_cpus
from ...schedules import CUDA_ARCHS
from ...schedules.cuda.source import DEVICE_HEADERS, device_code, translation_unit
from ...spec import DIMS, Dim
from .. import link
from . import report
from . import text as cuda_text
from .kernels import OPERATORS, Kernel

_OLDEST = 80
_FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-diag-suppress", "177", "-I", "headers")
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)(?:, \d+)?\) (\w+)\(([^)]*)\) \{')
_C_TYPES = {"int": "int32_t", "uint": "uint32_t", "int64_t": "int64_t", "float": "float"}

#: C type of a tensor map, which a kernel takes by value.
TENSOR_MAP = "const struct cuda_tensor_map *"


@dataclass(frozen=True)
class Function:
    """A kernel in CUDA source.

    Parameters
    ----------
    symbol : str
    kernel : Kernel
    threads : int
        Threads of a block.
    parameters : tuple of (str, str)
        C type and name of each.
    definition : str
    """

    symbol: str
    kernel: Kernel
    threads: int
    parameters: tuple[tuple[str, str], ...]
    definition: str = field(repr=False)


@dataclass(frozen=True)
class Unit:
    """The kernels of one operator."""

    op: str
    functions: tuple[Function, ...]

    @property
    def text(self) -> str:
        """CUDA source."""
        return translation_unit(f.definition for f in self.functions)


@dataclass(frozen=True)
class KernelSet:
    """The units for architectures that have the same kernels. Every set has the same operators.

    Parameters
    ----------
    archs : tuple of str
        Architectures that get machine code, such as ``sm_90a``.
    ptx : str or None
        Such as ``compute_80``, if the drivers of later GPUs are to compile this set.
    units : tuple of Unit
    """

    archs: tuple[str, ...]
    ptx: str | None
    units: tuple[Unit, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """The architectures and the PTX."""
        return self.archs + ((self.ptx,) if self.ptx else ())


def check_archs(archs: Iterable[str]) -> tuple[str, ...]:
    """The architectures in ascending order, each once; the default ones if `archs` is empty.

    Raises
    ------
    BuildError
        A name is not that of an architecture from sm_80 on.
    """
    chosen = tuple(archs) or CUDA_ARCHS
    for arch in chosen:
        if not is_arch(arch) or number_of(arch) < _OLDEST:
            raise BuildError(f"arch: expected sm_{_OLDEST} or later, such as {', '.join(CUDA_ARCHS)}, got {arch}")
    return tuple(sorted(set(chosen), key=lambda arch: (number_of(arch), arch)))


def _hand_made(arch: str, op: str, stage: str, variant: Any, sizes: Any, default: Any) -> Any:
    return default


def expect_served(archs: Sequence[str], dims: Mapping[str, Dim], asked: Mapping[str, Iterable[int]]) -> None:
    """Find out before long work whether CUDA kernels serve all values, alone and together.

    Parameters
    ----------
    archs : sequence of str
    dims : mapping
        The dimensions with all values to serve.
    asked : mapping
        The values that the caller asked for, by dimension. The message names them.

    Raises
    ------
    BuildError
        A value has no CUDA kernels, or the values together have none.
    """
    for name, values in asked.items():
        for value in values:
            try:
                _listed(archs, {**DIMS, name: replace(DIMS[name], values=(value,))}, _hand_made)
            except ValueError as error:
                raise BuildError(f"{name}: expected a value that CUDA kernels serve, got {value}: {error}") from error
    try:
        _listed(archs, dims, _hand_made)
    except ValueError as error:
        widths = ", ".join(f"{name} {value}" for name, values in asked.items() for value in values)
        raise BuildError(f"expected sizes that CUDA kernels serve together, got {widths}: {error}") from error


def _listed(
    archs: Sequence[str], dims: Mapping[str, Dim], chosen: Callable[..., Any]
) -> list[tuple[str, dict[str, list[Kernel]]]]:
    """The kernels of every operator for each architecture, and for the PTX that drivers compile."""
    return [
        (arch, {op: list(make(arch, dims, functools.partial(chosen, arch, op))) for op, make in OPERATORS.items()})
        for arch in (*archs, ANY_GPU)
    ]


def generate(archs: Sequence[str], dims: Mapping[str, Dim], chosen: Callable[..., Any] = _hand_made) -> list[KernelSet]:
    """The kernel sets for `archs`, with the served values of `dims`.

    Parameters
    ----------
    archs : sequence of str
    dims : mapping
    chosen : callable
        Takes an architecture, an operator and the arguments of a `kernels.Chosen`, and returns decisions.
    """
    sets: list[tuple[dict[str, list[Kernel]], list[str]]] = []
    for arch, kernels in _listed(archs, dims, chosen):
        same = next((names for known, names in sets if known == kernels), None)
        if same is None:
            sets.append((kernels, [arch]))
        else:
            same.append(arch)
    # Sets share most of their kernels.
    jobs = {
        (kernel.symbol(op), kernel.decisions, kernel.product): (kernel.symbol(op), kernel.make)
        for kernels, _ in sets
        for op, listed in kernels.items()
        for kernel in listed
    }
    texts = cuda_text.definitions(jobs)
    # PTX for the oldest architecture: later GPUs have everything that it asks for.
    ptx = f"compute_{number_of(archs[0])}"
    return [
        KernelSet(
            tuple(name for name in names if name != ANY_GPU),
            ptx if ANY_GPU in names else None,
            tuple(
                Unit(op, tuple(_function(k, texts[k.symbol(op), k.decisions, k.product]) for k in listed))
                for op, listed in kernels.items()
            ),
        )
        for kernels, names in sets
    ]


def _function(kernel: Kernel, definition: str) -> Function:
    match = _SIGNATURE.search(definition)
    assert match, definition[:200]
    threads, symbol, listed = match.groups()
    return Function(symbol, kernel, int(threads), _parameters(listed), definition)


def make_unit(op: str, kernels: Iterable[Kernel]) -> Unit:
    """A unit of some kernels of one operator."""
    return Unit(op, tuple(_function(k, device_code(k.symbol(op), k.make())) for k in kernels))


def _parameters(listed: str) -> tuple[tuple[str, str], ...]:
    parameters = []
    for text in listed.replace("__restrict__", "").split(","):
        kind, name = text.rsplit(maxsplit=1)
        if "CUtensorMap" in kind:
            parameters.append((TENSOR_MAP, name))
        else:
            parameters.append(("const void *" if "*" in kind else f"{_C_TYPES[kind.strip()]} ", name))
    return tuple(parameters)


def compile_sets(
    sets: Sequence[KernelSet], directory: Path, nvcc: str, progress: Callable[[str], None]
) -> tuple[dict[tuple[int, str], Path], list[str]]:
    """Compile all units, as many at a time as there are CPUs.

    Parameters
    ----------
    sets : sequence of KernelSet
    directory : Path
        Receives the fatbins.
    nvcc : str
    progress : callable
        Takes a line of text.

    Returns
    -------
    fatbins : dict
        The file by number of the set and operator.
    said : list of str
        What the assembler said about the kernels of each unit.

    Raises
    ------
    BuildError
        nvcc fails.
    """
    jobs = [(i, unit) for i, kernels in enumerate(sets) for unit in kernels.units]
    targets = ", ".join(name for kernels in sets for name in kernels.targets)
    progress(f"compiling {sum(len(unit.functions) for _, unit in jobs)} CUDA kernels for {targets}")

    def run(job: tuple[int, Unit]) -> tuple[Path, str]:
        i, unit = job
        return compile_unit(unit, sets[i].targets, directory / f"{unit.op}_{i}.fatbin", nvcc)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        results = list(pool.map(run, jobs))
    paths = {(i, unit.op): path for (i, unit), (path, _) in zip(jobs, results, strict=True)}
    return paths, [said for _, said in results]


def compile_unit(unit: Unit, targets: Iterable[str], fatbin: Path, nvcc: str = "nvcc") -> tuple[Path, str]:
    """Compile one unit for `targets` into `fatbin`. Returns the file and what the assembler said about each kernel.

    Raises
    ------
    BuildError
        nvcc fails, or gives a kernel fewer registers than its warpgroups wait for.
    """
    source, work = fatbin.with_suffix(".cu"), fatbin.parent
    source.write_text(unit.text)
    # nvcc passes paths to a shell unquoted, and the folder of a checkout may have any name.
    with contextlib.suppress(FileExistsError):
        (work / "headers").symlink_to(DEVICE_HEADERS)
    code = [word for t in targets for word in ("-gencode", f"arch=compute_{t.partition('_')[2]},code={t}")]
    said = link.run([nvcc, *_FLAGS, *code, "-fatbin", "-o", fatbin.name, source.name], directory=work)
    report.expect_registers(said, unit)
    return fatbin, said
