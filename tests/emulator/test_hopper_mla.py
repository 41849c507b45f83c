"""The sparse attention for sm_90a, run on the CPU, against float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from samples import repeat_rows

from emulator import Emulator

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source

from dsa_tvm import pack_mla_rows, unpack_mla_rows
from emulator.attention import SPEC, check_last_valid, check_narrow_sums, compare
from emulator.hopper_mla_launch import D_V, KERNELS, attend, check, inputs, symbols

SCHEDULES = [(0, False), (1, True), (2, False), (3, True), (4, False)]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(source.cuda_source(list(symbols())), source.DEVICE_HEADERS, tmp_path_factory.mktemp("hopper_mla"))


@pytest.mark.parametrize("h_q", [1, 33, 64, 65, 128])
def test_heads(emulator, h_q):
    check(emulator, "bf16", inputs("bf16", h_q, h_q=h_q, topk=70))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("topk", [1, 63, 64, 65, 127, 128, 129, 300, 400])
def test_lengths(emulator, name, topk):
    order, eager = SCHEDULES[topk % len(SCHEDULES)]
    check(emulator, name, inputs(name, topk, topk=topk), order=order, eager=eager)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_sums_of_tensor_cores(emulator, name):
    check_narrow_sums(emulator, partial(check, emulator, name), inputs(name, s_q=1, s_kv=700, h_q=20, topk=600))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("parts", [1, 32])
def test_repetitive_rows(emulator, name, parts):
    """4096 equal rows, also with sums that are cut off as by tensor cores."""
    arguments = inputs(name, s_kv=50, h_q=2, topk=4096)
    repeat_rows(arguments["kv"], 1)
    arguments["indices"][:] = np.arange(4096) % 50
    check(emulator, name, arguments, parts=parts)
    with emulator.narrow_sums(23):
        check(emulator, name, arguments, parts=parts)


@pytest.mark.parametrize("position", [0, 383, 384, 3071, 3072, 4095])
def test_the_last_valid_index(emulator, position):
    check_last_valid(partial(check, emulator, "bf16"), inputs("bf16", h_q=3), 4096, position)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("valid", [1, 2, 3, 5, 12, 20, 40, 80, 130, 200])
def test_few_valid_keys_among_many(emulator, name, valid):
    """Few keys have most of the weight. With weights in 16 bits, out would miss the tolerance."""
    rng = np.random.default_rng(valid)
    arguments = inputs(name, valid, s_q=3, h_q=[1, 40, 64, 70][valid % 4], topk=300)
    for row in arguments["indices"]:
        row[rng.permutation(300)[valid:]] = -1
    # Whole tiles and pairs without any, so that warpgroup 0 or 1 has all of them.
    arguments["indices"][1, :64] = -1
    arguments["indices"][2, 64:128] = -1
    order, eager = SCHEDULES[valid % len(SCHEDULES)]
    for parts in (1, 3):
        check(emulator, name, arguments, parts=parts, order=order, eager=eager)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("large", [(3,), (70,), (3, 70), (3, 70, 290), (200,), (130, 200), (299,)])
def test_a_key_of_most_of_the_weight(emulator, name, large):
    """The tiles that have large weights, and which of the warpgroups has to do with them."""
    arguments = inputs(name, h_q=33, topk=300)
    arguments["indices"][0] = np.arange(300)
    q = arguments["q"].astype(np.float32).mean(axis=1)[0]
    for i, at in enumerate(large):
        arguments["kv"][at] += (q * (40 + 9 * i)).astype(arguments["kv"].dtype)
    for order, eager in SCHEDULES:
        check(emulator, name, arguments, order=order, eager=eager)


@pytest.mark.parametrize("parts", [1, 3])
def test_every_schedule_gives_the_same_bits(emulator, parts):
    arguments = inputs("bf16", topk=330)
    arguments["indices"][0, 100:150] = -1
    first = check(emulator, "bf16", arguments, parts=parts)
    for order, eager in SCHEDULES[1:]:
        again = attend(emulator, "bf16", arguments, 576**-0.5, parts, order, eager)
        for x, y in zip(again, first, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("parts", [2, 7])
def test_parts(emulator, name, parts):
    """Some parts have no valid key, and some only scores of -inf."""
    arguments = inputs(name, s_q=4, h_q=5, topk=400)
    arguments["q"] = np.abs(arguments["q"])
    arguments["kv"][7, 500] = -np.inf
    arguments["indices"] = np.where(arguments["indices"] == 7, 8, arguments["indices"])
    arguments["indices"][1, :100] = -1
    arguments["indices"][2, 100:] = 7
    arguments["indices"][3] = -1
    arguments["attn_sink"] = np.linspace(-2, 2, 5, dtype=np.float32)
    check(emulator, name, arguments, parts=parts, order=parts)


@pytest.mark.parametrize("parts", [1, 4])
def test_invalid_indices_are_skipped(emulator, parts):
    arguments = inputs("bf16", s_q=5, s_kv=150, topk=200)
    indices = arguments["indices"]
    indices[0] = -1
    indices[1, ::2] = 150
    indices[2, :] = [-(2**31), 2**31 - 1] * 100
    indices[3, 1:] = -1
    indices[4, :199] = 150
    out, max_logits, lse = check(emulator, "bf16", arguments, parts=parts)
    for row in (0, 2):
        assert (out[row] == 0).all() and np.isneginf(max_logits[row]).all() and np.isposinf(lse[row]).all()


@pytest.mark.parametrize("name", [name for name in KERNELS if not name.startswith("packed")])
def test_nan_of_an_unselected_row_never_shows(emulator, name):
    arguments = inputs(name, topk=200)
    arguments["indices"] %= 150
    arguments["indices"][:, ::7] = -1
    arguments["indices"][:, ::11] = 300
    arguments["kv"][150:] = np.nan
    arguments["kv"][0] = np.nan
    arguments["indices"][arguments["indices"] == 0] = 1
    assert np.isfinite(check(emulator, name, arguments)[0].astype(np.float32)).all()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("place", [3, 60, 64, 127, 140, 199])
def test_nan_and_infinity_of_a_selected_row_show(emulator, place, parts):
    arguments = inputs("bf16", s_q=3, topk=200)
    arguments["indices"][:] = np.arange(200)
    arguments["indices"][0, place] = 200
    arguments["indices"][1, place] = 201
    arguments["kv"][200, 4] = np.nan
    arguments["kv"][201, 570] = np.inf  # in the part that is key only
    check(emulator, "bf16", arguments, parts=parts)


@pytest.mark.parametrize("sink", [None, 0.5, -np.inf])
def test_all_scores_minus_infinity(emulator, sink):
    arguments = inputs("bf16", topk=150)
    arguments["q"] = np.abs(arguments["q"])
    arguments["kv"][:, 575] = -np.inf
    if sink is not None:
        arguments["attn_sink"] = np.full(16, sink, np.float32)
    for parts in (1, 2):
        check(emulator, "bf16", arguments, parts=parts)


@pytest.mark.parametrize("name", ["bf16", "f16"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("sm_scale", [1.0, -1.0, 0.0])
def test_large_scores_do_not_overflow(emulator, name, sm_scale, parts):
    """The exponential of scores near 100 exceeds f32. Their error shows in out, so the bound is wider."""
    arguments = inputs(name, topk=200)
    expected = SPEC.reference(**arguments, sm_scale=sm_scale, d_v=D_V)
    for x, y in zip(attend(emulator, name, arguments, sm_scale, parts), expected, strict=True):
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("falling", [False, True])
def test_scores_that_rise_or_fall(emulator, falling):
    """The largest scores of successive tiles are far apart, rising or falling, and far below 0."""
    arguments = inputs("bf16", h_q=7, topk=290)
    arguments["q"][:] = np.arange(576) >= 512
    arguments["kv"][:, 512:] = (np.arange(300)[:, None] / 2 - 200).astype(arguments["kv"].dtype)
    arguments["indices"][0] = np.arange(300)[::-1][:290] if falling else np.arange(290)
    check(emulator, "bf16", arguments, 1 / 64)
    check(emulator, "bf16", arguments, 1 / 64, parts=3)


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0, np.inf, -np.inf, 30.0, 1000.0])
def test_attn_sink_changes_out_only(emulator, value):
    arguments = inputs("bf16", s_q=2, h_q=4)
    arguments["indices"][0] = -1
    plain = check(emulator, "bf16", arguments)
    sunk = check(emulator, "bf16", arguments | {"attn_sink": np.full(4, value, np.float32)})
    np.testing.assert_array_equal(sunk[1], plain[1])
    np.testing.assert_array_equal(sunk[2], plain[2])


@pytest.mark.parametrize("parts", [1, 3])
def test_topk_length(emulator, parts):
    arguments = inputs("bf16", s_q=7, topk=150)
    arguments["topk_length"] = np.array([0, 1, 64, 149, 150, 2**31 - 1, -(2**31)], np.int32)
    check(emulator, "bf16", arguments, parts=parts)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_out_is_aligned_to_an_element(emulator, name):
    arguments = inputs(name, s_q=2, h_q=70, topk=70)
    aligned = attend(emulator, name, arguments, 576**-0.5)
    for order in (0, 1):
        for x, y in zip(attend(emulator, name, arguments, 576**-0.5, order=order, shift=True), aligned, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("s_kv", "topk"), [(0, 5), (1, 1000), (95, 128)])
def test_few_keys(emulator, s_kv, topk):
    arguments = inputs("bf16", s_q=2, s_kv=s_kv, topk=topk)
    arguments["indices"] = np.random.default_rng(topk).integers(-5, s_kv + 40, (2, topk)).astype(np.int32)
    check(emulator, "bf16", arguments, parts=2)
    check(emulator, "bf16", arguments)


@pytest.mark.parametrize("byte", [17, 512 + 7, 528 + 1])
def test_nan_of_a_packed_row(emulator, byte):
    """NaN in an element, a scale or the part that is only a key shows if the row is selected."""
    arguments = inputs("packed", s_q=2, topk=200)
    rows = pack_mla_rows(arguments["kv"])
    rows[200, byte - byte % 4 if byte > 511 else byte :][: 4 if byte > 511 else 1] = 0x7F if byte < 512 else 0xFF
    arguments["indices"][:] = np.arange(200)
    arguments["indices"][0, 77] = 200
    actual = attend(emulator, "packed", arguments | {"kv": rows}, 0.1)
    compare(actual, arguments | {"kv": unpack_mla_rows(rows)}, "bfloat16", 0.1, D_V)
    assert np.isnan(actual[0][0]).any() and np.isfinite(actual[0][1].astype(np.float32)).all()
