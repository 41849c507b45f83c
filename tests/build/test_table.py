"""Which row of a table a call takes, in a library whose kernels only report their row."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from other_library import in_use

import dsa_tvm
from dsa_tvm.build import kernel_table, link, spec_table
from dsa_tvm.build.kernel_table import Kernels
from dsa_tvm.errors import BuildError
from dsa_tvm.runtime import files, library
from dsa_tvm.spec import DIMS, INT32_MAX

#: The largest s_q and s_kv of each row. They differ between operators.
TABLES = {
    "lightning_indexer": [(4, 100), (4, INT32_MAX), (20, 33), (INT32_MAX, INT32_MAX)],
    "topk": [(1, 50), (INT32_MAX, 200), (9, INT32_MAX), (INT32_MAX, INT32_MAX)],
    "sparse_mla": [(16, 50), (16, INT32_MAX), (INT32_MAX, INT32_MAX)],
}
NAMES = {"lightning_indexer": "indexer", "topk": "topk", "sparse_mla": "mla"}
TYPES = {"lightning_indexer": ("float32", "float32"), "topk": (), "sparse_mla": ("float32",)}
#: Groups of 2 queries for each thread and tasks of 7 keys, which are far from the lengths of calls.
CUT = SimpleNamespace(rows=2, task_keys=7, block_keys=7, min_keys=7, tasks_per_thread=1, heads=8, task_heads=8)

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Makes a library of such kernels the one in use."""
    work = tmp_path_factory.mktemp("rows")
    tables = {
        op: [Kernels(s_q, s_kv, CUT, {TYPES[op]: f"{NAMES[op]}_{i}"}) for i, (s_q, s_kv) in enumerate(table)]
        for op, table in TABLES.items()
    }
    spec_table.write(work, DIMS, "0")
    (work / "table.c").write_text(kernel_table.source([(dsa_tvm.active_target(), tables)]))
    rows = str(Path(__file__).parent.parent / "c" / "rows.c")
    link.run(["cc", *link.flags(work), "-c", rows, "-o", f"{work}/rows.o"])
    path = link.link_library([work / "rows.o"], work, "cc")
    manifest = {"abi": library.ABI_VERSION, "size": path.stat().st_size, "sha256": files.sha256(path)}
    (work / library.MANIFEST_NAME).write_text(json.dumps(manifest))
    with in_use(path):
        yield


def expected(op, s_q, s_kv):
    return next(i for i, row in enumerate(TABLES[op]) if s_q <= row[0] and s_kv <= row[1])


def arguments(s_q, s_kv):
    index = [np.zeros(shape, np.float32) for shape in ((s_q, 1, 32), (s_kv, 32), (s_q, 1))]
    ranges = [np.zeros(s_q, np.int32), np.full(s_q, s_kv, np.int32)]
    attention = [np.zeros(shape, np.float32) for shape in ((s_q, 9, 512), (s_kv, 512))]
    return index, ranges, attention


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.usefixtures("rows")
def test_a_call_takes_the_first_row_that_serves_its_lengths(num_threads):
    lengths = product((1, 2, 4, 5, 9, 10, 16, 17, 20, 21), (1, 33, 34, 50, 51, 100, 101, 200, 201))
    for s_q, s_kv in lengths:
        index, ranges, attention = arguments(s_q, s_kv)
        indexer, topk, mla = (expected(op, s_q, s_kv) for op in TABLES)
        logits = dsa_tvm.lightning_indexer(*index, *ranges, num_threads=num_threads)
        assert (logits == indexer).all(), (s_q, s_kv)
        zeros = np.zeros_like(logits)
        assert (dsa_tvm.topk(zeros, *ranges, topk=1, num_threads=num_threads) == topk).all(), (s_q, s_kv)
        indices = np.zeros((s_q, 1), np.int32)
        lse = dsa_tvm.sparse_mla(*attention, indices, sm_scale=1, num_threads=num_threads)[2]
        assert (lse == mla).all(), (s_q, s_kv)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.usefixtures("rows")
def test_a_group_of_queries_takes_the_rows_of_its_call(num_threads):
    """The lengths of the call count, because those of a group depend on the number of threads."""
    for s_q, s_kv in product((1, 5, 17, 21), (33, 34, 201)):
        index, ranges, attention = arguments(s_q, s_kv)
        indexer, topk, mla = (expected(op, s_q, s_kv) for op in TABLES)
        indices = dsa_tvm.indexer_topk(*index, *ranges, topk=1, num_threads=num_threads)
        assert (indices == 10 * indexer + topk).all(), (s_q, s_kv)
        _, lse = dsa_tvm.dsa_attention(*index, *ranges, *attention, topk=1, sm_scale=1, num_threads=num_threads)
        assert (lse == 100 * indexer + 10 * topk + mla).all(), (s_q, s_kv)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.usefixtures("rows")
def test_a_cache_takes_the_rows_of_what_is_in_use(num_threads):
    """The length in use counts, not the capacity. In a batch, each sequence counts by itself."""
    for batch, s_new, length, capacity in product((1, 3, 20), (1, 5), (33, 34, 51, 101), (101, 1000)):
        s_q, s_kv = batch * s_new, batch * capacity
        index, (ks, ke), attention = arguments(s_q, s_kv)
        ks += np.repeat(np.arange(batch, dtype=np.int32) * capacity, s_new)
        ke[...] = ks + length
        indexer, topk = expected("lightning_indexer", s_new, length), expected("topk", s_q, length)
        case = (batch, s_new, length, capacity)
        logits = dsa_tvm.lightning_indexer(*index, ks, ke, num_threads=num_threads)
        assert (logits == indexer).all(), case
        indices = dsa_tvm.indexer_topk(*index, ks, ke, topk=1, num_threads=num_threads)
        assert (indices == 10 * indexer + topk).all(), case
        # dsa_attention chooses rows as sparse_mla does, whose indices do not tell a length.
        mla = expected("sparse_mla", s_q, s_kv)
        _, lse = dsa_tvm.dsa_attention(*index, ks, ke, *attention, topk=1, sm_scale=0.1, num_threads=num_threads)
        assert (lse == 100 * indexer + 10 * topk + mla).all(), case


@pytest.mark.parametrize("s_new", [1, 3])
@pytest.mark.usefixtures("rows")
def test_a_query_is_scored_with_the_keys_that_it_sees(s_new):
    """It is scored in whole blocks of 7 keys, without keys of other sequences and keys that are not in use."""
    batch, length, capacity = 8, 40, 700
    index, (ks, ke), _ = arguments(batch * s_new, batch * capacity)
    ks += np.repeat(np.arange(batch, dtype=np.int32) * capacity, s_new)
    ke[...] = ks + length
    dsa_tvm.indexer_topk(*index, ks, ke, topk=1, num_threads=1)
    # Two queries, which may belong to different sequences, are scored at a time.
    assert (index[2].reshape(-1) == 42).all()
    nobody = np.zeros_like(ks)
    dsa_tvm.indexer_topk(*index, nobody, nobody, topk=1, num_threads=1)
    assert (index[2].reshape(-1) == 42).all()


@pytest.mark.usefixtures("rows")
def test_types_without_a_kernel_are_an_error():
    half = np.zeros((2, 9, 512), np.float16)
    with pytest.raises(dsa_tvm.KernelError, match="no kernel for these element types"):
        dsa_tvm.sparse_mla(half, half[:, 0].copy(), np.zeros((2, 1), np.int32), sm_scale=1)


def test_a_table_that_ends_early_is_refused():
    short = {"topk": [Kernels(4, INT32_MAX, CUT, {(): "topk_0"})]}
    with pytest.raises(BuildError, match="topk: expected a last row for all lengths"):
        kernel_table.source([("x86-64-v3", short)])
