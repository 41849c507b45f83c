"""Tests of all operators but top-k that test_cuda_doors.py runs in a process with the emulator as driver."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close, tolerance_of
from gpu_call import Call
from samples import DTYPES, attention_inputs, indexer_inputs

from dsa_tvm import pack_mla_rows
from dsa_tvm.ops import OPS

INDEXER, MLA = OPS["lightning_indexer"], OPS["sparse_mla"]
#: The emulator has kernels for these lengths.
D_IDX, D_QK, D_V = 32, 512, 512


def run(op, inputs, attrs, *shapes):
    """The outputs. An output that is given by its shape alone is f32."""
    shapes = [shape if isinstance(shape[0], tuple) else (shape, np.float32) for shape in shapes]
    outputs = [np.zeros(shape, dtype) for shape, dtype in shapes]
    for x in outputs:
        x.view(np.uint8)[...] = 0x55
    Call(op, inputs, attrs, outputs).run()
    return outputs


def ranges(a, s_kv):
    """An inner range, an empty one, one key, and one that is out of bounds on both sides."""
    a["ks"][:4], a["ke"][:4] = (7, 150, s_kv - 1, -5), (s_kv - 9, 150, s_kv, s_kv + 9)
    return a


@pytest.mark.parametrize("variant", INDEXER.variants, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("s_q", [5, 70])
def test_lightning_indexer(variant, s_q):
    """Few and many queries use different kernels."""
    s_kv = 300 if s_q == 5 else 130
    a = indexer_inputs(np.random.default_rng(s_q), variant, s_q=s_q, s_kv=s_kv, h_idx=13, d_idx=D_IDX, scaled=s_q == 5)
    (logits,) = run("lightning_indexer", ranges(a, s_kv), {}, (s_q, s_kv))
    assert_close(logits, INDEXER.reference(**a)[0], tolerance_of(INDEXER, "logits", variant["T"]))


@pytest.mark.parametrize("s_q", [1, 35])
def test_indexer_topk_in_groups(s_q):
    """Groups have 64 MiB of logits: here 15 queries over a million keys, most of which no query sees."""
    s_kv, seen, topk = 2**20 + 7, 2500, 70
    a = indexer_inputs(np.random.default_rng(0), INDEXER.variants[1], s_q=s_q, s_kv=seen, h_idx=3, d_idx=D_IDX)
    a["ks"] += np.arange(s_q, dtype=np.int32)
    (expected,) = OPS["lightning_indexer"].reference(**a)
    first = s_kv - seen
    k = np.zeros((s_kv, D_IDX), a["k"].dtype)
    k[first:] = a["k"]
    a |= {"k": k, "ks": a["ks"] + np.int32(first), "ke": a["ke"] + np.int32(first)}
    (indices,) = run("indexer_topk", a, {"topk": topk}, ((s_q, topk), np.int32))
    for m in range(s_q):
        chosen = indices[m] - first
        assert (np.diff(chosen) > 0).all() and chosen[0] >= 0
        least = np.sort(expected[m])[-topk]
        # Products are in f32, so keys at the threshold may be exchanged.
        assert (expected[m][chosen] >= least - 1e-4).all()


def attention_case(dtype, s_q, h_q, topk=200, s_kv=300):
    a = attention_inputs(np.random.default_rng(s_q), dtype, s_q=s_q, s_kv=s_kv, h_q=h_q, d_qk=D_QK, topk=topk)
    indices = a["indices"]
    indices[indices >= s_kv - 20] = 0
    a["kv"][s_kv - 20 :] = np.nan
    indices[0, ::3] = -1
    indices[-1, 1:] = s_kv
    if s_q > 2:
        indices[1] = -1
    rng = np.random.default_rng(1)
    length = rng.integers(1, topk, s_q).astype(np.int32)
    return a | {"attn_sink": rng.standard_normal(h_q).astype(np.float32), "topk_length": length}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 5), (4, 61)])
@pytest.mark.parametrize("optional", [True, False])
def test_sparse_mla(dtype, s_q, h_q, optional):
    """The keys of one query are cut into parts for the emulator's four multiprocessors, those of four are not."""
    a = attention_case(dtype, s_q, h_q)
    if not optional:
        a |= {"attn_sink": None, "topk_length": None}
    attrs = {"sm_scale": D_QK**-0.5, "d_v": D_V}
    got = run("sparse_mla", a, attrs, ((s_q, h_q, D_V), a["q"].dtype), (s_q, h_q), (s_q, h_q))
    for tensor, x, expected in zip(MLA.outputs, got, MLA.reference(**a, **attrs), strict=True):
        assert_close(x, expected, MLA.tolerance[tensor.name][dtype])


@pytest.mark.parametrize(("s_q", "parts"), [(1, 4), (2, 2), (3, 1), (4, 1), (5, 2), (7, 1), (8, 1)])
def test_parts(s_q, parts):
    """On four multiprocessors five blocks take two rounds, the second with one block; ten parts take 1.5 rounds."""
    h_q, topk = 64, 1024
    a = attention_inputs(np.random.default_rng(0), "bfloat16", s_q=s_q, s_kv=9, h_q=h_q, d_qk=D_QK, topk=topk)
    outputs = [np.zeros((s_q, h_q, D_V), a["q"].dtype), *np.zeros((2, s_q, h_q), np.float32)]
    call = Call("sparse_mla", a, {"sm_scale": 1.0, "d_v": D_V}, outputs)
    # A part only needs workspace for its sums and a little more.
    assert max(call.workspace_size() // (s_q * h_q * D_V * 4), 1) == parts


@pytest.mark.parametrize("offset", [0, 1, 16])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 5), (4, 61)])
def test_sparse_mla_fp8(s_q, h_q, offset):
    """Rows may start at any byte. At some addresses Hopper has its own kernel."""
    spec, a = OPS["sparse_mla_fp8"], attention_case("bfloat16", s_q, h_q)
    rows = pack_mla_rows(np.where(np.isnan(a["kv"]), 0, a["kv"]).astype(np.float32))
    rows[-20:] = 0xFF
    memory = np.zeros(rows.size + 64, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    a["kv"] = memory[start : start + rows.size].reshape(rows.shape)
    a["kv"][...] = rows
    attrs = {"sm_scale": D_QK**-0.5, "d_v": D_V}
    got = run("sparse_mla_fp8", a, attrs, ((s_q, h_q, D_V), a["q"].dtype), (s_q, h_q), (s_q, h_q))
    for tensor, x, expected in zip(spec.outputs, got, spec.reference(**a, **attrs), strict=True):
        assert_close(x, expected, spec.tolerance[tensor.name]["bfloat16"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("in_place", [False, True])
def test_write_rows(dtype, offset, in_place):
    """Addresses at which 16 bytes are copied at a time, and others, with a cache of several blocks."""
    rng = np.random.default_rng(offset)
    numpy_type, width = DTYPES.get(dtype, np.dtype(np.uint8)), 656

    def tensor(*shape):
        size = int(np.prod(shape)) * numpy_type.itemsize
        memory = rng.integers(0, 256, size + 64, np.uint8)
        start = -memory.ctypes.data % 16 + offset
        return memory[start : start + size].view(numpy_type).reshape(shape)

    cache, rows, out = tensor(2, 37, width), tensor(2, 9, width), tensor(2, 37, width)
    positions = rng.integers(-2, 40, (2, 9)).astype(np.int32)
    positions[0, 4:] = 5
    (expected,) = OPS["write_rows"].reference(cache, rows, positions)
    before = cache.copy()
    inputs = {"cache": cache, "rows": rows, "positions": positions}
    call = Call("write_rows", inputs, {}, [cache if in_place else out])
    assert call.workspace_size() == 0
    call.run()
    assert (cache if in_place else out).tobytes() == expected.tobytes()
    assert in_place or cache.tobytes() == before.tobytes()


@pytest.mark.parametrize("s_q", [1, 9])
def test_dsa_attention(s_q):
    s_kv, h_q, topk = 260, 16, 48
    rng = np.random.default_rng(s_q)
    index = ranges(indexer_inputs(rng, INDEXER.variants[1], s_q=max(s_q, 4), s_kv=s_kv, h_idx=9, d_idx=D_IDX), s_kv)
    index = {name: x if x is None or len(x) == s_kv else x[:s_q].copy() for name, x in index.items()}
    a = attention_inputs(rng, "bfloat16", s_q=s_q, s_kv=s_kv, h_q=h_q, d_qk=D_QK)
    sink = rng.standard_normal(h_q).astype(np.float32)
    inputs = {
        **{f"index_{n}": index[n] for n in ("q", "k", "k_scale")},
        **{n: index[n] for n in ("weights", "ks", "ke")},
        **{"q": a["q"], "kv": a["kv"], "attn_sink": sink},
    }
    attrs = {"topk": topk, "sm_scale": D_QK**-0.5, "d_v": D_V}
    out, lse = run("dsa_attention", inputs, attrs, ((s_q, h_q, D_V), a["q"].dtype), (s_q, h_q))
    (indices,) = run("indexer_topk", index, {"topk": topk}, ((s_q, topk), np.int32))
    wide, _, sums = MLA.reference(a["q"], a["kv"], indices, sink, sm_scale=attrs["sm_scale"], d_v=D_V)
    assert_close(out, wide, MLA.tolerance["out"]["bfloat16"])
    assert_close(lse, sums, MLA.tolerance["lse"]["bfloat16"])
