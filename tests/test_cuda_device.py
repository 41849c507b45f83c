"""The operators on a GPU, through torch: the CPU's own tests, and what only a GPU has."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from test_topk import DATA

import dsa_tvm
from dsa_tvm import library
from dsa_tvm.ops import OPS

pytest.importorskip("torch")

import torch

import dsa_tvm.torch_ops


@pytest.fixture
def gpu():
    """For what a CPU does not have."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not library.cuda_archs():
        pytest.skip("the library has no CUDA kernels: pip install . -C cmake.define.DSA_TVM_CUDA=ON")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where the tensors are."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param


def arguments(logits, device, ks=None, ke=None):
    rows, s_kv = logits.shape
    ks = np.zeros(rows, np.int32) if ks is None else np.asarray(ks, np.int32)
    ke = np.full(rows, s_kv, np.int32) if ke is None else np.asarray(ke, np.int32)
    return [torch.from_numpy(x).to(device) for x in (logits, ks, ke)]


def check(logits, topk, device, ks=None, ke=None):
    tensors = arguments(logits, device, ks, ke)
    (expected,) = OPS["topk"].reference(*(x.cpu().numpy() for x in tensors), topk)
    for select in (dsa_tvm.topk, lambda *x: torch.ops.dsa_tvm.topk(*x[:3], topk=x[3])):
        indices = select(*tensors, topk)
        assert indices.device == tensors[0].device
        np.testing.assert_array_equal(indices.cpu().numpy(), expected)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("s_kv", [1, 15, 65, 1000, 4097, 20000])
def test_every_kind_of_row(data, s_kv, device):
    logits = DATA[data](np.random.default_rng(s_kv), (2, s_kv))
    for topk in (1, 7, 512, 2048, 4096):
        check(logits, topk, device)


@pytest.mark.parametrize("data", ["normal", "ascending", "ties", "half nan"])
def test_long_row(data, device):
    check(DATA[data](np.random.default_rng(0), (1, 300000)), 2048, device)


def test_ranges(device):
    rng = np.random.default_rng(1)
    ks, ke = rng.integers(-50, 750, (2, 200))
    check(rng.standard_normal((200, 700)).astype(np.float32), 100, device, ks, ke)


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 10), (3, 0), (0, 0)])
def test_empty(s_q, s_kv, device):
    check(np.zeros((s_q, s_kv), np.float32), 5, device)


def test_70000_queries(device):
    check(DATA["ties"](np.random.default_rng(0), (70000, 65)), 7, device)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_any_alignment_and_memory_around(shift, device):
    """The logits begin off any boundary, between NaN; nothing but the output is written."""
    rows, s_kv, topk = 3, 5000, 64
    memory = torch.full((rows * s_kv + 64,), float("nan"), device=device)
    logits = memory[shift : shift + rows * s_kv].view(rows, s_kv)
    values = DATA["normal"](np.random.default_rng(shift), (rows, s_kv))
    logits.copy_(torch.from_numpy(values))
    before = memory.clone()
    around = torch.full((rows * topk + 32,), -7, dtype=torch.int32, device=device)
    out = around[16 + shift : 16 + shift + rows * topk].view(rows, topk)
    dsa_tvm.topk(logits, *arguments(values, device)[1:], topk, out=out)
    (expected,) = OPS["topk"].reference(values, np.zeros(rows, np.int32), np.full(rows, s_kv, np.int32), topk)
    np.testing.assert_array_equal(out.cpu().numpy(), expected)
    assert torch.equal(memory.view(torch.int32), before.view(torch.int32))
    assert (around[: 16 + shift] == -7).all() and (around[16 + shift + rows * topk :] == -7).all()


def test_compiled(device):
    tensors = arguments(DATA["normal"](np.random.default_rng(0), (4, 3000)), device)
    compiled = torch.compile(lambda *x: torch.ops.dsa_tvm.topk(*x, topk=64), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), dsa_tvm.topk(*tensors, 64))


@pytest.mark.parametrize("shape", [(4, 3000), (1, 200000)])
def test_graph(shape, gpu):
    """A captured call computes on what its inputs hold when the graph runs."""
    rng = np.random.default_rng(0)
    tensors = arguments(DATA["normal"](rng, shape), "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = dsa_tvm.topk(*tensors, 512)
    for data in ("normal", "ties"):
        logits = DATA[data](rng, shape)
        tensors[0].copy_(torch.from_numpy(logits))
        graph.replay()
        assert torch.equal(indices, dsa_tvm.topk(*tensors, 512))


def test_first_call_in_a_capture(gpu):
    """Loading the kernels is no part of the graph. In a process of its own: here they are loaded."""
    code = """
import torch, dsa_tvm
x = torch.randn(4, 3000, device="cuda"); n = torch.full((4,), 3000, dtype=torch.int32, device="cuda"); zero = n * 0
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = dsa_tvm.topk(x, zero, n, 64)
graph.replay()
assert torch.equal(captured, dsa_tvm.topk(x, zero, n, 64))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_side_stream(gpu):
    """The call waits for what is on its stream, and for nothing else."""
    tensors = arguments(DATA["normal"](np.random.default_rng(0), (64, 20000)), "cuda")
    expected = dsa_tvm.topk(*tensors, 512)
    late = torch.empty_like(tensors[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(tensors[0])
        indices = dsa_tvm.topk(late, *tensors[1:], 512)
    stream.synchronize()
    assert torch.equal(indices, expected)


def test_devices_do_not_mix(gpu):
    tensors = arguments(np.zeros((2, 9), np.float32), "cuda")
    with pytest.raises(dsa_tvm.ArgumentError, match="topk: ke: expected a tensor on CUDA device 0 like the others"):
        dsa_tvm.topk(*tensors[:2], tensors[2].cpu(), 3)
