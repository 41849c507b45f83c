"""A library with CUDA kernels. The drivers of the tests do not read its fatbins, so no nvcc is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from dsa_tvm.schedules.cuda.source import DEVICE_HEADERS, translation_unit
from emulator import Emulator

import dsa_tvm.build.command
from dsa_tvm.build.cuda import fatbins

HERE = Path(__file__).parent

_NVCC = """#!/bin/sh
[ "$1" = --version ] && echo 'release 13.0, V13.0.88' && exit
while [ "$1" != -o ]; do shift; done
printf 'fatbin' > "$2"
"""


def fake_nvcc(directory: Path) -> str:
    """Write a command to `directory` that makes fatbins without code."""
    fake = directory / "nvcc"
    fake.write_text(_NVCC)
    fake.chmod(0o755)
    return str(fake)


def build(directory: Path, sets: Sequence[fatbins.KernelSet]) -> Path:
    """A library with this machine's CPU kernels and `sets`, whose machine code is left out without nvcc."""
    nvcc = shutil.which("nvcc") or fake_nvcc(directory)
    targets = (dsa_tvm.active_target(), "cuda")
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise the build would make them again.
        patch.setattr(fatbins, "generate", lambda *described: sets)
        return dsa_tvm.build.command.build(directory, targets=targets, version=dsa_tvm.__version__, nvcc=nvcc)


def emulator(kernels: fatbins.KernelSet, lengths: Mapping[str, int], directory: Path) -> Path:
    """The directory of a driver that runs the kernels for these lengths, and none for others."""
    functions = [
        f
        for unit in kernels.units
        for f in unit.functions
        if all(lengths.get(name, length) == length for name, length in f.kernel.sizes.items())
    ]
    Emulator(translation_unit(f.definition for f in functions), DEVICE_HEADERS, directory)
    return directory


def build_driver(directory: Path, *flags: str) -> Path:
    """The directory of a driver that records its calls."""
    driver = directory / "libcuda.so.1"
    source = str(HERE.parent / "c" / "cuda_driver.c")
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags, source]
    subprocess.run([*command, "-o", str(driver)], check=True)
    return directory


def environment(path: Path, driver: Path, **variables: str) -> Mapping[str, str]:
    """The environment of a process that uses the library at `path` and the driver in the directory `driver`."""
    here = {"DSA_TVM_LIBRARY": str(path), "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(HERE)}
    inherited = os.environ.get("PYTHONPATH")
    if inherited:
        here["PYTHONPATH"] += os.pathsep + inherited
    return os.environ | here | variables


def python(code: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `code` in a child process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
