"""Calls that take the longer way, such as those on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import dsa_tvm
from dsa_tvm.ops import OPS
from dsa_tvm.runtime import calls, frames, library
from dsa_tvm.runtime.dlpack import CUDA
from dsa_tvm.runtime.tensors import as_tensor


class Entered:
    """A library that notes which functions are called, and computes nothing."""

    def __init__(self):
        self.names = []

    def __getattr__(self, name):
        return lambda *arguments: self.names.append(name) or (name == "dsa_tvm_plan_create")


@pytest.mark.parametrize("given_out", [False, True])
def test_a_call_on_a_gpu_enters_the_library_twice(monkeypatch, given_out):
    """To check the inputs and to learn shapes and workspace, and to run: nothing is checked or measured again."""
    torch = pytest.importorskip("torch")
    entered = Entered()
    monkeypatch.setattr(library, "load", lambda: entered)
    monkeypatch.setattr(library, "has_cuda", lambda loaded: True)
    monkeypatch.setattr(calls, "as_tensor", lambda *x, **how: as_tensor(*x, **how)._replace(device=(CUDA, 0)))
    n = torch.zeros(5, dtype=torch.int32)
    out = torch.empty(5, 9, dtype=torch.int32) if given_out else None
    calls.call(OPS["topk"], {"logits": torch.zeros(5, 300), "ks": n, "ke": n}, {"topk": 9}, out)
    assert entered.names == ["dsa_tvm_plan_create", "dsa_tvm_prepare", "dsa_tvm_run", "dsa_tvm_plan_destroy"]


class Older:
    """A library of an earlier version."""

    dsa_tvm_cuda_archs = staticmethod(lambda: None)


def test_an_older_library_is_named(monkeypatch):
    monkeypatch.setattr(library, "load", Older)
    monkeypatch.setattr(library, "has_cuda", lambda loaded: False)
    monkeypatch.setattr(frames, "call", lambda *arguments: None)
    n = np.zeros(2, np.int32)
    with pytest.raises(dsa_tvm.LibraryError, match="expected one that this version has built, got an older one"):
        dsa_tvm.topk(np.zeros((2, 3), np.float32), n, n, 1)
