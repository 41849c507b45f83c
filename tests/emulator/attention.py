"""The kernels of the CUDA sparse attention that the tests run, and their comparison with float64."""

from __future__ import annotations

import numpy as np
from compare import assert_close
from dsa_tvm.schedules.cuda.mla import combine
from dsa_tvm.schedules.cuda.mla.portable import kernel as sparse_mla
from dsa_tvm.schedules.cuda.mla.portable.kernel import Decisions, default
from samples import attention_inputs

from dsa_tvm import pack_mla_rows, unpack_mla_rows
from dsa_tvm.ops import OPS

SPEC = OPS["sparse_mla"]

#: Element type, decisions, d_qk and d_v.
KERNELS = {
    "f32": ("float32", default({"T": "float32"}), 96, 64),
    "bf16": ("bfloat16", default({"T": "bfloat16"}), 96, 64),
    "f16": ("float16", default({"T": "float16"}), 96, 64),
    "f32_wide": ("float32", default({"T": "float32"}, "sm_90a"), 160, 128),
    "bf16_wide": ("bfloat16", default({"T": "bfloat16"}, "sm_90a"), 160, 128),
    "f16_few_heads": ("float16", default({"T": "float16"}, few_heads=True), 96, 64),
    "f16_across_keys": ("float16", Decisions(16, 32, 3, warps=4, score_split=2, split_keys=32), 64, 64),
    "bf16_split": ("bfloat16", Decisions(32, 16, 5, warps=16, score_split=8, split_keys=16), 96, 64),
    "f32_full": ("float32", default({"T": "float32"}, "sm_80"), 576, 512),
    "bf16_full": ("bfloat16", default({"T": "bfloat16"}), 576, 512),
    "f16_full": ("float16", default({"T": "float16"}, "sm_80"), 512, 512),
}
SMALL = [name for name in KERNELS if "full" not in name]
TYPES = ["f32", "bf16", "f16"]
SCHEDULES = [(0, False), (1, True), (2, False), (3, True)]


def symbols():
    """All kernels by their symbols."""
    for name, (dtype, c, d_qk, d_v) in KERNELS.items():
        yield name, sparse_mla.tensor_ir({"T": dtype}, c, d_qk, d_v)
        yield f"{name}_combine", combine.tensor_ir({"T": dtype}, d_v)


def misaligned(array):
    """The elements and one more: what ends where a page does begins between two boundaries of 16 bytes."""
    return np.append(array.ravel(), array.dtype.type(0))


def packed(arguments, d_v):
    """The arguments with packed rows, and the same with the numbers in these rows."""
    rows = pack_mla_rows(arguments["kv"], d_v)
    return arguments | {"kv": rows}, arguments | {"kv": unpack_mla_rows(rows, d_v)}


def launch(emulator, symbols, c, shared_bytes, out, arguments, sm_scale, parts, order, eager):
    """max_logits and lse of one kernel, or of it and `combine`.

    Parameters
    ----------
    emulator : Emulator
    symbols : tuple of str
        The kernel and its combine.
    c : Decisions
    shared_bytes : int
    out : tuple of (ndarray, int)
        What receives out, and d_v.
    arguments : dict
        Inputs of `sparse_mla`; q and kv may be longer than they are in use, with their shapes in "shapes".
    sm_scale, parts, order, eager
    """
    q, kv, indices = arguments["q"], arguments["kv"], arguments["indices"]
    (s_q, h_q, _), s_kv = arguments.get("shapes", (q.shape, len(kv)))
    sink, length = arguments.get("attn_sink"), arguments.get("topk_length")
    topk, (stored, d_v) = indices.shape[1], out
    part_keys = -(-topk // (parts * c.block_keys)) * c.block_keys
    parts = -(-topk // part_keys)
    max_logits, lse = np.full((2, s_q, h_q), 77, np.float32)
    sums = stats = None
    if parts > 1:
        sums = np.full((s_q, h_q, parts, d_v), np.nan, np.float32)
        stats = np.full((s_q, h_q, parts, sparse_mla.STATS), np.nan, np.float32)
    results = (stored, max_logits, lse) if parts == 1 else (None, None, None)
    scalars = (s_q, s_kv, h_q, topk, parts, part_keys, sm_scale, sink is not None, length is not None)
    tensors = (q, kv, indices, sink, length, *results, sums, stats)
    options = {"order": order, "eager": eager}
    emulator.launch(symbols[0], (c.blocks(s_q, h_q), parts), *tensors, *scalars, shared_bytes=shared_bytes, **options)
    assert emulator.bank_conflicts == 0
    if parts > 1:
        scalars = (s_q * h_q, h_q, parts, sink is not None)
        tensors = (sums, stats, sink, stored, max_logits, lse)
        emulator.launch(symbols[1], (s_q * h_q,), *tensors, *scalars, **options)
    return max_logits, lse


def compare(actual, arguments, dtype, sm_scale, d_v):
    """Check the outputs against float64."""
    expected = SPEC.reference(**arguments, sm_scale=sm_scale, d_v=d_v)
    for output, x, y in zip(SPEC.outputs, actual, expected, strict=True):
        assert_close(x, y, SPEC.tolerance[output.name][dtype])
    return actual


def attend(emulator, name, arguments, sm_scale, parts=1, order=0, eager=False, shift=False):
    """out, max_logits and lse of one kernel, or of it and `combine`."""
    dtype, c, d_qk, d_v = KERNELS[name]
    q, kv = arguments["q"], arguments["kv"]
    out = np.full((*q.shape[:2], d_v), 77, q.dtype)
    stored = misaligned(out) if shift else out
    if shift:
        arguments = arguments | {"q": misaligned(q), "kv": misaligned(kv), "shapes": (q.shape, len(kv))}
    how = (c, c.shared_bytes({"T": dtype}, d_qk, d_v), (stored, d_v), arguments, sm_scale, parts, order, eager)
    others = launch(emulator, (name, f"{name}_combine"), *how)
    return stored[: out.size].reshape(out.shape) if shift else out, *others


def check(emulator, name, arguments, sm_scale=None, **options):
    dtype, _, d_qk, d_v = KERNELS[name]
    sm_scale = d_qk**-0.5 if sm_scale is None else sm_scale
    return compare(attend(emulator, name, arguments, sm_scale, **options), arguments, dtype, sm_scale, d_v)


def check_last_valid(check, arguments, topk, position):
    """Check one valid index among `topk`, which threads search in several passes of several loads."""
    arguments["indices"] = np.full((1, topk), -1, np.int32)
    arguments["indices"][0, position] = 5
    out, _, lse = check(arguments)
    assert out.any() and np.isfinite(lse).all()


def check_narrow_sums(emulator, check, arguments):
    """Cut off as they are by the first tensor cores, whose sums kept the least, also where it all adds up."""
    with emulator.narrow_sums(23):
        check(arguments)
        check(arguments | {x: np.abs(arguments[x]) for x in ("q", "kv")}, parts=3)


def inputs(name, seed=0, **sizes):
    dtype, _, d_qk, _ = KERNELS[name]
    return attention_inputs(np.random.default_rng(seed), dtype, d_qk=d_qk, **{"s_q": 2, "s_kv": 150, **sizes})
