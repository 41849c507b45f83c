"""A library with CUDA kernels, without nvcc or a GPU: no driver of the tests looks into its fatbins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import dsa_tvm
from dsa_tvm import library

HERE = Path(__file__).parent

_NVCC = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
printf 'fatbin' > "$2"
"""


def build(directory: Path, *arguments: str) -> Path:
    """A library with this machine's CPU kernels and CUDA kernels that no GPU runs."""
    nvcc = directory / "nvcc"
    nvcc.write_text(_NVCC)
    nvcc.chmod(0o755)
    targets = ("--target", dsa_tvm.active_target(), "--target", "cuda")
    command = [sys.executable, "-m", "dsa_tvm.cli", "build", *targets, "--nvcc", str(nvcc), "--records", "none"]
    done = subprocess.run([*command, "--out", str(directory), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory / library.LIBRARY_NAME


def build_driver(directory: Path, *flags: str) -> Path:
    """The directory of a driver that writes down what it is asked for."""
    driver = directory / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags, str(HERE / "c" / "cuda_driver.c")]
    subprocess.run([*command, "-o", str(driver)], check=True)
    return directory


def environment(path: Path, driver: Path, **variables: str) -> Mapping[str, str]:
    """That of a process that uses the library at `path` and finds the driver in the directory `driver`."""
    here = {"DSA_TVM_LIBRARY": str(path), "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(HERE)}
    inherited = os.environ.get("PYTHONPATH")
    if inherited:
        here["PYTHONPATH"] += os.pathsep + inherited
    return os.environ | here | variables


def python(code: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
