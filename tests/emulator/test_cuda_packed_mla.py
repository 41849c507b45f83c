"""The CUDA sparse attention over packed rows, run on the CPU, against float64 over the numbers that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from samples import attention_inputs

from emulator import Emulator

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source
from dsa_tvm.schedules.cuda.mla import combine
from dsa_tvm.schedules.cuda.mla.portable import kernel as sparse_mla
from dsa_tvm.schedules.cuda.mla.portable.kernel import default

from dsa_tvm.ops.sparse_mla_fp8 import KERNEL
from emulator.attention import SCHEDULES, compare, launch, misaligned, packed

#: Decisions, d_qk and d_v. Rows of the small ones are no multiple of 16 bytes.
KERNELS = {
    "small": (default(KERNEL), 192, 128),
    "few_heads": (default(KERNEL, few_heads=True), 576, 512),
    "full": (default(KERNEL), 576, 512),
    "full_512": (default(KERNEL, "sm_80"), 512, 512),
    "wide": (default(KERNEL, "sm_90a"), 576, 512),
}


def all_symbols():
    for name, (c, d_qk, d_v) in KERNELS.items():
        yield name, sparse_mla.tensor_ir(KERNEL, c, d_qk, d_v)
        yield f"{name}_combine", combine.tensor_ir({"T": "bfloat16"}, d_v)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(source.cuda_source(list(all_symbols())), source.DEVICE_HEADERS, tmp_path_factory.mktemp("packed"))


def attend(emulator, name, given, sm_scale, parts=1, order=0, eager=False, shift=False):
    """The outputs; with `shift`, q and out are at an element and kv is at a byte between two boundaries of 16."""
    c, d_qk, d_v = KERNELS[name]
    q, kv = given["q"], given["kv"]
    out = np.full((*q.shape[:2], d_v), 77, q.dtype)
    stored = misaligned(out) if shift else out
    if shift:
        given = given | {"q": misaligned(q), "kv": misaligned(kv), "shapes": (q.shape, len(kv))}
    how = (c, c.shared_bytes(KERNEL, d_qk, d_v), (stored, d_v), given, sm_scale, parts, order, eager)
    others = launch(emulator, (name, f"{name}_combine"), *how)
    return stored[: out.size].reshape(out.shape) if shift else out, *others


def check(emulator, name, arguments, **options):
    _, d_qk, d_v = KERNELS[name]
    given, meant = packed(arguments, d_v)
    return compare(attend(emulator, name, given, d_qk**-0.5, **options), meant, "bfloat16", d_qk**-0.5, d_v)


def inputs(name, seed=0, **sizes):
    sizes = {"s_q": 2, "s_kv": 150, "d_qk": KERNELS[name][1], **sizes}
    return attention_inputs(np.random.default_rng(seed), "bfloat16", **sizes)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("h_q", [1, 16, 17, 128])
def test_heads(emulator, name, h_q):
    check(emulator, name, inputs(name, h_q, s_q=1, h_q=h_q, topk=50))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("topk", [1, 16, 33, 64, 129])
def test_lengths(emulator, name, topk):
    order, eager = SCHEDULES[topk % 4]
    check(emulator, name, inputs(name, topk, s_q=1, h_q=5, topk=topk), order=order, eager=eager)


@pytest.mark.parametrize("name", ["small", "full"])
def test_every_schedule_gives_the_same_bits(emulator, name):
    arguments = inputs(name, s_q=1, topk=150)
    arguments["indices"][0, 100:] = -1
    for parts in (1, 3):
        first = check(emulator, name, arguments, parts=parts)
        given, _ = packed(arguments, KERNELS[name][2])
        for order, eager in SCHEDULES[1:]:
            again = attend(emulator, name, given, KERNELS[name][1] ** -0.5, parts, order, eager)
            for x, y in zip(again, first, strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["small", "full", "wide"])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_invalid_indices_are_skipped(emulator, name, parts):
    arguments = inputs(name, s_q=5, h_q=5, topk=100)
    indices = arguments["indices"]
    indices[0] = -1
    indices[1, ::2] = 150
    indices[2, :] = [-(2**31), 2**31 - 1] * 50
    indices[3, 1:] = -1
    indices[4, :99] = 150
    arguments["attn_sink"] = np.linspace(-2, 2, 5, dtype=np.float32)
    arguments["topk_length"] = np.array([0, 99, 50, 2**31 - 1, 100], np.int32)
    out, max_logits, lse = check(emulator, name, arguments, parts=parts)
    for row in (0, 2):
        assert (out[row] == 0).all() and np.isneginf(max_logits[row]).all() and np.isposinf(lse[row]).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("parts", [1, 2])
def test_alignment_of_one_byte(emulator, name, parts):
    arguments = inputs(name, s_q=1, h_q=20, topk=70)
    for eager in (False, True):
        check(emulator, name, arguments, parts=parts, order=2, eager=eager, shift=True)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shift", [False, True])
def test_nan_of_an_unselected_row_never_shows(emulator, name, shift):
    arguments = inputs(name, s_q=1, s_kv=300, topk=64)
    arguments["indices"] = arguments["indices"] % 149 + 1
    arguments["indices"][:, ::7] = -1
    arguments["indices"][:, ::11] = 300
    given, meant = packed(arguments, KERNELS[name][2])
    for kv, nan in ((given["kv"], 0xFF), (meant["kv"], np.nan)):
        kv[150:] = nan
        kv[0] = nan
    _, d_qk, d_v = KERNELS[name]
    actual = compare(attend(emulator, name, given, d_qk**-0.5, shift=shift), meant, "bfloat16", d_qk**-0.5, d_v)
    assert np.isfinite(actual[0].astype(np.float32)).all()


@pytest.mark.parametrize("name", ["small", "full"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("what", ["element", "scale", "key only"])
def test_nan_of_a_selected_row_shows(emulator, name, parts, what):
    d_v = KERNELS[name][2]
    arguments = inputs(name, s_q=2, s_kv=250, topk=100)
    arguments["indices"][:] = np.arange(100)
    arguments["indices"][0, 60] = 200
    given, meant = packed(arguments, d_v)
    row, numbers = given["kv"][200], meant["kv"][200]
    if what == "element":
        row[17], numbers[17] = 0x7F, np.nan
    elif what == "scale":
        row[d_v : d_v + 4], numbers[:128] = 0xFF, np.nan
    else:
        row[-2:], numbers[-1] = 0xFF, np.nan
    actual = compare(attend(emulator, name, given, 0.1, parts), meant, "bfloat16", 0.1, d_v)
    assert np.isnan(actual[2][0]).all() and np.isfinite(actual[0][1].astype(np.float32)).all()


def test_every_code_with_a_scale_that_rounds(emulator):
    """One key with weight 1: out is the row's value, its bits those of e4m3 times scale rounded to bf16."""
    rng = np.random.default_rng(0)
    q = np.zeros((8, 1, 576), attention_inputs(rng, "bfloat16")["q"].dtype)
    rows = np.zeros((8, 656), np.uint8)
    codes = np.arange(256, dtype=np.uint8)
    rows[:, :512] = np.tile(codes * (codes % 128 < 127), 16).reshape(8, 512)  # a NaN would be all of out
    rows[:, 512:528] = rng.uniform(1e-3, 3, (8, 4)).astype(np.float32).view(np.uint8)
    rows[0, 512:516] = np.float32(1e35).reshape(1).view(np.uint8)
    given = {"q": q, "kv": rows, "indices": np.arange(8, dtype=np.int32)[:, None]}
    out, _, _ = attend(emulator, "full", given, 1.0)
    np.testing.assert_array_equal(out[:, 0].astype(np.float32), packed_values(rows))


def packed_values(rows):
    """The values of packed rows by ml_dtypes: not the code that the reference has."""
    import ml_dtypes

    elements = rows[:, :512].view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(-1, 4, 128)
    scales = np.ascontiguousarray(rows[:, 512:528]).view(np.float32)
    return (elements * scales[:, :, None]).reshape(-1, 512).astype(ml_dtypes.bfloat16).astype(np.float32)
