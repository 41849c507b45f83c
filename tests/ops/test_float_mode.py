"""Results do not depend on the caller's floating-point mode, and calls do not change it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from samples import attention_inputs, indexer_inputs, packed_attention_inputs

import dsa_tvm
from dsa_tvm.ops import OPS

MODES = {"upward": 1, "downward": 2, "to zero": 3, "denormals as zeros": 4, "traps": 5}
SM_SCALE = 0.1  # no float32: it has to be rounded


@pytest.fixture(scope="module")
def mode(tmp_path_factory):
    """``set_mode`` and ``get_mode`` of the calling thread."""
    path = tmp_path_factory.mktemp("mode") / "float_mode.so"
    source = Path(__file__).parent.parent / "c" / "float_mode.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(source), "-lm", "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.get_mode.restype = ctypes.c_uint64
    return library


@pytest.fixture(scope="module")
def operands():
    """Numbers with denormal products or results and with an infinity, enough of them for several threads."""
    rng = np.random.default_rng(0)
    index = indexer_inputs(rng, OPS["lightning_indexer"].variants[0], s_q=24, s_kv=3000, h_idx=16, d_idx=64)
    mla = attention_inputs(rng, "float32", s_q=24, s_kv=3000, h_q=16, topk=256)
    fp8 = packed_attention_inputs(rng, s_q=24, s_kv=3000, h_q=16, topk=256)
    index["q"] *= np.float32(1e-20)
    index["k"][::2] *= np.float32(1e-20)
    index["k"][1] = np.inf
    mla["kv"][::3] *= np.float32(1e-39)
    mla["kv"][:, 1] *= np.float32(1e-39)
    mla["q"][0] *= np.float32(1e-38)
    return index, mla, fp8


def everything(operands, num_threads):
    """The outputs of every operator, as bytes."""
    index, mla, fp8 = operands
    ranges = index["ks"], index["ke"]
    scores = [index[name] for name in ("q", "k", "weights")]
    threads, scaled = {"num_threads": num_threads}, {"sm_scale": SM_SCALE, "num_threads": num_threads}
    logits = dsa_tvm.lightning_indexer(**index, **threads)
    outputs = [
        logits,
        dsa_tvm.topk(logits, *ranges, 64, **threads),
        dsa_tvm.indexer_topk(**index, topk=64, **threads),
        *dsa_tvm.sparse_mla(**mla, **scaled),
        *dsa_tvm.sparse_mla_fp8(**fp8, **scaled),
        *dsa_tvm.dsa_attention(*scores, *ranges, mla["q"], mla["kv"], topk=64, **scaled),
    ]
    return [x.tobytes() for x in outputs]


@pytest.mark.parametrize("name", MODES)
def test_same_bits_in_any_mode(mode, operands, name):
    expected = everything(operands, 1)
    for num_threads in (1, 2, 5):
        mode.set_mode(MODES[name])
        before = mode.get_mode()
        # NumPy must not compute anything in a mode with traps.
        try:
            found, after = everything(operands, num_threads), mode.get_mode()
        finally:
            mode.set_mode(0)
        assert found == expected, num_threads
        assert after == before, num_threads


def test_the_scale_is_rounded_to_nearest(mode):
    """One scale is finite in float32 only because it is rounded to nearest. Another is not finite."""
    ones = np.ones((1, 1, 576), np.float32), np.zeros((1, 576), np.float32), np.zeros((1, 1), np.int32)
    largest = float(np.finfo(np.float32).max)
    for scale, fits in ((largest * (1 + 2**-26), True), (largest * (1 + 2**-24), False)):
        for number in range(4):
            mode.set_mode(number)
            try:
                dsa_tvm.sparse_mla(*ones, sm_scale=scale)
                accepted = True
            except dsa_tvm.ArgumentError:
                accepted = False
            finally:
                mode.set_mode(0)
            assert accepted == fits, (scale, number)


SESSION = """
import sys
import numpy as np, onnxruntime as ort, dsa_tvm
model, inputs, expected = sys.argv[1:]
options = ort.SessionOptions()
options.register_custom_ops_library(dsa_tvm.get_library_path())
options.intra_op_num_threads = 2
options.add_session_config_entry("session.set_denormal_as_zero", "1")
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
feeds = dict(np.load(inputs))
for _ in range(10):
    (found,) = session.run(None, feeds)
    assert found.tobytes() == open(expected, "rb").read()
"""


def test_the_threads_of_a_session(operands, tmp_path):
    """The first session of a process sets ``set_denormal_as_zero`` for all threads."""
    pytest.importorskip("onnxruntime")
    from dsa_tvm.export import build_model

    model, inputs, expected = tmp_path / "model.onnx", tmp_path / "inputs.npz", tmp_path / "expected"
    model.write_bytes(build_model("lightning_indexer").SerializeToString())
    np.savez(inputs, **{name: x for name, x in operands[0].items() if x is not None})
    expected.write_bytes(everything(operands, 1)[0])
    command = [sys.executable, "-c", SESSION, str(model), str(inputs), str(expected)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_flushes_denormals(operands):
    torch = pytest.importorskip("torch")
    import dsa_tvm.torch_ops  # noqa: F401

    index, _, _ = operands
    tensors = [torch.from_numpy(index[name]) for name in ("q", "k", "weights", "ks", "ke")]
    expected = everything(operands, 1)[0]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        found = torch.ops.dsa_tvm.lightning_indexer(*tensors).numpy().tobytes()
    finally:
        torch.set_flush_denormal(False)
    assert found == expected
