"""Calls that take the longer way, such as those on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from samples import indexer_inputs

from dsa_tvm.ops import OPS
from dsa_tvm.runtime import calls, library
from dsa_tvm.runtime.dlpack import CUDA
from dsa_tvm.runtime.tensors import Pack, as_tensor

VARIANTS = OPS["indexer_topk"].variants


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("scaled", [False, True])
def test_shapes_are_those_that_the_library_tells(variant, scaled):
    index = indexer_inputs(np.random.default_rng(0), variant, scaled=scaled)
    spec, attrs = OPS["indexer_topk"], [calls.Attribute(i=17)]
    views = [None if index[t.name] is None else as_tensor(spec, t, index[t.name], []) for t in spec.inputs]
    pack = Pack(views)
    arguments = (b"indexer_topk", pack.pointers, len(views), (calls.Attribute * 1)(*attrs), 1)
    assert calls._shapes(spec, views, attrs) == calls._checked_shapes(spec, library.load(), arguments)


class Entered:
    """A library that notes which functions are called, and computes nothing."""

    def __init__(self):
        self.names = []

    def __getattr__(self, name):
        return lambda *arguments: self.names.append(name) or 0


@pytest.mark.parametrize("given_out", [False, True])
def test_a_call_on_a_gpu_enters_the_library_twice(monkeypatch, given_out):
    """To check the arguments and to learn how much workspace it takes, and to run: each entry checks all arguments."""
    torch = pytest.importorskip("torch")
    entered = Entered()
    monkeypatch.setattr(library, "load", lambda: entered)
    monkeypatch.setattr(library, "has_cuda", lambda loaded: True)
    monkeypatch.setattr(calls, "as_tensor", lambda *x, **how: as_tensor(*x, **how)._replace(device=(CUDA, 0)))
    n = torch.zeros(5, dtype=torch.int32)
    out = torch.empty(5, 9, dtype=torch.int32) if given_out else None
    (found,) = calls.call(OPS["topk"], {"logits": torch.zeros(5, 300), "ks": n, "ke": n}, {"topk": 9}, out)
    assert entered.names == ["dsa_tvm_workspace_size", "dsa_tvm_call"]
    assert found.shape == (5, 9) and found.dtype == torch.int32
