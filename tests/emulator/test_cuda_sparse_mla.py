"""The CUDA sparse attention, run on the CPU, against float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from samples import DTYPES, repeat_rows

from emulator import Emulator

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source

from emulator.attention import (
    KERNELS,
    SCHEDULES,
    SMALL,
    SPEC,
    TYPES,
    attend,
    check,
    check_last_valid,
    check_narrow_sums,
    inputs,
    symbols,
)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(source.cuda_source(list(symbols())), source.DEVICE_HEADERS, tmp_path_factory.mktemp("sparse_mla"))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("h_q", [1, 3, 16, 61, 64, 125, 128])
def test_heads(emulator, name, h_q):
    check(emulator, name, inputs(name, h_q, s_q=1 if h_q > 64 else 2, h_q=h_q, topk=50))


@pytest.mark.parametrize("name", ["f32_full", "bf16_full", "f16_full"])
def test_full_size(emulator, name):
    check(emulator, name, inputs(name, s_q=1, h_q=20, topk=70))
    check(emulator, name, inputs(name, s_q=1, h_q=3, topk=70), parts=3, order=1, eager=True)


@pytest.mark.parametrize("name", ["bf16_full", "f16_full"])
def test_sums_of_tensor_cores(emulator, name):
    check_narrow_sums(emulator, partial(check, emulator, name), inputs(name, s_q=1, s_kv=700, h_q=20, topk=600))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("topk", [1, 31, 32, 33, 47, 64, 97, 300])
def test_lengths(emulator, name, topk):
    order, eager = SCHEDULES[topk % 4]
    check(emulator, name, inputs(name, topk, topk=topk), order=order, eager=eager)


@pytest.mark.parametrize("name", TYPES)
def test_many_keys(emulator, name):
    """After the first hundreds of keys, no weight is large any more."""
    check(emulator, name, inputs(name, topk=1500, s_kv=900))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("distinct", [1, 3])
@pytest.mark.parametrize(("topk", "parts"), [(2048, 1), (4096, 1), (4096, 64)])
def test_repetitive_rows(emulator, name, distinct, topk, parts):
    """With thousands of equal terms, a sum that is one long chain errs the same way at every step."""
    arguments = inputs(name, distinct, s_q=1, s_kv=50, h_q=2, topk=topk)
    repeat_rows(arguments["kv"], distinct)
    arguments["indices"][:] = np.arange(topk) % 50
    check(emulator, name, arguments, parts=parts)
    if name != "f32":
        # As tensor cores do, which cut off what a sum has no place for.
        with emulator.narrow_sums(23):
            check(emulator, name, arguments, parts=parts)


@pytest.mark.parametrize("position", [0, 255, 256, 2047, 2048, 4095])
@pytest.mark.parametrize("name", TYPES)
def test_the_last_valid_index(emulator, name, position):
    check_last_valid(partial(check, emulator, name), inputs(name, s_q=1, h_q=3), 4096, position)


@pytest.mark.parametrize("name", SMALL)
def test_every_schedule_gives_the_same_bits(emulator, name):
    arguments = inputs(name, topk=150)
    arguments["indices"][0, 100:] = -1
    for parts in (1, 3):
        first = check(emulator, name, arguments, parts=parts)
        for order, eager in SCHEDULES[1:]:
            again = attend(emulator, name, arguments, KERNELS[name][2] ** -0.5, parts, order, eager)
            for x, y in zip(again, first, strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("parts", [2, 5, 40])
def test_parts(emulator, name, parts):
    """Some parts have no valid key, and some only scores of -inf."""
    arguments = inputs(name, s_q=4, h_q=5, topk=200)
    arguments["q"] = np.abs(arguments["q"])
    arguments["kv"][7, 64 if KERNELS[name][2] > 64 else 5] = -np.inf
    arguments["indices"] = np.where(arguments["indices"] == 7, 8, arguments["indices"])
    arguments["indices"][1, :100] = -1
    arguments["indices"][2, 100:] = 7
    arguments["indices"][3] = -1
    arguments["attn_sink"] = np.linspace(-2, 2, 5, dtype=np.float32)
    check(emulator, name, arguments, parts=parts, order=parts)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_invalid_indices_are_skipped(emulator, name, parts):
    arguments = inputs(name, s_q=5, topk=100)
    indices = arguments["indices"]
    indices[0] = -1
    indices[1, ::2] = 150
    indices[2, :] = [-(2**31), 2**31 - 1] * 50
    indices[3, 1:] = -1
    indices[4, :99] = 150
    out, max_logits, lse = check(emulator, name, arguments, parts=parts)
    for row in (0, 2):
        assert (out[row] == 0).all() and np.isneginf(max_logits[row]).all() and np.isposinf(lse[row]).all()


@pytest.mark.parametrize("name", SMALL)
def test_nan_of_an_unselected_row_never_shows(emulator, name):
    arguments = inputs(name, s_kv=300, topk=64)
    arguments["indices"] %= 150
    arguments["indices"][:, ::7] = -1
    arguments["indices"][:, ::11] = 300
    arguments["kv"][150:] = np.nan
    arguments["kv"][0] = np.nan
    arguments["indices"][arguments["indices"] == 0] = 1
    assert np.isfinite(check(emulator, name, arguments)[0].astype(np.float32)).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("parts", [1, 3])
def test_nan_and_infinity_of_a_selected_row_show(emulator, name, parts):
    arguments = inputs(name, s_q=3, s_kv=250, topk=100)
    arguments["indices"][:] = np.arange(100)
    arguments["indices"][0, 60] = 200
    arguments["indices"][1, 3] = 201
    arguments["kv"][200, 4] = np.nan
    arguments["kv"][201, 90] = np.inf  # in the part that is key only
    check(emulator, name, arguments, parts=parts)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("sink", [None, 0.5, -np.inf])
def test_all_scores_minus_infinity(emulator, name, sink):
    arguments = inputs(name, topk=70)
    arguments["q"] = np.abs(arguments["q"])
    arguments["kv"][:, 95] = -np.inf
    if sink is not None:
        arguments["attn_sink"] = np.full(16, sink, np.float32)
    for parts in (1, 2):
        check(emulator, name, arguments, parts=parts)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("sm_scale", [3.0, -3.0, 0.0])
def test_large_scores_do_not_overflow(emulator, name, sm_scale, parts):
    """The exponential of scores near 100 exceeds f32. Their error shows in out, so the bound is wider."""
    arguments = inputs(name, s_q=1, topk=100)
    expected = SPEC.reference(**arguments, sm_scale=sm_scale, d_v=64)
    for x, y in zip(attend(emulator, name, arguments, sm_scale, parts), expected, strict=True):
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_scores_that_rise_or_fall(emulator, name, falling):
    """The largest scores of successive blocks are far apart, rising or falling, and far below 0."""
    arguments = inputs(name, s_q=1, h_q=7, topk=120)
    arguments["q"][:] = np.arange(96) >= 64
    arguments["kv"][:, 64:] = (np.arange(150)[:, None] / 4 - 50).astype(arguments["kv"].dtype)
    arguments["indices"][0] = np.arange(150)[::-1][:120] if falling else np.arange(120)
    check(emulator, name, arguments, 1 / 16)
    check(emulator, name, arguments, 1 / 16, parts=3)


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0, np.inf, -np.inf, 30.0, 1000.0])
@pytest.mark.parametrize("parts", [1, 2])
def test_attn_sink_changes_out_only(emulator, value, parts):
    arguments = inputs("f32", h_q=4)
    arguments["indices"][0] = -1
    plain = check(emulator, "f32", arguments, parts=parts)
    sunk = check(emulator, "f32", arguments | {"attn_sink": np.full(4, value, np.float32)}, parts=parts)
    np.testing.assert_array_equal(sunk[1], plain[1])
    np.testing.assert_array_equal(sunk[2], plain[2])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("parts", [1, 2])
def test_topk_length(emulator, name, parts):
    arguments = inputs(name, s_q=6, topk=50)
    arguments["topk_length"] = np.array([0, 1, 49, 50, 2**31 - 1, -(2**31)], np.int32)
    check(emulator, name, arguments, parts=parts)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("parts", [1, 2])
def test_alignment_of_one_element(emulator, name, parts):
    arguments = inputs(name, h_q=20, topk=70)
    for eager in (False, True):
        check(emulator, name, arguments, parts=parts, order=2, eager=eager, shift=True)


@pytest.mark.parametrize(("s_kv", "topk"), [(0, 5), (1, 1000), (95, 128)])
def test_few_keys(emulator, s_kv, topk):
    arguments = inputs("bf16", s_kv=s_kv, topk=topk)
    arguments["indices"] = np.random.default_rng(topk).integers(-5, s_kv + 40, (2, topk)).astype(np.int32)
    check(emulator, "bf16", arguments, parts=2)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_out_is_rounded_to_nearest_even(emulator, name):
    """Two keys of equal weight: out is their mean, halfway between two codes for every other pair."""
    dtype = DTYPES[KERNELS[name][0]]
    codes = np.arange(1 << 16, dtype=np.uint16)[::97].view(dtype)
    values = codes[np.isfinite(codes.astype(np.float32)) & (np.abs(codes.astype(np.float32)) < 1e30)]
    values = np.sort(values.astype(np.float32)).astype(dtype)[: len(values) // 64 * 64].reshape(-1, 64)
    kv = np.zeros((2 * len(values), 96), dtype)
    kv[0::2, :64] = values
    kv[1::2, :64] = np.roll(values, 1, axis=1)
    q = np.zeros((len(values), 1, 96), dtype)
    indices = np.arange(2 * len(values), dtype=np.int32).reshape(-1, 2)
    out, _, lse = attend(emulator, name, {"q": q, "kv": kv, "indices": indices}, 1.0)
    mean = (kv[0::2, :64].astype(np.float64) + kv[1::2, :64].astype(np.float64)) / 2
    expected = mean.astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(out[:, 0].view(np.uint16) & 0x7FFF, expected.view(np.uint16) & 0x7FFF)
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)
