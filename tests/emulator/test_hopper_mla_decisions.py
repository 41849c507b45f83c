"""What the sparse attention for sm_90a may be built with, and how it is launched."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda.mla.sm90 import kernel as hopper_mla
from dsa_tvm.schedules.cuda.mla.sm90.kernel import Decisions

from dsa_tvm.gpu.architectures import shared_bytes
from emulator.attention import SPEC
from emulator.hopper_mla_launch import D_V, DEFAULT


@pytest.mark.parametrize("variant", [v for v in SPEC.variants if v["T"] != "float32"], ids=lambda v: v["T"])
def test_defaults_fit_in_shared_memory(variant):
    for d_qk in (512, 576):
        assert DEFAULT.shared_bytes(variant, d_qk, 512) <= shared_bytes("sm_90a")


@pytest.mark.parametrize("wrong", [{"consumer_registers": 220}, {"consumer_registers": 240}, {"split_keys": 96}])
def test_decisions_out_of_bounds(wrong):
    with pytest.raises(ValueError, match="sparse_mla"):
        Decisions(**{"consumer_registers": 208, "split_keys": 128} | wrong)


def test_packed_keys_need_registers():
    decisions = Decisions(consumer_registers=216, split_keys=128)
    hopper_mla.tensor_ir({"T": "bfloat16"}, decisions, 576, D_V)
    with pytest.raises(ValueError, match="too few registers"):
        hopper_mla.tensor_ir({"T": "bfloat16", "K": "float8_e4m3fn"}, decisions, 576, D_V)


@pytest.mark.parametrize(("dtype", "d_qk", "d_v"), [("float32", 576, 512), ("bfloat16", 96, 64), ("float16", 576, 448)])
def test_there_is_no_such_kernel(dtype, d_qk, d_v):
    with pytest.raises(ValueError, match="no kernel of warpgroups"):
        hopper_mla.tensor_ir({"T": dtype}, DEFAULT, d_qk, d_v)


def test_there_is_no_such_packed_kernel():
    with pytest.raises(ValueError, match="no kernel of warpgroups"):
        hopper_mla.tensor_ir({"T": "float16", "K": "float8_e4m3fn"}, DEFAULT, 576, D_V)
