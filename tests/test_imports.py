"""Imports point one way, and `import dsa_tvm` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dsa_tvm

PACKAGE = Path(dsa_tvm.__file__).parent

#: The other parts that each part of the package may import, anywhere in its code.
ALLOWED = {
    "errors": set(),
    "spec": {"errors"},
    "presets": {"errors"},
    "gpu": {"errors"},
    "terminal": {"errors"},
    "ops": {"spec"},
    "runtime": {"errors", "ops", "spec"},
    "functions": {"ops", "runtime"},
    "torch_ops": {"errors", "ops", "runtime", "spec"},
    "export": {"errors", "ops", "runtime", "spec", "torch_ops"},
    "models": {"errors", "export", "runtime", "spec", "terminal", "torch_ops"},
    "schedules": {"gpu", "ops", "spec"},
    "records": {"errors", "gpu", "ops", "presets", "runtime", "spec", "terminal"},
    "build": {"errors", "gpu", "ops", "presets", "records", "runtime", "schedules", "spec", "terminal"},
    "tuning": {
        *("benchmark", "build", "env", "errors", "gpu", "ops", "presets"),
        *("records", "runtime", "schedules", "spec", "terminal"),
    },
    "env": {"runtime"},
}
#: These may import anything. Only tuning imports one of them: it checks and times as the benchmark does.
TOPS = {"benchmark", "cli"}


def parts():
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part not in ("__init__", "tuning_logs"):
            yield part, path


def imported(path):
    """The parts of the package that a file imports anywhere."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [a.name for a in node.names]


@pytest.mark.parametrize(("part", "path"), list(parts()), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_direction(part, path):
    found = {name for name in imported(path) if name != "__version__"}
    if part in TOPS:
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
    """Neither TVM nor torch is needed: the machine with the GPU may only have NumPy and the driver."""
    heavy = '{"tvm", "torch", "onnxruntime", "tvm_ffi", "ml_dtypes", "xgboost"}'
    modules = ", ".join(f"dsa_tvm.tuning.{name}" for name in ("command", "gpu.command", "gpu.measure", "worker"))
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
