"""The C files around the compiled kernels, and the C compiler that links them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import BuildError
from ..runtime import package_files
from ..runtime.library import LIBRARY_NAME

#: What runs a checked call.
CORE = (
    *("common/check.c", "common/device.c", "common/error.c"),
    *("cpu/cpus.c", "cpu/kernels.c", "cpu/operators.c", "cpu/rows.c", "cpu/stages.c", "cpu/threads.c"),
)
DOOR = ("common/api.c", "common/choose.c")
_ORT = ("ort/kernel.c", "ort/register.c", "ort/schema.c")
CUDA = tuple(f"cuda/{name}.c" for name in ("driver", "kernels", "operators", "pool", "stages", "workspace"))
#: specs.c and table.c are generated into the working directory, and cuda_table.c where there are CUDA kernels.
GENERATED = ("specs.c", "table.c")
_GENERATED_CUDA = "cuda_table.c"
#: What a build for debugging can have the C files watch, by the name that users give it. The kernels are not watched.
SANITIZERS: Mapping[str, tuple[str, ...]] = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"),
    "thread": ("-fsanitize=thread", "-fno-omit-frame-pointer", "-g"),
}
_FLAGS = ("-std=gnu11", "-g0", "-Wall", "-Wextra", "-Werror=implicit-function-declaration")


def export_directory() -> Path:
    """Where the C files are."""
    return package_files.find("export/c")


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
    """Of the CUDA toolkit that it is of: (13, 0). Raises `BuildError` where it says none."""
    said = run([nvcc, "--version"])
    found = re.search(r"\brelease (\d+)\.(\d+)", said)
    if not found:
        raise BuildError(f"nvcc: expected {nvcc} --version to tell its release, got {said!r}")
    return int(found[1]), int(found[2])


def run(command: Sequence[str], text: str | None = None, directory: Path | None = None) -> str:
    """Run a compiler, on `text` perhaps, and tell what it said. Raises `BuildError` with its own words."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=directory)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def flags(work: Path) -> list[str]:
    """How every C file is compiled, except for which machine and how well; `work` holds specs.h."""
    export = export_directory()
    includes = (str(work), str(export / "src"), str(export / "include"))
    return [*_FLAGS, "-fPIC", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]


def compile_object(files: Iterable[Path], out: Path, work: Path, cc: str, *options: str) -> None:
    """Compile C files to one object: files of different folders may have one name, so that their objects collide.

    Parameters
    ----------
    files : iterable of Path
    out : Path
    work : Path
        Holds specs.h.
    cc : str
    *options : str
        More for the compiler.
    """
    run([cc, "-O2", *flags(work), *options, "-r", "-nostdlib", *map(str, files), "-o", str(out)])


def version_script(name: str) -> list[str]:
    """How a library exports nothing but what a file of the export directory lists."""
    # -Wl, would cut the path at its commas.
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
        Holds the generated files. Those of `cuda_table` make it a library with CUDA kernels.
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
    # A sanitizer's runtime may be the program's, and is then not linked with a library.
    watched = SANITIZERS[sanitizer] if sanitizer else ("-Wl,-z,defs",)
    inputs = [export / "src" / name for name in sources]
    inputs += [work / name for name in (*GENERATED, *([_GENERATED_CUDA] if cuda else []))]
    # ONNX Runtime unloads the library with the last SessionOptions, while our threads still sleep in its code. With
    # nodelete it stays. Without it, each load and unload would also leave some memory behind.
    options = ("-Wl,-z,nodelete", f"-Wl,-soname,{LIBRARY_NAME}", *watched, *(["-ldl"] if cuda else []))
    link_shared(map(str, [*inputs, *objects]), library, work, cc, "exports.map", *options)
    return library
