"""The C files around the compiled kernels, and the C compiler that links everything."""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import BuildError
from ..runtime import package_files
from ..runtime.library import LIBRARY_NAME

#: The files that check and run a call.
CORE = (
    *("common/check.c", "common/device.c", "common/error.c"),
    *("cpu/ceilings.c", "cpu/cpus.c", "cpu/kernels.c", "cpu/operators.c", "cpu/rows.c", "cpu/runs.c", "cpu/stages.c"),
    "cpu/threads.c",
)
DOOR = ("common/api.c", "common/choose.c", "python/objects.c")
_ORT = ("ort/kernel.c", "ort/register.c", "ort/schema.c")
CUDA = tuple(f"cuda/{name}.c" for name in ("driver", "kernels", "operators", "pool", "stages", "workspace"))
#: specs.c and table.c are generated into the working directory, and cuda_table.c if there are CUDA kernels.
GENERATED = ("specs.c", "table.c")
_GENERATED_CUDA = "cuda_table.c"
#: Compiler options by the user's name for a sanitizer. It watches the C files of a debugging build, not the kernels.
SANITIZERS: Mapping[str, tuple[str, ...]] = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"),
    "thread": ("-fsanitize=thread", "-fno-omit-frame-pointer", "-g"),
}
_FLAGS = ("-std=gnu11", "-g0", "-Wall", "-Wextra", "-Werror=implicit-function-declaration")


def export_directory() -> Path:
    """Where the C files are."""
    return package_files.find("export/c")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options ``--cc`` and ``--nvcc`` of commands that compile."""
    parser.add_argument(
        "--cc", default=os.environ.get("CC", "cc"), help="C compiler for the target (default: $CC or cc)"
    )
    parser.add_argument(
        "--nvcc", default=os.environ.get("CUDACXX", "nvcc"), help="CUDA compiler (default: $CUDACXX or nvcc)"
    )


def expect_compiler(cc: str) -> None:
    """Raise `BuildError` unless `cc` is on PATH."""
    if not shutil.which(cc):
        raise BuildError(f"cc: expected a C compiler, got {cc}, which is not on PATH")


def expect_nvcc(nvcc: str) -> None:
    """Raise `BuildError` unless `nvcc` is on PATH."""
    if not shutil.which(nvcc):
        raise BuildError(
            f"nvcc: expected NVIDIA's CUDA compiler, got {nvcc}, which is not on PATH; install the CUDA toolkit (12.8 "
            "or later has all architectures; no GPU is needed), or name its nvcc with --nvcc"
        )


@functools.cache
def nvcc_version(nvcc: str) -> tuple[int, int]:
    """Version of nvcc's CUDA toolkit, such as (13, 0). Raises `BuildError` if nvcc does not tell it."""
    said = run([nvcc, "--version"])
    found = re.search(r"\brelease (\d+)\.(\d+)", said)
    if not found:
        raise BuildError(f"nvcc: expected {nvcc} --version to name its release, got {said!r}")
    return int(found[1]), int(found[2])


def run(command: Sequence[str], text: str | None = None, directory: Path | None = None) -> str:
    """Run a compiler, with `text` as input if given, and return its output. Raises `BuildError` with its messages."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=directory)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def flags(work: Path) -> list[str]:
    """Options for every C file, without machine and optimization level; `work` holds specs.h."""
    export = export_directory()
    includes = (str(work), str(export / "src"), str(export / "include"))
    return [*_FLAGS, "-fPIC", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]


def compile_object(files: Iterable[Path], out: Path, work: Path, cc: str, *options: str) -> None:
    """Compile C files to one object. Separate objects would collide: files in different folders have equal names.

    Parameters
    ----------
    files : iterable of Path
    out : Path
    work : Path
        Holds specs.h.
    cc : str
    *options : str
        More options for the compiler.
    """
    run([cc, "-O2", *flags(work), *options, "-r", "-nostdlib", *map(str, files), "-o", str(out)])


def version_script(name: str) -> list[str]:
    """Linker options with which a library exports only what a file in the export directory lists."""
    # -Wl would split the path at commas.
    return ["-Xlinker", f"--version-script={export_directory() / name}"]


def link_shared(
    inputs: Iterable[str], out: Path, work: Path, cc: str, script: str, *options: str, text: str | None = None
) -> None:
    """Link C files and objects to a shared library.

    Parameters
    ----------
    inputs : iterable of str
        Files, and options that belong between them.
    out : Path
    work : Path
        Holds specs.h.
    cc : str
    script : str
        The version script of the export directory that lists what the library exports.
    *options : str
        More for the compiler and linker, after the inputs.
    text : str, optional
        Standard input of the compiler.
    """
    run(
        [
            *(cc, "-O2", *flags(work), "-shared", *inputs, "-Wl,-z,noexecstack", *version_script(script)),
            *(*options, "-lm", "-lpthread", "-o", str(out)),
        ],
        text,
    )


def link_library(objects: Iterable[Path], work: Path, cc: str, sanitizer: str | None = None) -> Path:
    """Compile the C files and link them with compiled kernels.

    Parameters
    ----------
    objects : iterable of Path
    work : Path
        Holds the generated files. With those of `cuda.table` the library gets CUDA kernels.
    cc : str
    sanitizer : str, optional
        One of `SANITIZERS`.

    Returns
    -------
    Path
        The library, in `work`.
    """
    export = export_directory()
    library = work / LIBRARY_NAME
    cuda = (work / _GENERATED_CUDA).exists()
    sources = (*CORE, *DOOR, *_ORT, *(CUDA if cuda else ("cuda/none.c",)))
    # With a sanitizer, symbols may stay undefined: its runtime may come from the program.
    watched = SANITIZERS[sanitizer] if sanitizer else ("-Wl,-z,defs",)
    inputs = [export / "src" / name for name in sources]
    inputs += [work / name for name in (*GENERATED, *([_GENERATED_CUDA] if cuda else []))]
    # ONNX Runtime unloads the library with the last SessionOptions, while our threads still sleep in its code. With
    # nodelete it stays. Without it, each load and unload would also leave some memory behind.
    options = ("-Wl,-z,nodelete", f"-Wl,-soname,{LIBRARY_NAME}", *watched, *(["-ldl"] if cuda else []))
    link_shared(map(str, [*inputs, *objects]), library, work, cc, "exports.map", *options)
    return library
