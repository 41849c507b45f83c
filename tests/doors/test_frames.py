"""Calls with plain arrays take a shorter way, which only their time reveals."""

from __future__ import annotations

import ctypes
import gc
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from samples import attention_inputs, indexer_inputs

import dsa_tvm
from dsa_tvm.ops import OPS
from dsa_tvm.runtime import calls, exchange, frames

VARIANTS = OPS["lightning_indexer"].variants


@pytest.fixture
def ways(monkeypatch):
    """The results of a call on the shorter and on the usual way, and whether the shorter way was taken."""

    def both(function, *args, **kwargs):
        taken = []
        short = frames.call

        def watched(*given):
            done = short(*given)
            taken.append(done is not None)
            return done

        results = []
        for way in (watched, lambda *given: None):
            monkeypatch.setattr(frames, "call", way)
            try:
                found = function(*args, **kwargs)
                found = found if isinstance(found, tuple) else (found,)
                results.append([(type(x), x.dtype, tuple(x.shape), np.asarray(x).tobytes()) for x in found])
            except dsa_tvm.DsaError as error:
                results.append((type(error), str(error)))
        monkeypatch.setattr(frames, "call", short)
        return (*results, taken == [True])

    return both


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("scaled", [False, True])
def test_same_results(ways, variant, scaled):
    for s_q, s_kv in ((1, 64), (5, 300), (0, 7), (3, 0), (5, 301)):
        index = indexer_inputs(np.random.default_rng(s_q), variant, s_q=s_q, s_kv=s_kv, scaled=scaled)
        short, long, taken = ways(dsa_tvm.lightning_indexer, **index)
        assert short == long and taken
        short, long, taken = ways(dsa_tvm.indexer_topk, **index, topk=17)
        assert short == long and taken


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_same_results_of_attention(ways, dtype):
    rng = np.random.default_rng(0)
    mla = attention_inputs(rng, dtype)
    sink = rng.standard_normal(16).astype(np.float32)
    for optional in ({}, {"attn_sink": sink}, {"topk_length": np.array([3, 0, 64], np.int32)}):
        short, long, taken = ways(dsa_tvm.sparse_mla, **mla, **optional, sm_scale=0.1)
        assert short == long and taken
    out = np.empty((3, 16, 512), mla["q"].dtype), np.empty((3, 16), np.float32), np.empty((3, 16), np.float32)
    short, long, taken = ways(dsa_tvm.sparse_mla, **mla, sm_scale=0.1, out=out)
    assert short == long and taken


def test_torch(ways):
    torch = pytest.importorskip("torch")
    index = indexer_inputs(np.random.default_rng(0), VARIANTS[0])
    tensors = {name: torch.from_numpy(x) for name, x in index.items() if x is not None}
    short, long, taken = ways(dsa_tvm.lightning_indexer, **tensors)
    assert short == long and taken
    with torch.inference_mode():
        assert ways(dsa_tvm.lightning_indexer, **tensors)[2]
    weights = tensors["weights"]
    others = (weights.clone().requires_grad_(), weights.t().contiguous().t(), torch._neg_view(weights))
    for other in (*others, torch.nn.Parameter(weights, requires_grad=False), weights.to_sparse(), weights.to("meta")):
        short, long, taken = ways(dsa_tvm.lightning_indexer, **tensors | {"weights": other})
        assert short == long and not taken, type(other)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_torch_in_each_type_and_size(ways, torch):
    """Empty ones too: their strides are those that torch gives them."""
    for variant in VARIANTS:
        for s_q, s_kv in ((1, 64), (5, 300), (0, 7), (3, 0)):
            index = indexer_inputs(np.random.default_rng(s_q), variant, s_q=s_q, s_kv=s_kv)
            as_integers = {
                name: torch.from_numpy(x.view(f"i{x.itemsize}")) for name, x in index.items() if x is not None
            }
            given = {name: x.view(getattr(torch, index[name].dtype.name)) for name, x in as_integers.items()}
            short, long, taken = ways(dsa_tvm.lightning_indexer, **given)
            assert short == long and taken
            found = dsa_tvm.lightning_indexer(**given)
            assert found.stride() == torch.empty(s_q, s_kv).stride()


def test_torch_outputs(ways, torch):
    """`out` is written, and torch is told; what does not fit is refused in the same words."""
    logits, n = torch.from_numpy(LOGITS), torch.from_numpy(N)
    fitting = torch.full((5, 9), -7, dtype=torch.int32)
    version = fitting._version
    assert dsa_tvm.topk(logits, n * 0, n, 9, out=fitting) is fitting and fitting._version == version + 1
    assert np.array_equal(fitting, topk())
    odd = (
        *(fitting.long(), fitting[:, :8], fitting.T, fitting[0], (fitting, fitting), (), None, LOGITS, [1]),
        *(logits.view(torch.int32)[:, :9], logits.view(torch.int32).flatten()[:45].view(5, 9), fitting.to("meta")),
    )
    for out in odd:
        short, long, taken = ways(dsa_tvm.topk, logits, n * 0, n, 9, out=out)
        assert short == long and taken is (out is None), out


def test_torch_without_the_exchange_interface(ways, torch, monkeypatch):
    """As in versions before 2.10."""
    monkeypatch.setattr(exchange, "_python", lambda kind: None)
    monkeypatch.setattr(frames, "_callers", {})
    logits, n = torch.from_numpy(LOGITS), torch.from_numpy(N)
    short, long, taken = ways(dsa_tvm.topk, logits, n * 0, n, 9)
    assert short == long and not taken


@pytest.mark.parametrize("head", [(2, 0), (0, 9), None])
def test_other_versions_of_the_interface(head, torch):
    """A table of another major version may point to one of ours. A capsule of another kind is none."""
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    address = exchange._python(torch.Tensor).exchange
    table = exchange._Exchange(*(head or (2, 0)), address if head else None)

    class Tensor:
        __dlpack_c_exchange_api__ = make(ctypes.addressof(table), exchange._CAPSULE, None)

    class Other:
        __dlpack_c_exchange_api__ = make(ctypes.addressof(table), b"something", None)

    found = exchange._python(Tensor)
    assert found.exchange == address if head else found is None
    assert exchange._python(Other) is exchange._python(int) is None


def test_torch_leaks_nothing(torch, monkeypatch):
    """No reference and no frame, whether calls succeed or are refused."""
    monkeypatch.setattr(frames, "_callers", {})
    logits, n = torch.from_numpy(LOGITS), torch.from_numpy(N)
    out = (torch.empty(5, 9, dtype=torch.int32),)
    before = [sys.getrefcount(x) for x in (logits, n, out, out[0])]
    for _ in range(50):
        dsa_tvm.topk(logits, n, n, 9)
        dsa_tvm.topk(logits, n, n, 9, out=out)
        for wrong in (logits[:3], logits.to_sparse(), logits.double(), logits.to("meta"), None):
            with pytest.raises(dsa_tvm.ArgumentError):
                dsa_tvm.topk(wrong, n, n, 9, out=out)
        with pytest.raises(dsa_tvm.ArgumentError):
            dsa_tvm.topk(logits, n, n, 5000)
    gc.collect()
    assert before == [sys.getrefcount(x) for x in (logits, n, out, out[0])]
    (caller,) = frames._callers.values()
    assert len(caller._unused) == 1


def test_torch_in_many_threads(torch):
    def work(i):
        rng = np.random.default_rng(i)
        for _ in range(200):
            s_kv = int(rng.integers(20, 400))
            logits, n = torch.from_numpy(rng.random((3, s_kv), np.float32)), torch.full((3,), s_kv, dtype=torch.int32)
            expected = logits.topk(5).indices.sort().values
            assert torch.equal(dsa_tvm.topk(logits, n * 0, n, 5).long(), expected)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


class Subclass(np.ndarray):
    """The array class of some package."""


N = np.full(5, 300, np.int32)
LOGITS = np.random.default_rng(0).random((5, 300), np.float32)


def topk(logits=LOGITS, ks=N * 0, ke=N, topk=9, **kwargs):
    return dsa_tvm.topk(logits, ks, ke, topk, **kwargs)


ODD = {
    "columns": {"logits": np.asfortranarray(LOGITS)},
    "subclass": {"logits": LOGITS.view(Subclass)},
    "byte order": {"logits": LOGITS.astype(">f4")},
    "strides": {"logits": LOGITS[:, ::2]},
    "mixed": {"ks": memoryview(N)},
    "list": {"ke": [300] * 5},
    "none": {"logits": None},
    "type": {"logits": LOGITS.astype(np.float64)},
    "objects": {"logits": LOGITS.astype(object)},
    "rank": {"logits": LOGITS[0]},
    "rank 0": {"ks": np.int32(0).reshape(())},
    "ranks that add up": {"logits": LOGITS[0], "ks": N[None]},
    "lengths": {"ke": N[:4]},
    "far too many": {"logits": np.zeros((0, 2**31 - 1), np.float32), "ks": N[:0], "ke": N},
    "topk 0": {"topk": 0},
    "topk 5000": {"topk": 5000},
    "topk 2**70": {"topk": 2**70},
    "topk True": {"topk": True},
    "topk int64": {"topk": np.int64(9)},
    "topk 1.0": {"topk": 1.0},
    "threads -1": {"num_threads": -1},
    "threads 2**40": {"num_threads": 2**40},
    "threads text": {"num_threads": "2"},
    "threads bool": {"num_threads": True},
    "out type": {"out": np.zeros((5, 9), np.int64)},
    "out shape": {"out": np.zeros((5, 8), np.int32)},
    "out rank": {"out": np.zeros(45, np.int32)},
    "out strides": {"out": np.zeros((5, 18), np.int32)[:, ::2]},
    "out two": {"out": (np.zeros((5, 9), np.int32),) * 2},
    "out overlaps": {"out": LOGITS.view(np.int32)[:, :9].reshape(-1)[:45].reshape(5, 9), "logits": LOGITS},
    "out in": {"out": LOGITS.view(np.int32).reshape(-1)[:45].reshape(5, 9)},
    "out read-only": {"out": np.broadcast_to(np.int32(0), (5, 9))},
}


@pytest.mark.parametrize("name", ODD)
def test_the_same_words_for_what_is_odd(ways, name):
    short, long, _ = ways(topk, **ODD[name])
    assert short == long


def test_lengths_that_do_not_fit_each_other_allocate_nothing_large(ways):
    q, k = np.zeros((2**20, 1, 32), np.float32), np.zeros((2**20, 32), np.float32)
    short, long, _ = ways(dsa_tvm.lightning_indexer, q, k, np.zeros((3, 1), np.float32), N, N)
    assert short == long and "weights: expected shape" in short[1]


def test_each_call_in_turn_has_its_own_lengths_and_addresses():
    for s_kv in (1, 50, 300, 7, 300):
        for logits in (LOGITS[:, :s_kv].copy(), -LOGITS[:, :s_kv]):
            expected = np.sort(np.argsort(-logits, 1)[:, :4], 1)
            found = topk(logits, ke=np.full(5, s_kv, np.int32), topk=4)
            assert np.array_equal(found[:, : expected.shape[1]], expected)


def test_many_callers_share_frames():
    def work(i):
        rng = np.random.default_rng(i)
        for _ in range(200):
            s_kv = int(rng.integers(20, 400))
            logits = rng.random((3, s_kv), np.float32)
            n = np.full(3, s_kv, np.int32)
            assert np.array_equal(dsa_tvm.topk(logits, n * 0, n, 5), np.sort(np.argsort(-logits, 1)[:, :5], 1))
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_the_library_is_entered_once(monkeypatch):
    """A call enters the library once, because each entry checks all arguments."""
    lib = calls.library.load()
    counts = []
    real = lib.dsa_tvm_call
    monkeypatch.setattr(lib, "dsa_tvm_call", lambda *arguments: counts.append(1) or real(*arguments))

    def refuse(*arguments):
        raise AssertionError("entered otherwise")

    for name in ("dsa_tvm_output_shapes", "dsa_tvm_workspace_size"):
        monkeypatch.setattr(lib, name, refuse)
    topk()
    assert counts == [1]


def test_a_torch_call_enters_the_library_twice(monkeypatch, torch):
    """To check the inputs and to learn the shapes, and to compute."""
    logits, n = torch.from_numpy(LOGITS), torch.from_numpy(N)
    monkeypatch.setattr(frames, "_callers", {})
    dsa_tvm.topk(logits, n * 0, n, 9)
    (caller,) = frames._callers.values()
    entered, prepare, run, lib = [], caller._prepare, caller._run, calls.library.load()
    monkeypatch.setattr(caller, "_prepare", lambda *given: entered.append("prepare") or prepare(*given))
    monkeypatch.setattr(caller, "_run", lambda *given: entered.append("run") or run(*given))
    for name in ("dsa_tvm_call", "dsa_tvm_output_shapes", "dsa_tvm_workspace_size", "dsa_tvm_prepare", "dsa_tvm_run"):
        monkeypatch.setattr(lib, name, None)
    dsa_tvm.topk(logits, n * 0, n, 9)
    assert entered == ["prepare", "run"]


def test_element_types_in_turn(ways):
    """A call first tries what served the last one."""
    random = np.random.default_rng(0)
    index = [indexer_inputs(random, variant, scaled=scaled) for variant in VARIANTS for scaled in (True, False)]
    for i in (0, 1, 0, *range(len(index)), 2, 2, 0):
        short, long, taken = ways(dsa_tvm.lightning_indexer, **index[i])
        assert short == long and taken


def test_an_element_type_may_be_another_object(ways):
    """NumPy makes one for each array that comes out of a pickle."""
    logits = pickle.loads(pickle.dumps(LOGITS))
    assert logits.dtype is not LOGITS.dtype
    short, long, taken = ways(topk, logits=logits)
    assert short == long and taken
