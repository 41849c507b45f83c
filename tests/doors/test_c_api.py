"""A C program built against the installed package, through CMake, pkg-config and `dsa-tvm config`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dsa_tvm
from dsa_tvm.spec import DLPACK_TYPES

PROGRAM = Path(__file__).parent.parent / "c" / "embed.c"
# These come from PyPI, so that every machine has them.
CMAKE = [sys.executable, "-m", "cmake"]
PKG_CONFIG = [sys.executable, "-m", "pkgconf"]


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def config(flag):
    return run(sys.executable, "-m", "dsa_tvm.cli", "config", flag)


def check(program):
    """Run a program in an empty environment, without Python and TVM."""
    output = run(program, env={"OMP_NUM_THREADS": "2"})
    assert output.splitlines()[-1] == "ok"
    assert f"version {dsa_tvm.__version__}" in output


def test_cmake(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(embed C)\nset(CMAKE_C_STANDARD 99)\n"
        "find_package(dsa_tvm 0.1 REQUIRED CONFIG)\n"
        f'add_executable(embed "{PROGRAM}")\ntarget_link_libraries(embed dsa_tvm::dsa_tvm)\n'
    )
    run(*CMAKE, "-S", tmp_path, "-B", tmp_path / "build", f"-Ddsa_tvm_DIR={config('--cmakedir')}")
    run(*CMAKE, "--build", tmp_path / "build")
    check(tmp_path / "build" / "embed")


@pytest.mark.skipif("'" in sys.prefix, reason="pkg-config cannot read a quotation mark: tests/install sees it refused")
def test_pkg_config(tmp_path):
    environment = os.environ | {"PKG_CONFIG_PATH": config("--pkgconfigdir")}
    flags = run(*PKG_CONFIG, "--cflags", "--libs", "dsa_tvm", env=environment)
    run("cc", "-std=c99", PROGRAM, *shlex.split(flags), "-o", tmp_path / "embed")
    check(tmp_path / "embed")
    assert run(*PKG_CONFIG, "--modversion", "dsa_tvm", env=environment) == dsa_tvm.__version__


def test_config_flags(tmp_path):
    flags = shlex.split(f"{config('--cflags')} {config('--libs')}")
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    run("cc", *strict, PROGRAM, *flags, "-o", tmp_path / "embed")
    check(tmp_path / "embed")


def test_every_element_type_has_a_name():
    """The header names them, so that a C program need not use the numbers of DLPack."""
    header = (Path(dsa_tvm.__file__).parent / "include" / "dsa_tvm" / "dsa_tvm.h").read_text()
    codes = re.search(r"enum \{\n  DSA_TVM_INT.*?\};", header, re.DOTALL)[0]
    named = {
        (name, int(bits)): int(code)
        for code, comment in re.findall(r"= (\d+),? +/\* (.*) \*/", codes)
        for name, bits in re.findall(r"(\w+): bits (\d+)", comment)
    }
    assert named == {(name, bits): code for name, (code, bits) in DLPACK_TYPES.items()}


def test_header_serves_cplusplus_and_dlpack(tmp_path):
    (tmp_path / "dlpack.h").write_text(
        "#ifndef DLPACK_DLPACK_H_\n#define DLPACK_DLPACK_H_\n#include <stdint.h>\n"
        "typedef struct { void *data; struct { int32_t device_type, device_id; } device; int32_t ndim;\n"
        "struct { uint8_t code, bits; uint16_t lanes; } dtype; int64_t *shape, *strides; uint64_t byte_offset;\n"
        "} DLTensor;\n#endif\n"
    )
    (tmp_path / "use.cc").write_text(
        '#include "dlpack.h"\n#include "dsa_tvm/dsa_tvm.h"\n'
        "int main() { DLTensor t{}; return dsa_tvm_topk(&t, nullptr, nullptr, 1, &t, nullptr) != 1; }\n"
    )
    flags = shlex.split(f"{config('--cflags')} {config('--libs')}")
    run("c++", "-Wall", "-Wextra", "-Werror", tmp_path / "use.cc", *flags, "-o", tmp_path / "use")
    run(tmp_path / "use")
