"""The same bits for any number of threads, from any number of callers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from samples import attention_inputs, indexer_inputs

import dsa_tvm
from dsa_tvm.ops import OPS

VARIANT = OPS["lightning_indexer"].variants[0]


def arguments(s_q, s_kv=3000):
    rng = np.random.default_rng(s_q)
    index = indexer_inputs(rng, VARIANT, s_q=s_q, s_kv=s_kv, h_idx=16, d_idx=64)
    attention = attention_inputs(rng, "float32", s_q=s_q, s_kv=s_kv, h_q=100)
    return index, attention


def everything(index, attention, num_threads):
    logits = dsa_tvm.lightning_indexer(**index, num_threads=num_threads)
    indices = dsa_tvm.indexer_topk(**index, topk=200, num_threads=num_threads)
    chosen = dsa_tvm.topk(logits, index["ks"], index["ke"], 200, num_threads=num_threads)
    attended = dsa_tvm.sparse_mla(attention["q"], attention["kv"], indices, sm_scale=0.07, num_threads=num_threads)
    first = [index[name] for name in ("q", "k", "weights", "ks", "ke")]
    given = {"topk": 200, "sm_scale": 0.07, "num_threads": num_threads}
    whole = dsa_tvm.dsa_attention(*first, attention["q"], attention["kv"], **given)
    return [logits, indices, chosen, *attended, *whole]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("s_q", [1, 2, 7, 8, 9, 40])
def test_same_bits_for_any_number_of_threads(s_q):
    inputs = arguments(s_q)
    expected = everything(*inputs, 1)
    for num_threads in (2, 3, 5, 16, 64):
        assert same(everything(*inputs, num_threads), expected), num_threads


def test_same_bits_on_every_run():
    inputs = arguments(9)
    expected = everything(*inputs, 2)
    assert all(same(everything(*inputs, 2), expected) for _ in range(20))


def test_many_callers_at_once():
    inputs = [arguments(s_q, 1000) for s_q in range(1, 17)]
    expected = [everything(*x, 1) for x in inputs]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            actual = list(pool.map(lambda x: everything(*x, 2), inputs))
            assert all(map(same, actual, expected))


def test_fewer_queries_at_a_time_than_threads_take():
    """Of a million keys 256 MiB are the logits of 56 queries: less than 64 threads would take at a time."""
    s_q, s_kv, seen, first = 150, 2**20, 3000, 2**19
    index = indexer_inputs(np.random.default_rng(0), VARIANT, s_q=s_q, s_kv=seen, h_idx=2, d_idx=32)
    expected = dsa_tvm.indexer_topk(**index, topk=9, num_threads=1)
    k = np.zeros((s_kv, 32), np.float32)
    k[first : first + seen] = index["k"]
    moved = index | {"k": k, "ks": index["ks"] + np.int32(first), "ke": index["ke"] + np.int32(first)}
    indices = dsa_tvm.indexer_topk(**moved, topk=9, num_threads=64)
    assert np.array_equal(np.where(indices < 0, indices, indices - first), expected)


def test_process_default():
    before = dsa_tvm.get_num_threads()
    try:
        dsa_tvm.set_num_threads(np.int64(3))
        assert dsa_tvm.get_num_threads() == 3
    finally:
        dsa_tvm.set_num_threads(0)
    assert dsa_tvm.get_num_threads() == before


@pytest.mark.parametrize("number", [-1, 2**31, 2**32 + 1])
def test_no_such_number_of_threads(number):
    with pytest.raises(dsa_tvm.ArgumentError, match=r"set_num_threads: num_threads: expected 0\.\.2147483647, got"):
        dsa_tvm.set_num_threads(number)


@pytest.mark.parametrize("number", ["4", None, 1.5, np.ones(2)])
def test_no_number_of_threads(number):
    with pytest.raises(dsa_tvm.ArgumentError, match="set_num_threads: num_threads: expected int, got"):
        dsa_tvm.set_num_threads(number)


def test_a_forked_child_of_somebody_elses_pool(tmp_path):
    """The parent has not loaded the library, but something else that has used the same OpenMP."""
    source, pool = tmp_path / "pool.c", tmp_path / "pool.so"
    source.write_text("void work(void) {\n#pragma omp parallel num_threads(2)\n;\n}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(pool)], check=True)
    code = f"""
import ctypes, os
import numpy as np
import dsa_tvm
ctypes.CDLL({str(pool)!r}).work()
child = os.fork()
if child == 0:
    n = np.full(9, 50, np.int32)
    dsa_tvm.set_num_threads(4)
    assert dsa_tvm.get_num_threads() == 1
    try:
        dsa_tvm.topk(np.ones((9, 50), np.float32), n * 0, n, 4, num_threads=-1)
        os._exit(1)
    except dsa_tvm.ArgumentError:
        pass
    dsa_tvm.topk(np.ones((9, 50), np.float32), n * 0, n, 4, num_threads=2)
    os._exit(7)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes():
    """The parent's pool has run; the child has none of its threads and must not wait for them."""
    inputs = arguments(9)
    expected = everything(*inputs, 2)
    child = os.fork()
    if child == 0:
        os._exit(0 if dsa_tvm.get_num_threads() == 1 and same(everything(*inputs, 2), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
