"""Launches of the sparse attention for sm_90a in the emulator, and what they should give."""

from __future__ import annotations

import numpy as np
from dsa_tvm.schedules.cuda.mla import combine
from dsa_tvm.schedules.cuda.mla.sm90 import kernel as hopper_mla
from samples import attention_inputs

from emulator.attention import compare, launch, packed

DEFAULT = hopper_mla.DEFAULT["sm_90a"]
D_V = 512

#: Element type and d_qk; those of "packed" have keys of e4m3.
KERNELS = {
    "bf16": ("bfloat16", 576),
    "f16": ("float16", 576),
    "bf16_512": ("bfloat16", 512),
    "packed": ("bfloat16", 576),
    "packed_512": ("bfloat16", 512),
}


def symbols():
    """Every kernel under its name."""
    for name, (dtype, d_qk) in KERNELS.items():
        variant = {"T": dtype, "K": "float8_e4m3fn"} if name.startswith("packed") else {"T": dtype}
        yield name, hopper_mla.tensor_ir(variant, DEFAULT, d_qk, D_V)
    for dtype in ("bfloat16", "float16"):
        yield f"combine_{dtype}", combine.tensor_ir({"T": dtype}, D_V)


def attend(emulator, name, arguments, sm_scale, parts=1, order=0, eager=False, shift=False):
    """out, max_logits and lse of one kernel, or of it and `combine`. With `shift`, out is aligned to an element."""
    dtype, d_qk = KERNELS[name]
    s_q, h_q, _ = arguments["q"].shape
    out = np.full(s_q * h_q * D_V + shift, 77, arguments["q"].dtype)
    shared_bytes, symbols = DEFAULT.shared_bytes({"T": dtype}, d_qk, D_V), (name, f"combine_{dtype}")
    others = launch(emulator, symbols, DEFAULT, shared_bytes, (out, D_V), arguments, sm_scale, parts, order, eager)
    return out[: s_q * h_q * D_V].reshape(s_q, h_q, D_V), *others


def check(emulator, name, arguments, sm_scale=None, **options):
    dtype, d_qk = KERNELS[name]
    sm_scale = d_qk**-0.5 if sm_scale is None else sm_scale
    given = arguments
    if name.startswith("packed"):
        given, arguments = packed(arguments, D_V)
    return compare(attend(emulator, name, given, sm_scale, **options), arguments, dtype, sm_scale, D_V)


def inputs(name, seed=0, **sizes):
    dtype, d_qk = KERNELS[name]
    return attention_inputs(np.random.default_rng(seed), dtype, d_qk=d_qk, **{"s_q": 1, "s_kv": 300, **sizes})
