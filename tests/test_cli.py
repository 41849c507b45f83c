"""The command's reports and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dsa_tvm
from dsa_tvm import env


def cli(*arguments, **kwargs):
    return subprocess.run([sys.executable, "-m", "dsa_tvm.cli", *arguments], capture_output=True, text=True, **kwargs)


def test_env():
    text, document = cli("env"), cli("env", "--json")
    report = json.loads(document.stdout)
    assert report["library"]["target in use"] == dsa_tvm.active_target()
    assert report["packages"]["numpy"] and "target in use: " in text.stdout


def test_env_needs_the_standard_library_only():
    """Isolated from site-packages, and with a library that is not there: values, not exceptions."""
    package = Path(dsa_tvm.__file__).parent.parent
    code = f"import sys; sys.path.append({str(package)!r}); from dsa_tvm import env; print(env.report()['library'])"
    done = cli_code(code, DSA_TVM_LIBRARY="/nowhere/libdsa_tvm.so")
    assert done.stdout.startswith("failed: "), done.stderr


def cli_code(code, **environment):
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, env=environment)


def test_env_never_raises(monkeypatch):
    def broken():
        raise OSError("no /proc here")

    monkeypatch.setattr(env, "_cpu", broken)
    assert env.report()["cpu"] == "failed: OSError: no /proc here"


def test_config():
    paths = [Path(line) for line in cli("config", "--cmakedir", "--includedir", "--library").stdout.split()]
    assert (paths[0] / "dsa_tvm-config.cmake").is_file()
    assert (paths[1] / "dsa_tvm" / "dsa_tvm.h").is_file() and paths[2].is_file()
    assert cli("config", "--libs").stdout.split()[-1] == "-ldsa_tvm"


def test_usage():
    assert cli().returncode == 2 and "COMMAND" in cli().stderr
    assert cli("--version").stdout.split() == ["dsa-tvm", dsa_tvm.__version__]


def test_errors_are_one_line():
    done = cli("env", "--nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr
