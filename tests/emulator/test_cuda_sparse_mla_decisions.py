"""The decisions of the CUDA sparse attention."""

from __future__ import annotations

import pytest

from dsa_tvm.gpu.architectures import shared_bytes
from dsa_tvm.ops import OPS

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda.mla.portable import kernel as sparse_mla
from dsa_tvm.schedules.cuda.mla.portable.kernel import Decisions, default

SPEC = OPS["sparse_mla"]


@pytest.mark.parametrize("arch", [*sparse_mla.DEFAULT, "sm_86", "sm_89", "sm_120"])
@pytest.mark.parametrize("variant", SPEC.variants, ids=lambda v: v["T"])
@pytest.mark.parametrize("few_heads", [False, True])
def test_defaults_are_choices_that_fit(arch, variant, few_heads):
    c = default(variant, arch, few_heads)
    limit = shared_bytes(arch)
    for d_qk in (512, 576):
        c.check(variant, d_qk, 512)
        assert c.shared_bytes(variant, d_qk, 512) <= limit
    assert all(getattr(c, name) in values for name, values in sparse_mla.choices(arch).items())


@pytest.mark.parametrize(
    "wrong", [{"heads": 24}, {"block_keys": 12}, {"stages": 2}, {"warps": 3}, {"score_split": 3}, {"split_keys": 100}]
)
def test_decisions_out_of_bounds(wrong):
    good = {"heads": 32, "block_keys": 16, "stages": 3, "warps": 8, "score_split": 4, "split_keys": 128}
    with pytest.raises(ValueError, match="sparse_mla"):
        Decisions(**good | wrong)
    with pytest.raises(ValueError, match="tiles of scores"):
        Decisions(**good | {"score_split": 1, "warps": 16}).check({"T": "bfloat16"}, 576, 512)
    with pytest.raises(ValueError, match="registers"):
        Decisions(**good | {"heads": 64, "warps": 4}).check({"T": "bfloat16"}, 576, 512)
