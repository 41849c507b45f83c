"""Stands in for nvcc. Its fatbins are emulators, which tests/emulator/driver.h loads in place of the CUDA driver."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import sys
import tempfile
from pathlib import Path

from dsa_tvm.schedules.cuda.source import DEVICE_HEADERS
from emulator import Emulator


def install(directory: Path) -> Path:
    """Write the command to `directory`, where it keeps its emulators. Equal code is compiled once."""
    command, program = directory / "nvcc", directory / "nvcc.py"
    here = Path(__file__).parent
    path = [str(here), str(here.parent)]
    program.write_text(
        "import sys\n"
        "if sys.argv[1:] == ['--version']:\n    sys.exit(print('release 13.0, V13.0.88'))\n"
        f"sys.path[:0] = {path!r}\nimport emulated_nvcc\nemulated_nvcc.main({str(directory)!r})\n"
    )
    # A script's first line cannot name an interpreter in a folder with a space.
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(program))} "$@"\n')
    command.chmod(0o755)
    return command


def emulator(text: str, directory: Path) -> Path:
    """The library that emulates the kernels of a CUDA text."""
    home = directory / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not home.exists():
        work = Path(tempfile.mkdtemp(dir=directory))
        Emulator(text, DEVICE_HEADERS, work)
        with contextlib.suppress(OSError):  # another process was faster
            work.rename(home)
    return home / "libcuda.so.1"


def main(directory: str) -> None:
    """Do what ``nvcc ... -o FATBIN SOURCE`` does."""
    arguments = sys.argv[1:]
    fatbin = arguments[arguments.index("-o") + 1]
    home = emulator(Path(arguments[-1]).read_text(), Path(directory))
    Path(fatbin).write_bytes(b"emulator:" + bytes(home) + b"\0")
