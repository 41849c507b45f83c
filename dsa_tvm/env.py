"""A description of the environment for bug reports. What cannot be read is reported as a failure, not raised."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .runtime import machine

_PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "apache-tvm", "apache-tvm-ffi", "ml_dtypes", "xgboost")
_VARIABLES = ("DSA_TVM_LIBRARY", "DSA_TVM_TARGET", "OMP_NUM_THREADS", "TVM_NUM_THREADS")
_FEATURES = (
    *("sse4_2", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
_CPUINFO = Path("/proc/cpuinfo")
_BOARDS = (Path("/proc/device-tree/model"), Path("/sys/devices/virtual/dmi/id/product_name"))
_TOOLS = ("cc", "cmake", "nvcc", "nvidia-smi")


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def cpu_model() -> str:
    """The name of the processor."""
    return str(_cpu()["model"])


def _cpu() -> dict[str, Any]:
    # Keep every value of a field: a machine may have cores of two kinds.
    fields: dict[str, dict[str, None]] = {}
    with open(_CPUINFO, encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), {})[value.strip()] = None
    flags = next(iter(fields.get("flags", fields.get("Features", {"": None})))).split()
    return {"model": _model(fields), "features": [f for f in _FEATURES if f in flags]}


def _model(fields: dict[str, dict[str, None]]) -> str:
    """A name that tells this kind of CPU from others.

    Parameters
    ----------
    fields : dict
        The values of each field of ``/proc/cpuinfo``, without repetition and in order.
    """
    for name in ("model name", "cpu model", "uarch", "cpu"):  # x86 and some arm; mips; riscv; ppc
        if values := [value for value in fields.get(name, {}) if value]:
            return " + ".join(values)
    # The registers that identify an arm core. https://docs.kernel.org/arch/arm64/cpu-feature-registers.html
    names = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    if known := [f"{name.removeprefix('CPU ')} {'/'.join(fields[name])}" for name in names if name in fields]:
        return ", ".join([f"{platform.machine()} CPU", *known, *_board()])
    return ", ".join([f"unknown {platform.machine()} CPU", *(_board() or [f"host {platform.node()}"])])


def _board() -> list[str]:
    """The model of the machine, if its firmware tells."""
    for path in _BOARDS:
        try:
            name = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # A record's machine is printable, and the device tree ends its strings with a zero.
        if name := "".join(c for c in name if c.isprintable()).strip():
            return [name]
    return []


def _memory() -> str:
    with open("/proc/meminfo", encoding="utf-8") as file:
        return f"{int(file.readline().split()[1]) / 2**20:.1f} GiB, {machine.memory()} left"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    lines = done.stdout.strip().splitlines()
    # nvcc prints its release at the end, the others print theirs at the start.
    return (lines[-1] if name == "nvcc" else lines[0]) if lines else f"exit status {done.returncode}"


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip().splitlines()


def _library() -> dict[str, Any]:
    from .runtime import library

    path = library.default_path()
    manifest = library.verify(path)
    return {
        "path": str(path),
        "version": manifest["version"],
        "tvm": manifest["tvm"],
        "targets": manifest["targets"],
        "target in use": _attempt(library.active_target),
        "threads": _attempt(library.get_num_threads),
    }


def report() -> dict[str, Any]:
    """Everything a bug report needs, as plain values.

    Returns
    -------
    dict
        What cannot be read has the value ``"failed: ..."``; nothing is raised.
    """
    from . import __version__

    return {
        "dsa_tvm": __version__,
        "library": _attempt(_library),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "cpu": _attempt(_cpu),
        "cpus usable": _attempt(machine.usable_cpus),
        "memory": _attempt(_memory),
        "gpus": _attempt(_gpus),
        "packages": {p: _attempt(functools.partial(_version, p)) for p in _PACKAGES},
        "tools": {t: _attempt(functools.partial(_tool, t)) for t in _TOOLS},
        "variables": {v: os.environ[v] for v in _VARIABLES if v in os.environ},
    }


def lines(values: dict[str, Any], indent: int = 0) -> list[str]:
    """`report` as indented text."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += [" " * indent + f"{key}:", *lines(value, indent + 2)]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            found.append(" " * indent + f"{key}: {'none' if text is None or text == '' else text}")
    return found
