"""The decisions of the CUDA indexer: what they take, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from dsa_tvm.gpu.architectures import shared_bytes
from dsa_tvm.ops import OPS

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda.indexer.portable.kernel import DEFAULT, Decisions, choices, default, product_of, tensor_ir

SPEC = OPS["lightning_indexer"]
BF16 = SPEC.variants[1]


@pytest.mark.parametrize("arch", [*DEFAULT, "sm_86"])
@pytest.mark.parametrize("d_idx", [32, 64, 96, 128])
def test_defaults_fit(d_idx, arch):
    for variant in SPEC.variants:
        for few_queries in (False, True):
            c = default(variant, d_idx, few_queries, arch)
            assert c.shared_bytes(variant, product_of(variant, arch), d_idx, 64) <= shared_bytes(arch)
            assert all(getattr(c, name) in values for name, values in choices(arch).items())
            assert default(variant, d_idx, few_queries, "sm_86") == default(variant, d_idx, few_queries)


@pytest.mark.parametrize("arch", DEFAULT)
def test_defaults_are_what_is_said(arch):
    assert default(BF16, 128, few_queries=False, arch=arch) == DEFAULT[arch]


def test_what_does_not_fit_is_refused():
    for wrong in ({"warps": 3}, {"key_tiles": 3}, {"head_tiles": 1}, {"queries": 0}, {"stages": 0}, {"stages": 9}):
        with pytest.raises(ValueError, match="lightning_indexer"):
            Decisions(**{**asdict(DEFAULT["cuda"]), **wrong})
    with pytest.raises(ValueError, match="d_idx"):
        tensor_ir(BF16, "bfloat16", DEFAULT["cuda"], 48)
    with pytest.raises(ValueError, match="d_idx: 1024 does not fit"):
        default(SPEC.variants[0], 1024, few_queries=True)
    with pytest.raises(ValueError, match="key_tiles: expected at most 2, got 4"):
        tensor_ir(BF16, "bfloat16", replace(DEFAULT["cuda"], key_tiles=4), 256)
