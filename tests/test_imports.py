"""Imports point one way, and `import dsa_tvm` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dsa_tvm

PACKAGE = Path(dsa_tvm.__file__).parent

#: What each part of the package may import of the others, directly, anywhere in its code.
ALLOWED = {
    "errors": set(),
    "extras": {"errors"},
    "files": set(),
    "machine": set(),
    "streams": set(),
    "spec": {"errors"},
    "ops": {"packing", "spec"},
    "schedules": {"gpu_archs", "ops", "spec"},
    "dlpack": set(),
    "tensors": {"dlpack", "errors", "spec"},
    "packing": {"element_types", "errors", "tensors"},
    "hostile": {"packing", "spec", "workload"},
    "forks": set(),
    "loading": {"errors"},
    "package_files": set(),
    "integers": {"errors"},
    "library": {"errors", "forks", "integers", "loading", "ops", "package_files", "verified"},
    "verified": set(),
    "calls": {"dlpack", "errors", "forks", "integers", "library", "spec", "tensors"},
    "functions": {"calls", "ops", "tensors"},
    "torch_ops": {"calls", "errors", "ops", "spec"},
    "export": {"element_types", "errors", "library", "ops", "packing", "spec", "torch_ops"},
    "models": {"errors", "spec", "torch_ops"},
    "presets": {"errors"},
    "gpu_archs": set(),
    "element_types": set(),
    "cuda_driver": {"errors"},
    "records": {"errors", "files", "gpu_archs", "ops", "presets", "report", "spec"},
    "compiler": {
        "errors",
        "files",
        "gpu_archs",
        "library",
        "machine",
        "ops",
        "presets",
        "records",
        "schedules",
        "spec",
    },
    "build": {"compiler", "errors", "extras", "files", "library", "machine", "presets", "records", "spec"},
    "tuning": {
        *("calls", "compiler", "cuda_driver", "dlpack", "element_types", "env", "errors", "extras", "files", "gate"),
        *(
            "gpu_archs",
            "library",
            "machine",
            "ops",
            "presets",
            "progress",
            "records",
            "report",
            "schedules",
            "spec",
            "tensors",
            "workload",
        ),
    },
    "env": {"library", "machine"},
}
#: Free to import anything; nothing imports them.
TOPS = {"bench", "cli", "demo", "gpu_bench"}
#: Serve the commands.
SHARED = {
    *("figures", "gate", "peers", "progress", "prompt", "report", "workload"),
    *("gpu_check", "gpu_device", "gpu_peers", "gpu_torch", "gpu_workload"),
}


def parts():
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part not in ("__init__", "tuning_logs"):
            yield part, path


def imported(path):
    """First names below the package that a file imports, wherever in it."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [a.name for a in node.names]


@pytest.mark.parametrize(("part", "path"), list(parts()), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_direction(part, path):
    found = {name for name in imported(path) if name != "__version__"}
    if part in TOPS:
        return
    if part in SHARED:
        assert not found & TOPS
        return
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    assert found - {part} <= ALLOWED[part]


@pytest.mark.parametrize("module", ["dsa_tvm", "dsa_tvm.cli", "dsa_tvm.functions", "dsa_tvm.export", "dsa_tvm.env"])
def test_light(module):
    heavy = '{"tvm", "torch", "onnxruntime", "tvm_ffi"}'
    use = "dsa_tvm.cli._parser()" if module == "dsa_tvm.cli" else "0"
    code = f"import sys, {module}; {use}; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_measuring_on_a_gpu_takes_no_compiler():
    """Nor torch: the machine with the GPU has NumPy and the driver."""
    heavy = '{"tvm", "torch", "onnxruntime", "tvm_ffi", "ml_dtypes", "xgboost"}'
    modules = ", ".join(f"dsa_tvm.tuning.{name}" for name in ("command", "cuda_command", "cuda_measure", "worker"))
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_stay_short():
    long = {str(path.relative_to(PACKAGE)): n for _, path in parts() if (n := len(path.read_text().splitlines())) > 400}
    assert not long
