"""Builds and uses the package in folders as real users have, and after unusual ways to install it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import snippets

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "tests" / "c" / "embed.c"
#: Names that break shells, -Wl of C compilers, Python strings, CMake patterns and ASCII.
FOLDER = "a user's, söme [1] clone"


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=1800, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def copy_of_the_checkout(directory):
    shutil.copytree(ROOT, directory, ignore=snippets.ignored(ROOT, "tests"))
    return directory


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The folder of a checkout in which the first command of README was run."""
    directory = copy_of_the_checkout(tmp_path_factory.mktemp("install") / FOLDER)
    (command,) = (s.text for s in snippets.snippets(ROOT / "README.md") if "dsa-tvm demo" in s.text)
    said = run("bash", "-euo", "pipefail", "-c", command, cwd=directory)
    assert "all checks passed" in said
    return directory


def command_line(clone, *arguments):
    return run(clone / ".venv" / "bin" / "dsa-tvm", *arguments, cwd=clone.parent).rstrip("\n")


def check(program):
    assert run(program, env={"OMP_NUM_THREADS": "2"}).splitlines()[-1] == "ok"


def compile_with(flags, directory):
    """Compile a C program as in README."""
    shutil.copy(PROGRAM, directory / "embed.c")
    run("bash", "-c", 'eval "cc embed.c $1 -o embed"', "", flags, cwd=directory)
    check(directory / "embed")


def test_config_prints_what_is_there(clone):
    for flag in ("cmakedir", "includedir", "libdir", "library"):
        path = command_line(clone, "config", f"--{flag}")
        assert FOLDER in path and os.path.exists(path)


def test_a_c_program(clone, tmp_path):
    flags = f"{command_line(clone, 'config', '--cflags')} {command_line(clone, 'config', '--libs')}"
    compile_with(flags, tmp_path)


def test_a_cmake_project(clone, tmp_path):
    source = tmp_path / FOLDER
    source.mkdir()
    shutil.copy(PROGRAM, source / "embed.c")
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(embed C)\nfind_package(dsa_tvm REQUIRED)\n"
        "add_executable(embed embed.c)\ntarget_link_libraries(embed dsa_tvm::dsa_tvm)\n"
    )
    cmake = [sys.executable, "-m", "cmake"]
    run(*cmake, "-S", source, "-B", source / "build", f"-Ddsa_tvm_DIR={command_line(clone, 'config', '--cmakedir')}")
    run(*cmake, "--build", source / "build")
    check(source / "build" / "embed")


def test_pkg_config(clone, tmp_path):
    """Spaces and commas work. A quotation mark, which pkg-config cannot read, is an error."""
    done = subprocess.run(
        [clone / ".venv" / "bin" / "dsa-tvm", "config", "--pkgconfigdir"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "use --cflags and --libs instead" in done.stderr
    moved = tmp_path / "a prefix, with söme"
    shutil.copytree(Path(command_line(clone, "config", "--libdir")).parent, moved)
    environment = os.environ | {"PKG_CONFIG_PATH": str(moved / "lib" / "pkgconfig")}
    flags = run(sys.executable, "-m", "pkgconf", "--cflags", "--libs", "dsa_tvm", env=environment).strip()
    compile_with(flags, tmp_path)


def test_a_library_is_built_there(clone, tmp_path):
    """Uses the compiler of this environment, because the first command installs none."""
    package = clone / ".venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    out = tmp_path / FOLDER
    code = f"import sys; sys.path.insert(0, {str(package)!r}); from dsa_tvm.cli import main; sys.exit(main())"
    temporary = tmp_path / f'{FOLDER} "t" \\'
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary)}
    run(sys.executable, "-c", code, "build", "--target", "x86-64-v2", "--out", out, env=environment)
    use = f"import sys; sys.path.insert(0, {str(package)!r}); import dsa_tvm; print(dsa_tvm.active_target())"
    assert (package / "dsa_tvm" / "__init__.py").exists()
    said = run(sys.executable, "-c", use, env=os.environ | {"DSA_TVM_LIBRARY": str(out / "libdsa_tvm.so")})
    assert said.split() == ["x86-64-v2"]


@pytest.fixture(scope="module")
def editable(clone):
    """The same environment after ``pip install -e .``, which replaces the first installation."""
    run(clone / ".venv" / "bin" / "pip", "install", "-e", ".", cwd=clone)
    return clone


def test_editable_finds_its_files(editable):
    for flag in ("cmakedir", "includedir", "libdir", "library"):
        path = command_line(editable, "config", f"--{flag}")
        assert FOLDER in path and os.path.exists(path)
    assert "target in use: x86-64" in command_line(editable, "env")
    assert "0 damaged" in command_line(editable, "records", "verify")


@pytest.mark.parametrize("folder", [".", "schedules"])
def test_editable_computes(editable, folder):
    """It also works in the checkout, where the sources would hide a usual installation."""
    code = (
        "import numpy as np, dsa_tvm, dsa_tvm.export; n = np.array([5], np.int32)\n"
        "print(dsa_tvm.__file__, dsa_tvm.topk(np.arange(5, dtype=np.float32)[None], n * 0, n, 2).tolist())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    said = run(editable / ".venv" / "bin" / "python", "-c", code, cwd=editable / folder, env=environment)
    assert said.strip() == f"{editable / 'dsa_tvm' / '__init__.py'} [[3, 4]]"


def test_editable_serves_c(editable, tmp_path):
    test_a_c_program(editable, tmp_path)


def test_editable_builds(editable):
    """A build uses the C files of the checkout."""
    code = "from dsa_tvm.build import link; print(link.export_directory() / 'src' / 'common' / 'api.c')"
    path = run(editable / ".venv" / "bin" / "python", "-c", code, cwd=editable.parent).strip()
    assert path == str(editable / "export" / "c" / "src" / "common" / "api.c") and os.path.exists(path)
