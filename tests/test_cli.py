"""The command's reports and refusals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
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
    paths = [Path(line) for line in cli("config", "--cmakedir", "--includedir", "--library").stdout.splitlines()]
    assert (paths[0] / "dsa_tvm-config.cmake").is_file()
    assert (paths[1] / "dsa_tvm" / "dsa_tvm.h").is_file() and paths[2].is_file()
    assert cli("config", "--libs").stdout.split()[-2:] == ["-ldsa_tvm", "-lm"]


def test_config_quotes_flags_for_a_shell(tmp_path):
    """Paths are as they are. A comma would be cut by -Wl, and a relative path means another folder to the linker."""
    lib = tmp_path / "a b's, c"
    lib.mkdir()
    shutil.copy(dsa_tvm.get_library_path(), lib)
    answers = {}
    for path in (lib / "libdsa_tvm.so", Path(lib.name, "libdsa_tvm.so")):
        environment = os.environ | {"DSA_TVM_LIBRARY": str(path), "PYTHONSAFEPATH": "1"}
        done = cli("config", "--libdir", "--libs", env=environment, cwd=tmp_path)
        libdir, libs = done.stdout.splitlines()
        assert libdir == str(lib)
        assert shlex.split(libs) == [f"-L{lib}", "-Wl,-rpath", "-Xlinker", str(lib), "-ldsa_tvm", "-lm"]
        answers[path] = done.stdout
    assert len(set(answers.values())) == 1


def test_config_says_what_is_missing(tmp_path):
    done = cli("config", "--library", env=os.environ | {"DSA_TVM_LIBRARY": str(tmp_path / "nowhere.so")})
    assert done.returncode == 1 and "config: expected" in done.stderr and not done.stdout


def test_usage():
    assert cli().returncode == 2 and "COMMAND" in cli().stderr
    assert cli("--version").stdout.split() == ["dsa-tvm", dsa_tvm.__version__]


def test_errors_are_one_line():
    done = cli("env", "--nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr
