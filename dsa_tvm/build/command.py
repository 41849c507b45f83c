"""``dsa-tvm build``: one library and its manifest from OpSpecs, targets and tuning records.

`pip install` runs this through CMake. It needs TVM and a C compiler; the library needs neither.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .. import presets, records
from ..errors import BuildError
from ..gpu.architectures import ANY_GPU
from ..runtime.files import expect_writable_directory, scratch, sha256, write_atomically
from ..runtime.library import ABI_VERSION, LIBRARY_NAME, MANIFEST_NAME, exported_symbols
from ..runtime.machine import in_units
from ..spec import DIMS, with_values
from ..terminal.extras import expect_installed, keep_tvm_from_torch
from . import kernel_table, link, spec_table
from .cuda import report

if TYPE_CHECKING:
    from .objects import Compiled

#: The default targets of a library, by machine.
DEFAULT_TARGETS = {
    "x86_64": (
        *("x86-64-v2", "x86-64-v3", "x86-64-v3-vnni"),
        *("x86-64-v4", "x86-64-v4-vnni", "x86-64-v4-bf16", "x86-64-v4-amx"),
    ),
    "aarch64": ("aarch64", "aarch64-dotprod", "aarch64-i8mm", "aarch64-bf16"),
}
#: The dimensions for which a library serves a list of values.
WIDTHS = tuple(name for name, dim in DIMS.items() if dim.values)
#: Space that a build needs in the directory for temporary files.
_SCRATCH_BYTES = 64 << 20
#: The value of ``--records`` that stands for no records at all.
NO_RECORDS = "none"


def build(
    out: Path,
    *,
    targets: Sequence[str] = (),
    served: Mapping[str, tuple[int, ...]] | None = None,
    logs: Path | None = None,
    preset: str = presets.DEFAULT,
    version: str,
    cc: str = "cc",
    archs: Sequence[str] = (),
    nvcc: str = "nvcc",
    sanitizer: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Build a library and its manifest into the directory `out`.

    Parameters
    ----------
    out : Path
        Receives ``libdsa_tvm.so`` and ``manifest.json``, each whole or not at all.
    targets : sequence of str
        CPU targets, by default those of this machine, and optionally ``cuda``.
    served : mapping, optional
        Values of d_idx, d_qk and d_v to serve in addition to the usual ones.
    logs : Path, optional
        Directory of tuning records. Without one, all decisions are DEFAULT.
    preset : str
        Model whose records count, and whose sizes are served.
    version : str
        Version of the package.
    cc : str
        C compiler, which may be a cross compiler.
    archs : sequence of str
        GPU architectures for the target ``cuda``; by default `schedules.CUDA_ARCHS`.
    nvcc : str
        CUDA compiler; only that target needs it.
    sanitizer : str, optional
        ``address`` (with undefined behaviour) or ``thread``: the C files report such errors when they run.
    progress : callable
        Takes a line of text for every step and for every record that is left out.

    Returns
    -------
    Path
        The library.

    Raises
    ------
    ArgumentError
        The preset is unknown.
    RecordError
        `logs` is not a directory.
    BuildError
        There is no C compiler or nvcc, a target or architecture is unknown, a size cannot be served, or a step failed.
    """
    link.expect_compiler(cc)
    with_cuda = ANY_GPU in targets
    if archs and not with_cuda:
        raise BuildError(f"arch: expected --target {ANY_GPU} beside it, got none")
    if with_cuda:
        link.expect_nvcc(nvcc)
    targets = tuple(t for t in targets if t != ANY_GPU) or DEFAULT_TARGETS.get(platform.machine(), ())
    if not targets:
        raise BuildError(f"target: expected one to be named, because there is no default for {platform.machine()}")
    model = presets.get(preset)
    try:
        dims = with_values(with_values(DIMS, served or {}), {name: (getattr(model, name),) for name in WIDTHS})
    except ValueError as error:
        raise BuildError(str(error)) from error
    measured, damage = records.read_directory(logs) if logs else ([], [])
    for line in damage:
        progress(f"leaving out {line}")
    try:
        expect_writable_directory(out)
    except OSError as error:
        raise BuildError(f"out: expected a directory to write to, got {error}") from error
    expect_installed("build", "build", "tvm")
    keep_tvm_from_torch()
    import tvm

    from . import objects, plan

    rows = plan.make(plan.with_bases(targets), measured, model, progress)
    if with_cuda:
        from .cuda import fatbins
        from .cuda import part as cuda_part
        from .cuda import plan as cuda_plan

        archs = fatbins.check_archs(archs)
        fatbins.expect_served(archs, dims, served or {})
    with _errors_of_files(), scratch() as work:
        if (free := shutil.disk_usage(work).free) < _SCRATCH_BYTES:
            # LLVM ends the process if it cannot write an object.
            got = f"{in_units(free)} in {work.parent}"
            raise BuildError(
                f"expected {in_units(_SCRATCH_BYTES)} for temporary files, got {got}; $TMPDIR names another"
            )
        built = objects.compile_objects(rows, work, progress)
        spec_table.write(work, dims, version)
        # The targets are named from the oldest to the newest; the library takes the first that runs.
        sets = [(target, objects.tables(target, built)) for target in reversed(built)]
        (work / "table.c").write_text(kernel_table.source(sets))
        in_cuda = None
        if with_cuda:
            chosen = cuda_plan.Plan(measured, model, progress)
            in_cuda = cuda_part.add(work, archs, dims, chosen, nvcc, progress)
        progress("linking")
        library = link.link_library([parts.object for parts in built.values()], work, cc, sanitizer)
        manifest = {
            "version": version,
            "abi": ABI_VERSION,
            "tvm": tvm.__version__,
            "targets": list(built),
            "kernels": {target: _kernels(parts) for target, parts in built.items()},
            "cuda": in_cuda,
            "served": {d.name: list(d.values) for d in dims.values() if d.values},
            "symbols": exported_symbols(),
            "size": library.stat().st_size,
            "sha256": sha256(library),
        }
        # The manifest goes last: a library without its own manifest is refused.
        write_atomically(out / LIBRARY_NAME, library.read_bytes(), 0o755)
        write_atomically(out / MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode())
    return out / LIBRARY_NAME


@contextmanager
def _errors_of_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(f"expected files that can be written, got {error}") from error


def _kernels(compiled: Compiled) -> dict[str, list[dict]]:
    """Which decisions serve which calls: the first row with a call's element types and at least its lengths takes it.

    A row lists its element types if those of its operator are compiled with different decisions.
    """
    tables: dict[str, list[dict]] = {}
    for op, rows in compiled.kernels.items():
        differ = len({tuple(row.symbols) for row in rows}) > 1
        tables[op] = [
            {"s_q": row.s_q, "s_kv": row.s_kv, "decisions": asdict(row.decisions)}
            | ({"types": [list(types) for types in row.symbols]} if differ else {})
            for row in rows
        ]
    return tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dsa-tvm build``."""
    parser.add_argument("--out", type=Path, required=True, help="directory for the library and its manifest")
    parser.add_argument("--target", action="append", default=[], help="CPU target, or cuda; may be given several times")
    parser.add_argument(
        "--arch", action="append", default=[], help="GPU architecture for --target cuda, such as sm_90 (default: all)"
    )
    parser.add_argument("--report", action="store_true", help="print the resources of every kernel in the library")
    parser.add_argument(
        "--sanitize",
        choices=list(link.SANITIZERS),
        help="build a library for debugging, whose C files a sanitizer of the compiler watches",
    )
    link.add_arguments(parser)
    parser.add_argument(
        "--records", metavar="DIR", help=f"tuning logs (default: the package's); {NO_RECORDS} for default decisions"
    )
    parser.add_argument(
        "--preset",
        default=presets.DEFAULT,
        help=f"model whose records count and whose sizes are served (default: {presets.DEFAULT})",
    )
    for name in WIDTHS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, action="append", default=[], help=f"also serve this {name}")


def run(args: argparse.Namespace, version: str) -> Path:
    """Run `build` with parsed options and print its steps."""
    logs = records.default_directory() if args.records is None else Path(args.records)
    library = build(
        args.out,
        targets=args.target,
        served={name: tuple(getattr(args, name)) for name in WIDTHS},
        logs=None if args.records == NO_RECORDS else logs,
        preset=args.preset,
        version=version,
        cc=args.cc,
        archs=args.arch,
        nvcc=args.nvcc,
        sanitizer=args.sanitize,
        progress=lambda line: print(f"dsa-tvm build: {line}", file=sys.stderr, flush=True),
    )
    if args.report:
        print("\n".join(report.lines(json.loads((args.out / MANIFEST_NAME).read_bytes()))))
    return library


def main() -> None:
    """Entry point of the package's own build, which passes the version."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--version", required=True)
    args = parser.parse_args()
    run(args, args.version)


if __name__ == "__main__":
    main()
