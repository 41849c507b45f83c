"""The tests run against the installed package, not against a bare checkout in the working directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Python processes that the tests start must not find the checkout in their working directory either.
os.environ["PYTHONSAFEPATH"] = "1"
# But they find the helpers of the tests, as pytest itself does (pythonpath in pyproject.toml).
_HELPERS = [str(Path(__file__).parent / room) for room in (".", "ops", "doors", "gpu", "tuning")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])])
# Importing TVM beside torch would otherwise compile an extension for a minute.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
# Threads that wait by spinning keep the CPUs from the tests of other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


#: The files whose tests take `cuda_sets`, and with the others that take minutes.
CUDA_SETS = ("test_cuda_build.py", "test_cuda_doors.py")
LONGEST = (*CUDA_SETS, "test_tuning.py", "test_build.py", "test_cuda_tuning.py", "test_readme.py", "test_install.py")


@pytest.fixture
def gpu():
    """For what a CPU does not have."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from dsa_tvm.runtime import library

    if not library.cuda_archs():
        pytest.skip("the library has no CUDA kernels: dsa-tvm build --target cuda, then DSA_TVM_LIBRARY")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where the tensors are."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param


@pytest.fixture(scope="session")
def cuda_sets():
    """The CUDA kernels of a whole library. Making them takes a minute, so nothing makes them again."""
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    from dsa_tvm.schedules import CUDA_ARCHS

    from dsa_tvm.build.cuda import fatbins
    from dsa_tvm.spec import DIMS

    return fatbins.generate(CUDA_ARCHS, DIMS)


@pytest.fixture(scope="session")
def cuda_built(cuda_sets, tmp_path_factory):
    """The library of them, compiled for every architecture if there is nvcc, which takes minutes."""
    from cuda_library import build

    return build(tmp_path_factory.mktemp("cuda"), cuda_sets)


def pytest_collection_modifyitems(items):
    """The longest first: of several processes none is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)  # a machine with a GPU may be without the plugin
def pytest_xdist_make_scheduler(config, log):
    """With ``-n``, one process makes the CUDA kernels, and one each file's own fixtures."""
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
