"""Caches of fixed capacity in ONNX Runtime: one buffer is bound to the past and to the present cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dsa_tvm

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from dsa_tvm.export.onnx.nodes import OPSET  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from dsa_tvm import export  # noqa: E402  # imports onnx

H_IDX, D_IDX, H_Q, D_QK, D_V, TOPK, CAPACITY = 4, 32, 3, 512, 512, 16, 96
ATTRS = {"sm_scale": D_QK**-0.5, "d_v": D_V}
CACHES = {"index_cache": D_IDX, "kv_cache": D_QK}


def decode_model():
    """A model that writes new rows to two caches, and runs indexer and attention over all sequences at once."""
    nodes = []
    for name, width in CACHES.items():
        nodes += [
            export.operator_node("write_rows", [name, f"{name}_rows", "positions"], [f"new_{name}"]),
            helper.make_node("Constant", [], [f"{name}_shape"], value_ints=[-1, width]),
            helper.make_node("Reshape", [f"new_{name}", f"{name}_shape"], [f"{name}_joined"]),
        ]
    nodes += [
        export.operator_node(
            "indexer_topk", ["q", "index_cache_joined", "weights", "ks", "ke"], ["indices"], topk=TOPK
        ),
        export.operator_node("sparse_mla", ["q_mla", "kv_cache_joined", "indices"], ["out"], **ATTRS),
    ]
    shapes = {
        **{name: ["batch", "capacity", width] for name, width in CACHES.items()},
        **{f"{name}_rows": ["batch", "s_new", width] for name, width in CACHES.items()},
        **{"q": ["s_q", H_IDX, D_IDX], "weights": ["s_q", H_IDX], "q_mla": ["s_q", H_Q, D_QK]},
    }
    integers = {"positions": ["batch", "s_new"], "ks": ["s_q"], "ke": ["s_q"]}
    results = {"out": ["s_q", H_Q, D_V], **{f"new_{n}": ["batch", "capacity", w] for n, w in CACHES.items()}}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    inputs += [helper.make_tensor_value_info(n, TensorProto.INT32, s) for n, s in integers.items()]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in results.items()]
    graph = helper.make_graph(nodes, "decode", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    export.attach_bodies(model)
    onnx.checker.check_model(model)
    return model


def make_session(library):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    model = decode_model()
    if library:
        del model.functions[:]
        options.register_custom_ops_library(dsa_tvm.get_library_path())
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def lengths_of(batch, step):
    """Different lengths of the sequences."""
    return np.arange(batch) * 9 + 5 + step


def tokens(rng, batch, s_new):
    """Inputs for new tokens."""
    made = {f"{n}_rows": rng.standard_normal((batch, s_new, w)).astype(np.float32) for n, w in CACHES.items()}
    made["q"] = rng.standard_normal((batch * s_new, H_IDX, D_IDX)).astype(np.float32)
    made["weights"] = rng.standard_normal((batch * s_new, H_IDX)).astype(np.float32)
    made["q_mla"] = rng.standard_normal((batch * s_new, H_Q, D_QK)).astype(np.float32)
    return made


def of_concatenated(rows, new, ke):
    """The attention of one sequence, over caches that are concatenated."""
    ks = np.zeros(len(ke), np.int32)
    indices = dsa_tvm.indexer_topk(new["q"], rows["index_cache"], new["weights"], ks, ke, topk=TOPK)
    return dsa_tvm.sparse_mla(new["q_mla"], rows["kv_cache"], indices, **ATTRS)[0]


@pytest.mark.parametrize("library", [True, False], ids=["library", "bodies"])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_in_place_gives_what_concatenated_caches_give(batch, library):
    session, rng = make_session(library), np.random.default_rng(batch)
    caches = {n: np.full((batch, CAPACITY, w), np.nan, np.float32) for n, w in CACHES.items()}
    values = {n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in caches.items()}
    addresses = {n: x.data_ptr() for n, x in values.items()}
    assert addresses == {n: x.ctypes.data for n, x in caches.items()}
    past = [{n: np.zeros((0, w), np.float32) for n, w in CACHES.items()} for _ in range(batch)]
    for step in range(12):
        # First a prompt, shorter for some sequences. Rows behind its end are padding and are not written.
        s_new = int(lengths_of(batch, 0).max()) if step == 0 else 1
        lengths = lengths_of(batch, step)
        starts = np.array([len(p["kv_cache"]) for p in past])
        positions = (starts[:, None] + np.arange(s_new)).astype(np.int32)
        positions[positions >= lengths[:, None]] = -1
        new = tokens(rng, batch, s_new)
        first = (np.arange(batch) * CAPACITY)[:, None]
        ks = np.broadcast_to(first, positions.shape)
        feeds = new | {
            "positions": positions,
            "ks": ks.astype(np.int32).reshape(-1),
            "ke": np.where(positions < 0, ks, first + positions + 1).astype(np.int32).reshape(-1),
        }
        before = {n: x.copy() for n, x in caches.items()}
        binding = session.io_binding()
        for name, x in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(x))
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"new_{name}", value)
        binding.bind_output("out")
        session.run_with_iobinding(binding)
        out = next(x for x in binding.get_outputs() if x.shape()[-1] == D_V and x.shape()[-2] == H_Q).numpy()
        assert {n: x.data_ptr() for n, x in values.items()} == addresses
        for b in range(batch):
            own = positions[b] >= 0
            rows = slice(b * s_new, (b + 1) * s_new)
            for n in CACHES:
                past[b][n] = np.concatenate([past[b][n], new[f"{n}_rows"][b, own]])
                # The new rows, the old rows, and nothing behind them.
                assert (caches[n][b, : lengths[b]] == past[b][n]).all()
                assert caches[n][b, lengths[b] :].tobytes() == before[n][b, lengths[b] :].tobytes()
            mine = {n: new[n][rows][own] for n in ("q", "weights", "q_mla")}
            expected = of_concatenated(past[b], mine, positions[b, own] + np.int32(1))
            if library:
                assert (out[rows][own] == expected).all()
            # Two results in f32, each within the tolerance of the operator.
            np.testing.assert_allclose(out[rows][own], expected, atol=1e-5, rtol=2e-5)


def middle_session():
    """Rows written to what another node has made, and another one reads."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(dsa_tvm.get_library_path())
    nodes = [
        helper.make_node("Neg", ["cache"], ["negative"]),
        export.operator_node("write_rows", ["negative", "rows", "positions"], ["written"]),
        helper.make_node("ReduceSum", ["written"], ["out"], keepdims=0),
    ]
    kinds = {"cache": TensorProto.FLOAT, "rows": TensorProto.FLOAT, "positions": TensorProto.INT32}
    shapes = {"cache": ["b", "c", "d"], "rows": ["b", "s", "d"], "positions": ["b", "s"]}
    inputs = [helper.make_tensor_value_info(n, kinds[n], shapes[n]) for n in kinds]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [])]
    graph = helper.make_graph(nodes, "middle", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.dsa", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_in_the_middle_of_a_graph():
    rng = np.random.default_rng(0)
    cache, rows = (rng.integers(-9, 9, (2, n, 6)).astype(np.float32) for n in (9, 4))
    positions = rng.integers(-1, 10, (2, 4)).astype(np.int32)
    before = cache.copy()
    (out,) = middle_session().run(None, {"cache": cache, "rows": rows, "positions": positions})
    assert out == dsa_tvm.write_rows(-cache, rows, positions).sum() and (cache == before).all()


_NO_COPIES = """
import sys
import numpy as np, onnxruntime as ort
sys.path.insert(0, {tests!r})
import test_cache_in_place as t
session = t.make_session(True)
batch, capacity = 2, 100_000
caches = {{n: np.zeros((batch, capacity, w), np.float32) for n, w in t.CACHES.items()}}
for x in caches.values():
    x[...] = 1
values = {{n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in caches.items()}}
new = t.tokens(np.random.default_rng(0), batch, 1)
new |= {{"positions": np.array([[7], [90_000]], np.int32), "ks": np.array([0, capacity], np.int32)}}
new["ke"] = new["ks"] + 100
def step():
    binding = session.io_binding()
    for name, x in new.items():
        binding.bind_cpu_input(name, x)
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"new_{{name}}", value)
    binding.bind_output("out")
    session.run_with_iobinding(binding)
before = t.peak()
step()
step()
print(t.peak() - before)
"""


_ONE_MEMORY = """
import sys
import numpy as np
sys.path.insert(0, {tests!r})
import test_cache_in_place as t
session = t.middle_session()
cache, rows = (np.ones((1, n, 500), np.float32) for n in (100_000, 1))
before = t.peak()
session.run(None, {{"cache": cache, "rows": rows, "positions": np.array([[7]], np.int32)}})
print(t.peak() - before)
"""


def peak():
    """MiB that this process has taken at most. (What `resource` says would include its parent's.)"""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10


def growth(code):
    """By how many MiB the peak memory of a process grew, as it reports."""
    code = code.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(int(ort.__version__.split(".")[1]) < 24, reason="no shapes of custom operators are inferred there")
def test_one_memory_serves_a_node_for_both_where_nobody_else_needs_the_input():
    """ONNX Runtime is told that it may, and knows that both have one size. What Neg makes takes 190 MiB."""
    assert growth(_ONE_MEMORY) < 290


def test_a_step_copies_no_cache():
    """Neither WriteRows nor the Reshape behind it: a copy of these caches, 26 and 410 MB, would show in the peak."""
    assert growth(_NO_COPIES) < 20
