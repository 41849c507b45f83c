"""The tests run against the installed package, never against the checkout they lie in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Python processes that the tests start must not find the checkout in their working directory either.
os.environ["PYTHONSAFEPATH"] = "1"
# Importing TVM beside torch would otherwise compile an extension for a minute.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")


@pytest.fixture
def gpu():
    """For what a CPU does not have."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from dsa_tvm import library

    if not library.cuda_archs():
        pytest.skip("the library has no CUDA kernels: dsa-tvm build --target cuda, then DSA_TVM_LIBRARY")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where the tensors are."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param


def pytest_sessionstart(session):
    import dsa_tvm

    checkout = Path(__file__).parent.parent / "dsa_tvm"
    if Path(dsa_tvm.__file__).parent == checkout:
        pytest.exit("the tests need the installed package: pip install '.[test]', then run `pytest`", returncode=4)
