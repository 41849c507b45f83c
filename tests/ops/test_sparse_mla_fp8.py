"""Sparse attention over packed rows against float64, and packing itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from compare import assert_close
from devices import run
from samples import packed_attention_inputs

import dsa_tvm
from dsa_tvm.ops import OPS

SPEC = OPS["sparse_mla_fp8"]


def unpacked(rows):
    """The numbers of packed rows, by ml_dtypes instead of the code of the reference."""
    elements = rows[:, :512].view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(-1, 4, 128)
    scales = np.ascontiguousarray(rows[:, 512:528]).view(np.float32)
    with np.errstate(all="ignore"):
        values = (elements * scales[:, :, None]).reshape(-1, 512).astype(ml_dtypes.bfloat16)
    return np.concatenate([values, np.ascontiguousarray(rows[:, 528:]).view(ml_dtypes.bfloat16)], 1)


SCALE = 192**-0.5


def check(arguments, device, **options):
    with np.errstate(all="ignore"):
        expected = SPEC.reference(**arguments, sm_scale=SCALE, d_v=512)
    actual = run("sparse_mla_fp8", device, **arguments, sm_scale=SCALE, **options)
    for output, x, y in zip(SPEC.outputs, actual, expected, strict=True):
        assert_close(x, y, SPEC.tolerance[output.name]["bfloat16"])
    return actual


@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize("h_q", [1, 16, 17, 128])
def test_sizes(d_qk, h_q, device):
    check(packed_attention_inputs(np.random.default_rng(h_q), d_qk=d_qk, h_q=h_q), device)


@pytest.mark.parametrize("topk", [1, 12, 47, 48, 49, 500])
def test_lengths(topk, device):
    check(packed_attention_inputs(np.random.default_rng(topk), topk=topk), device)


def test_it_is_sparse_mla_over_what_the_rows_stand_for():
    """On the CPU, results are equal bit for bit."""
    rng = np.random.default_rng(0)
    arguments = packed_attention_inputs(rng, s_q=4, h_q=17, topk=100)
    rows = arguments["kv"]
    rows[:, :512] = rng.integers(0, 256, (300, 512))
    rows[:, 512:528] = rng.uniform(1e-6, 0.01, (300, 4)).astype(np.float32).view(np.uint8)
    rows[7, 512:516] = np.float32(1e-41).reshape(1).view(np.uint8)
    # Some selected rows contain NaN.
    rows[100:, :512] &= np.where((rows[100:, :512] & 0x7F) == 0x7F, 0x80, 0xFF).astype(np.uint8)
    arguments["indices"][1:] = np.where(arguments["indices"][1:] < 100, 150, arguments["indices"][1:])
    actual = run("sparse_mla_fp8", "cpu", **arguments, sm_scale=SCALE)
    expected = run("sparse_mla", "cpu", **arguments | {"kv": unpacked(rows)}, sm_scale=SCALE)
    assert np.isnan(actual[2][0]).all() and np.isfinite(actual[2][1:]).all()
    for x, y in zip(actual, expected, strict=True):
        assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes()


def test_invalid_indices_are_skipped(device):
    arguments = packed_attention_inputs(np.random.default_rng(0), s_q=4, topk=100)
    indices = arguments["indices"]
    indices[0] = -1
    indices[1, ::2] = 300
    indices[2, :] = [-(2**31), 2**31 - 1] * 50
    indices[3, 1:] = -1
    length = np.array([3, 99, 100, 2**31 - 1], np.int32)
    sink = np.linspace(-2, 2, 16, dtype=np.float32)
    out, max_logits, lse = check(arguments | {"topk_length": length, "attn_sink": sink}, device)
    for row in (0, 2):
        assert (out[row] == 0).all() and np.isneginf(max_logits[row]).all() and np.isposinf(lse[row]).all()


def test_nan_of_an_unselected_row_never_shows(device):
    arguments = packed_attention_inputs(np.random.default_rng(0))
    arguments["indices"] %= 150
    arguments["indices"][:, ::7] = -1
    arguments["indices"][:, ::11] = 300
    arguments["kv"][150:] = 0xFF
    assert np.isfinite(check(arguments, device)[0].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("first", "last", "byte"), [(17, 18, 0x7F), (400, 401, 0xFF), (516, 520, 0xFF), (654, 656, 0xFF)]
)
def test_nan_of_a_selected_row_shows(first, last, byte, device):
    """NaN in an element, in a scale, or in the part that is only a key."""
    arguments = packed_attention_inputs(np.random.default_rng(0), s_q=2, topk=100)
    arguments["indices"][:] = np.arange(100)
    arguments["indices"][0, 60] = 200
    arguments["kv"][200, first:last] = byte
    _, _, lse = check(arguments, device)
    assert np.isnan(lse[0]).all() and np.isfinite(lse[1]).all()


@pytest.mark.parametrize("offset", [1, 2, 4, 8, 15])
def test_any_address(offset):
    arguments = packed_attention_inputs(np.random.default_rng(0))
    memory = np.zeros(arguments["kv"].size + 80, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    shifted = memory[start : start + arguments["kv"].size].reshape(arguments["kv"].shape)
    shifted[...] = arguments["kv"]
    expected = run("sparse_mla_fp8", "cpu", **arguments, sm_scale=SCALE)
    for x, y in zip(check(arguments | {"kv": shifted}, "cpu"), expected, strict=True):
        assert np.array_equal(x, y)


def test_threads_do_not_change_a_bit():
    arguments = packed_attention_inputs(np.random.default_rng(0), s_q=3, h_q=128, topk=200)
    one, *others = (dsa_tvm.sparse_mla_fp8(**arguments, sm_scale=SCALE, num_threads=n) for n in (1, 2, 7))
    for other in others:
        assert all(x.tobytes() == y.tobytes() for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 10), (3, 0), (0, 0), (1, 1)])
def test_empty_and_one(s_q, s_kv, device):
    check(packed_attention_inputs(np.random.default_rng(0), s_q=s_q, s_kv=s_kv), device)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"kv": np.zeros((9, 640), np.uint8)},
            r"kv: expected shape \[s_kv=9, d_packed=656 \(d_qk=576, d_v=512\)\], got",
        ),
        ({"kv": np.zeros((9, 656), np.int16)}, "kv: expected uint8, got"),
        ({"q": np.zeros((3, 16, 512), ml_dtypes.bfloat16)}, r"kv: expected shape .*d_packed=528 \(d_qk=512, d_v=512\)"),
        ({"q": np.zeros((3, 16, 576), np.float16)}, "q: expected bfloat16, got float16"),
        ({"d_v": 128}, "d_v: expected d_v to be one this library serves"),
    ],
)
def test_refusals(changed, words):
    arguments = packed_attention_inputs(np.random.default_rng(0)) | changed
    with pytest.raises(dsa_tvm.ArgumentError, match=f"sparse_mla_fp8: {words}"):
        dsa_tvm.sparse_mla_fp8(**arguments, sm_scale=SCALE)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("d_qk", "d_v"), [(576, 512), (512, 512), (192, 128)])
def test_packing(power_of_two, d_qk, d_v):
    values = np.random.default_rng(0).standard_normal((50, d_qk)).astype(np.float32)
    values[3], values[4, :128] = 0, 448 * 0.25
    rows = dsa_tvm.pack_mla_rows(values, d_v, power_of_two=power_of_two)
    assert rows.shape == (50, d_v + d_v // 32 + 2 * (d_qk - d_v)) and rows.dtype == np.uint8
    scales = np.ascontiguousarray(rows[:, d_v : d_v + d_v // 32]).view(np.float32)
    amax = np.abs(values[:, :d_v]).reshape(50, -1, 128).max(-1)
    least = np.float32(1e-4)
    exact = np.maximum(amax / np.float32(448), least) if power_of_two else np.maximum(amax, least) / np.float32(448)
    if power_of_two:
        assert (np.frexp(scales)[0] == 0.5).all() and (scales >= exact).all() and (scales < 2 * exact).all()
    else:
        np.testing.assert_array_equal(scales, exact)
    assert scales[4, 0] == 0.25
    meant = dsa_tvm.unpack_mla_rows(rows, d_v)
    key_only = values[:, d_v:].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(meant[:, d_v:], key_only)
    assert (np.abs(meant - values) <= 0.0667 * np.abs(values) + 0.002).all()
    if (d_qk, d_v) == (576, 512):
        np.testing.assert_array_equal(meant, unpacked(rows).astype(np.float32))


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 0.03, 0.0437, 0.0447, 0.05469, 0.056, 1.0, 448.0, 3e4])
def test_powers_of_two_are_those_of_other_packers(name, size):
    """FlashMLA's rule, in float64: the scale is at least 1e-4 before it is rounded up."""
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).uniform(-size, size, (20, 576)).astype(ml_dtypes.bfloat16)
    values[:, ::128] = size
    wide = values.astype(np.float64)
    groups = wide[:, :512].reshape(20, 4, 128)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(groups).max(-1) / 448, 1e-4)))
    codes = torch.from_numpy(groups / scale[:, :, None]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    parts = [codes.reshape(20, 512), scale.astype("<f4").view(np.uint8), np.ascontiguousarray(values[:, 512:])]
    expected = np.concatenate([x.view(np.uint8) for x in parts], 1)
    given = torch.from_numpy(wide).bfloat16() if name == "torch" else values
    np.testing.assert_array_equal(np.asarray(dsa_tvm.pack_mla_rows(given, power_of_two=True)), expected)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("d_qk", [512, 576])
def test_any_layout_packs_and_unpacks_alike(d_qk, power_of_two):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal((50, d_qk)).astype(np.float32)
    wide = np.zeros((50, 2 * d_qk), np.float32)
    wide[:, ::2] = values
    backwards = np.ascontiguousarray(values[::-1])
    rows = dsa_tvm.pack_mla_rows(values, power_of_two=power_of_two)
    for x in (np.asfortranarray(values), wide[:, ::2], backwards[::-1]):
        assert np.array_equal(dsa_tvm.pack_mla_rows(x, power_of_two=power_of_two), rows)
    strided = torch.from_numpy(wide)[:, ::2]
    transposed = torch.from_numpy(np.ascontiguousarray(values.T)).T
    for y in (strided, transposed, transposed.clone().requires_grad_(), torch.from_numpy(backwards).flip(0)):
        assert np.array_equal(dsa_tvm.pack_mla_rows(y, power_of_two=power_of_two).numpy(), rows)
    meant = dsa_tvm.unpack_mla_rows(rows)
    assert np.array_equal(dsa_tvm.unpack_mla_rows(np.asfortranarray(rows)), meant)
    turned = torch.from_numpy(np.ascontiguousarray(rows.T)).T
    assert np.array_equal(dsa_tvm.unpack_mla_rows(turned).float().numpy(), meant)


def test_no_rows_pack_to_no_rows():
    torch = pytest.importorskip("torch")
    for empty in (np.zeros((0, 576), np.float32), torch.zeros(0, 576)):
        rows = dsa_tvm.pack_mla_rows(empty)
        assert rows.shape == (0, 656) and dsa_tvm.unpack_mla_rows(rows).shape == (0, 576)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_torch_packs_alike(power_of_two):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal((50, 576)).astype(np.float32)
    rows = dsa_tvm.pack_mla_rows(torch.from_numpy(values), power_of_two=power_of_two)
    np.testing.assert_array_equal(rows.numpy(), dsa_tvm.pack_mla_rows(values, power_of_two=power_of_two))
    meant = dsa_tvm.unpack_mla_rows(rows)
    assert meant.dtype is torch.bfloat16
    np.testing.assert_array_equal(meant.float().numpy(), dsa_tvm.unpack_mla_rows(rows.numpy()))


def _torch_zeros(*shape):
    return pytest.importorskip("torch").zeros(*shape)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: dsa_tvm.pack_mla_rows(np.zeros((3, 576)), 100),
            "values: expected d_v to be a multiple of 128, got 100",
        ),
        (lambda: dsa_tvm.pack_mla_rows(np.zeros(576)), "values: expected a matrix of at least 512 columns"),
        (
            lambda: dsa_tvm.unpack_mla_rows(np.zeros((3, 500), np.uint8)),
            "rows: expected a matrix of at least 528 columns",
        ),
        (
            lambda: dsa_tvm.pack_mla_rows(np.zeros((3, 576), np.int32)),
            "values: expected a floating-point type, got int32",
        ),
        (lambda: dsa_tvm.pack_mla_rows(np.zeros((3, 576), np.complex64)), "floating-point type, got complex64"),
        (lambda: dsa_tvm.unpack_mla_rows(np.zeros((3, 656), np.float32)), "rows: expected uint8, got float32"),
        (lambda: dsa_tvm.unpack_mla_rows(np.zeros((3, 656), np.int8)), "rows: expected uint8, got int8"),
        (lambda: dsa_tvm.unpack_mla_rows(_torch_zeros(3, 656)), "rows: expected uint8, got float32"),
        (lambda: dsa_tvm.pack_mla_rows(_torch_zeros(3, 576).int()), "floating-point type, got int32"),
        (lambda: dsa_tvm.unpack_mla_rows(np.zeros((3, 657), np.uint8)), "rows: expected an even number of bytes"),
    ],
)
def test_packing_refuses(call, words):
    with pytest.raises(dsa_tvm.ArgumentError, match=words):
        call()


def test_torch_unpacks_a_row_at_any_address():
    torch = pytest.importorskip("torch")
    rows = torch.zeros(657, dtype=torch.uint8)[1:].view(1, 656)
    assert not dsa_tvm.unpack_mla_rows(rows).any()
