"""What only a GPU has: streams, graphs, several devices. Its results are tested where those of the CPU are."""

from __future__ import annotations

import gc
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch
from devices import as_tuple, run, run_torch, same_bits, to_device
from operator_tensors import SIZES, arrays, check, tensors
from test_dlpack import Foreign

import dsa_tvm
from dsa_tvm.benchmark.workload import to_numpy
from dsa_tvm.ops import OPS
from dsa_tvm.runtime import calls
from dsa_tvm.runtime.dlpack import CUDA

CALLS = [(op, size) for op in OPS for size in SIZES]
#: The argument that is elsewhere in `test_devices_do_not_mix`.
MOVED = {
    **{"lightning_indexer": "ke", "topk": "ke", "indexer_topk": "k"},
    **{"sparse_mla": "attn_sink", "sparse_mla_fp8": "kv", "dsa_attention": "kv"},
    "write_rows": "rows",
}


def call(op, given):
    return as_tuple(getattr(dsa_tvm, op)(**given))


def equal(x, y):
    return all(same_bits(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("op", "size"), CALLS)
def test_a_graph_computes_on_what_its_inputs_hold_when_it_runs(op, size, gpu):
    given = tensors(op, "cuda", size)
    call(op, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(op, given)
    for seed in (1, 2):
        for name, x in tensors(op, "cuda", size, seed=seed).items():
            if isinstance(x, torch.Tensor):
                given[name].copy_(x)
        for _ in range(2):
            graph.replay()
            assert equal(captured, call(op, given))
        check(op, captured, arrays(op, size, seed=seed), "cuda")


@pytest.mark.parametrize("op", OPS)
def test_first_call_in_a_capture(op, gpu):
    """Loading the kernels is no part of the graph. In a process of its own: here they are loaded."""
    code = f"""
import torch, dsa_tvm
from operator_tensors import tensors
from devices import as_tuple, same_bits
given = tensors({op!r}, "cuda", "few")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = as_tuple(dsa_tvm.{op}(**given))
graph.replay()
for x, y in zip(captured, as_tuple(dsa_tvm.{op}(**given)), strict=True):
    assert same_bits(x, y)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("op", "size"), CALLS)
def test_side_stream(op, size, gpu):
    """The call waits for what is on its stream, and for nothing else."""
    given = tensors(op, "cuda", size)
    expected = call(op, given)
    first = OPS[op].inputs[0].name
    late = torch.zeros_like(given[first])
    stream, busy = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        call(op, given)  # its memory comes from the driver, which may wait for everything
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # on the default stream
    busy.record()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(given[first])
        outputs = call(op, given | {first: late})
    stream.synchronize()
    assert not busy.query(), "the call waited for another stream"
    assert equal(outputs, expected)


@pytest.mark.parametrize("op", OPS)
def test_streams_at_a_time(op, gpu):
    """Calls on several streams have workspaces of their own."""
    given = [tensors(op, "cuda", "few", seed=seed) for seed in range(4)]
    expected = [call(op, x) for x in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    for _ in range(5):
        results = []
        for stream, x in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(op, x))
        torch.cuda.synchronize()
        assert all(equal(x, y) for x, y in zip(results, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_tensors_of_another_library(op, gpu):
    """The call is on the default stream whatever torch's own is, and so is its workspace."""
    given = tensors(op, "cuda", "long")
    expected = call(op, given)
    outputs = [torch.empty_like(x) for x in expected]
    foreign = partial(Foreign, device=(CUDA, torch.cuda.current_device()))
    theirs = {name: foreign(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # on the default stream
    with torch.cuda.stream(torch.cuda.Stream()):
        call(op, theirs | {"out": tuple(map(foreign, outputs))})
        # As large as any workspace: what torch took back for this stream is written to now.
        junk = [torch.full((size,), 0x55, dtype=torch.uint8, device="cuda") for size in (2**10, 2**20, 2**26)]
    torch.cuda.synchronize()
    assert equal(outputs, expected) and junk


def test_stream_of_a_workspace(monkeypatch):
    """Without a GPU: what torch is asked for."""
    current = [7]

    @contextmanager
    def stream(entered):
        current.append(entered.cuda_stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=current[-1]))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: (current[-1], device))
    assert calls._workspace("topk", 1000, 1, stream=7) == (7, "cuda:1")
    assert calls._workspace("topk", 1000, 1, stream=0) == (0, "cuda:1") and current == [7]


@pytest.mark.parametrize("op", OPS)
def test_both_devices_agree(op, gpu):
    """Within twice the tolerances, for each has its own error; what was selected is selected by the same logits."""
    given = arrays(op, "many")
    if op in ("indexer_topk", "dsa_attention"):
        check(op, call(op, tensors(op, "cuda", "many")), given, "cuda")
        return
    dtype = given[OPS[op].inputs[0].name].dtype.name
    theirs = call(op, tensors(op, "cpu", "many"))
    for tensor, x, y in zip(OPS[op].outputs, call(op, tensors(op, "cuda", "many")), theirs, strict=True):
        tolerance = OPS[op].tolerance.get(tensor.name, {}).get(dtype)
        if tolerance is None:
            assert torch.equal(x.cpu(), y)
        else:
            torch.testing.assert_close(x.cpu(), y, atol=2 * tolerance.abs, rtol=2 * tolerance.rel)


@pytest.mark.parametrize("op", OPS)
def test_devices_do_not_mix(op, gpu):
    given = tensors(op, "cuda", "few")
    name = MOVED[op]
    words = f"{op}: {name}: expected a tensor on CUDA device 0 like the others"
    elsewhere = ["cpu", *(f"cuda:{i}" for i in range(1, torch.cuda.device_count()))]
    for device in elsewhere:
        with pytest.raises(dsa_tvm.ArgumentError, match=words):
            call(op, given | {name: given[name].to(device)})
    outputs = call(op, given)
    with pytest.raises(dsa_tvm.ArgumentError, match=f"{op}: {OPS[op].outputs[0].name}: expected a tensor on CUDA"):
        call(op, given | {"out": (outputs[0].cpu(), *outputs[1:])})


@pytest.mark.parametrize("op", OPS)
def test_another_gpu_than_the_current_one(op, gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = call(op, tensors(op, "cuda:0", "few"))
    there = call(op, tensors(op, "cuda:1", "few"))
    assert torch.cuda.current_device() == 0 and all(x.device.index == 1 for x in there)
    assert equal(expected, [x.to("cuda:0") for x in there])


@pytest.mark.parametrize("op", OPS)
def test_memory_comes_back(op, gpu):
    given = tensors(op, "cuda", "long")
    call(op, given)
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        call(op, given)
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() == held


@pytest.mark.parametrize(("op", "size"), CALLS)
def test_torch_gives_what_numpy_does(op, size):
    given = arrays(op, size)
    for x, y in zip(as_tuple(run(op, "cpu", **given)), as_tuple(run_torch(op, "cpu", **given)), strict=True):
        assert (x.view("uint8") == y.view("uint8")).all()


@pytest.mark.parametrize("variant", OPS["lightning_indexer"].variants, ids=lambda v: "-".join(v.values()))
def test_tensors_arrive_as_they_are(variant, device):
    """What these tests pass, and read back, is what they mean."""
    for x in arrays("lightning_indexer", "few", variant).values():
        there = to_device(x, device)
        assert there.device.type == device and there.shape == x.shape and there.is_contiguous()
        assert (to_numpy(there.view(torch.uint8)) == x.view("uint8").reshape(there.view(torch.uint8).shape)).all()
