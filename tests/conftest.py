"""The tests run against the installed package, not against a bare checkout in the working directory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Child processes must not find the checkout in their working directory either.
os.environ["PYTHONSAFEPATH"] = "1"
# But they find the helpers of the tests, as pytest does (pythonpath in pyproject.toml).
_HELPERS = [str(Path(__file__).parent / room) for room in (".", "ops", "doors", "gpu", "tuning")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])])
# Otherwise importing TVM would compile an extension for torch, which takes a minute.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
# Waiting threads that spin would keep the CPUs from tests in other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


#: The files whose tests use `cuda_sets`, and all files that take minutes.
CUDA_SETS = ("test_cuda_build.py", "test_cuda_doors.py")
LONGEST = (*CUDA_SETS, "test_tuning.py", "test_build.py", "test_cuda_tuning.py", "test_readme.py", "test_install.py")


@pytest.fixture
def gpu():
    """Skip the test unless there is a GPU and a library for it."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from dsa_tvm.runtime import library

    if not library.cuda_archs():
        pytest.skip("the library has no CUDA kernels: dsa-tvm build --target cuda, then DSA_TVM_LIBRARY")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The device of the tensors."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of some KiB and returns its directory."""
    mounted = []

    def mount(kib):
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture(scope="session")
def cuda_sets():
    """The CUDA kernels of a whole library, made once because that takes a minute."""
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    from dsa_tvm.schedules import CUDA_ARCHS

    from dsa_tvm.build.cuda import fatbins
    from dsa_tvm.spec import DIMS

    return fatbins.generate(CUDA_ARCHS, DIMS)


@pytest.fixture(scope="session")
def cuda_built(cuda_sets, tmp_path_factory):
    """The library with these kernels. nvcc, if there is one, compiles them for every architecture in minutes."""
    from cuda_library import build

    return build(tmp_path_factory.mktemp("cuda"), cuda_sets)


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)  # the plugin may be missing on a machine with a GPU
def pytest_xdist_make_scheduler(config, log):
    """With ``-n``, one process makes the CUDA kernels, and each file runs in one process with its fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "cuda_sets" if Path(file).name in CUDA_SETS else file

    config.option.loadscopereorder = False  # not by the number of tests
    return ByFixtures(config, log)


def pytest_sessionstart(session):
    from dsa_tvm.runtime import package_files

    # A checkout in the working directory hides the installed package, and has no compiled library.
    if not package_files.find("lib/libdsa_tvm.so").exists():
        pytest.exit("the tests need the installed package: pip install '.[test]', then run `pytest`", returncode=4)
