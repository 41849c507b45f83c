"""Tests of calls with torch's tensors that test_cuda_doors.py runs in a process with the emulator as driver."""

from __future__ import annotations

import gpu_call
import numpy as np
import pytest
import torch
import torch_on_gpu
from compare import assert_close, tolerance_of
from samples import attention_inputs, indexer_inputs, row_inputs
from test_topk import DATA

torch_on_gpu.install()

import dsa_tvm  # noqa: E402
import dsa_tvm.torch_ops  # noqa: E402
from dsa_tvm.ops import OPS  # noqa: E402

D_IDX, D_QK, D_V = 32, 512, 512

#: The function and the operator.
DOORS = [dsa_tvm, torch.ops.dsa_tvm]


def as_torch(inputs):
    """The arrays as tensors of the same types."""
    return {
        name: torch.from_numpy(x.view(f"i{x.itemsize}")).view(getattr(torch, x.dtype.name))
        for name, x in inputs.items()
        if x is not None
    }


def row(s_kv=40000):
    logits = DATA["normal"](np.random.default_rng(0), (1, s_kv))
    return {"logits": logits, "ks": np.zeros(1, np.int32), "ke": np.full(1, s_kv, np.int32)}


@pytest.mark.parametrize("door", DOORS, ids=["function", "operator"])
def test_topk_takes_the_workspace_that_it_needs(door):
    inputs = row()
    torch_on_gpu.allocated.clear()
    found = door.topk(**as_torch(inputs), topk=64)
    np.testing.assert_array_equal(found, OPS["topk"].reference(*inputs.values(), 64)[0])
    size = gpu_call.Call("topk", inputs, {"topk": 64}, [found.numpy()]).workspace_size()
    assert size and torch_on_gpu.allocated == [(4 * 64, torch.int32), (size, torch.uint8)]


def test_outputs_that_are_given():
    inputs, out = row(), torch.full((1, 64), -7, dtype=torch.int32)
    torch_on_gpu.allocated.clear()
    version = out._version
    assert dsa_tvm.topk(**as_torch(inputs), topk=64, out=out) is out and out._version == version + 1
    np.testing.assert_array_equal(out, OPS["topk"].reference(*inputs.values(), 64)[0])
    assert [dtype for _, dtype in torch_on_gpu.allocated] == [torch.uint8]


@pytest.mark.parametrize("door", DOORS, ids=["function", "operator"])
def test_several_outputs(door):
    inputs = attention_inputs(np.random.default_rng(1), "bfloat16", d_qk=D_QK)
    found = door.sparse_mla(**as_torch(inputs), sm_scale=0.06, d_v=D_V)
    expected = OPS["sparse_mla"].reference(**inputs, attn_sink=None, topk_length=None, sm_scale=0.06, d_v=D_V)
    assert found[0].dtype == torch.bfloat16
    for tensor, x, y in zip(OPS["sparse_mla"].outputs, found, expected, strict=True):
        assert_close(x.float().numpy(), y, tolerance_of(OPS["sparse_mla"], tensor.name, "bfloat16"))


@pytest.mark.parametrize("door", DOORS, ids=["function", "operator"])
@pytest.mark.parametrize("variant", OPS["lightning_indexer"].variants, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("scaled", [False, True])
def test_an_optional_input(door, variant, scaled):
    inputs = indexer_inputs(np.random.default_rng(2), variant, s_q=5, s_kv=300, h_idx=13, d_idx=D_IDX, scaled=scaled)
    found = door.lightning_indexer(**as_torch(inputs))
    spec = OPS["lightning_indexer"]
    assert_close(found.numpy(), spec.reference(**inputs)[0], tolerance_of(spec, "logits", variant["T"]))


def test_in_place():
    inputs = row_inputs(np.random.default_rng(3), "float16", batch=2, capacity=6, s_new=2, d_row=8)
    given = as_torch(inputs)
    (expected,) = OPS["write_rows"].reference(**inputs)
    torch.ops.dsa_tvm.write_rows_(**given)
    np.testing.assert_array_equal(given["cache"].numpy(), expected)


@pytest.mark.parametrize("door", DOORS, ids=["function", "operator"])
def test_nothing_is_allocated_for_a_call_that_is_refused(door):
    given = as_torch(row())
    torch_on_gpu.allocated.clear()
    with pytest.raises(dsa_tvm.ArgumentError, match=r"topk: expected topk in 1\.\.4096, got 5000"):
        door.topk(**given, topk=5000)
    assert not torch_on_gpu.allocated
