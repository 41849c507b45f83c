"""Seeded torch tensors for calls of any operator on any device, in sizes that reach different kernels on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from compare import assert_close, tolerance_of
from devices import complete, run, to_device
from samples import attention_inputs, indexer_inputs, row_inputs
from test_topk import DATA

from dsa_tvm import pack_mla_rows
from dsa_tvm.benchmark.workload import repeated_keys, to_numpy
from dsa_tvm.ops import OPS

#: s_q, s_kv, topk. On a GPU: few queries, which are cut into parts; many; and a row that many blocks share.
SIZES = {"few": (2, 700, 500), "many": (90, 300, 60), "long": (1, 20000, 300)}

#: The operators that take indices.
ATTENTIONS = ("sparse_mla", "sparse_mla_fp8")


def arrays(op: str, size: str, variant: Any = None, seed: int = 0, period: int = 0) -> dict[str, Any]:
    """Arguments of an operator by name, with every optional input, ranges of any kind, and indices out of range.

    With a `period` the keys repeat themselves after so many.
    """
    rng = np.random.default_rng(seed)
    s_q, s_kv, topk = SIZES[size]
    variant = variant or OPS[op].variants[0]
    if op == "write_rows":
        return row_inputs(rng, variant["T"], capacity=s_kv, s_new=s_q, d_row=60)
    if op == "topk":
        index = {"logits": DATA["ties"](rng, (s_q, s_kv))}
    elif op not in ATTENTIONS:
        index = indexer_inputs(rng, variant, s_q=s_q, s_kv=s_kv, h_idx=9, d_idx=64, scaled=True)
    if op not in ATTENTIONS:
        index["ks"] = rng.integers(-9, s_kv // 3, s_q).astype(np.int32)
        index["ke"] = rng.integers(s_kv // 2, s_kv + 9, s_q).astype(np.int32)
        index["ke"][s_q // 2 :: 40] = index["ks"][s_q // 2 :: 40]  # queries that see nothing
        if s_q == 1:
            index["ks"][:], index["ke"][:] = 3, s_kv - 1
        index = repeated_keys(OPS["topk" if op == "topk" else "indexer_topk"], index, period) if period else index
    if op in ("topk", "lightning_indexer", "indexer_topk"):
        return index | ({} if op == "lightning_indexer" else {"topk": topk})
    attention = attention_inputs(rng, variant["T"], s_q=s_q, s_kv=s_kv, h_q=5, topk=topk)
    attention = repeated_keys(OPS["sparse_mla"], attention, period) if period else attention
    sink = {"attn_sink": rng.standard_normal(5).astype(np.float32)}
    if op in ATTENTIONS:
        if op == "sparse_mla_fp8":
            attention["kv"] = pack_mla_rows(attention["kv"])
        attention["indices"] = rng.integers(-20, s_kv + 20, (s_q, topk)).astype(np.int32)
        length = {"topk_length": rng.integers(-3, topk + 5, s_q).astype(np.int32)}
        return attention | sink | length | {"sm_scale": 576**-0.5, "d_v": 512}
    names = {"q": "index_q", "k": "index_k", "k_scale": "index_k_scale"}
    found = {names.get(n, n): x for n, x in index.items()} | {n: attention[n] for n in ("q", "kv")}
    return found | sink | {"topk": topk, "sm_scale": 576**-0.5, "d_v": 512}


def tensors(op: str, device: str, size: str, variant: Any = None, seed: int = 0) -> dict[str, Any]:
    """`arrays`, as torch tensors on a device."""
    found = complete(op, arrays(op, size, variant, seed))
    return {n: to_device(x, device) if isinstance(x, np.ndarray) else x for n, x in found.items()}


def references(op: str, arguments: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """The float64 outputs for `arrays`; of `dsa_attention`, whose selection has near-ties, there are none."""
    with np.errstate(all="ignore"):
        return OPS[op].reference(**arguments)


def check(op: str, outputs: Any, arguments: dict[str, Any], device: str) -> None:
    """Compare outputs with the references within the operator's tolerances; indices exactly.

    A selection is compared with that of the logits that the same device computes, and the attention over it with that
    of the same selection: a near-tie changes both by more than rounding.
    """
    spec = OPS[op]
    dtype = arguments[spec.inputs[0].name].dtype.name
    if op in ("indexer_topk", "dsa_attention"):
        names = {"q": "index_q", "k": "index_k", "k_scale": "index_k_scale"} if op == "dsa_attention" else {}
        index = {t.name: arguments[names.get(t.name, t.name)] for t in OPS["indexer_topk"].inputs}
        logits = run("lightning_indexer", device, **index)
        exact = references("lightning_indexer", index)[0]
        assert_close(logits, exact, tolerance_of(OPS["lightning_indexer"], "logits", dtype, device))
        (chosen,) = references("topk", {"logits": logits, **{n: arguments[n] for n in ("ks", "ke", "topk")}})
    if op == "dsa_attention":
        given = {n: arguments[n] for n in ("q", "kv", "attn_sink", "sm_scale", "d_v")}
        out, _, lse = references("sparse_mla", given | {"indices": chosen})
        expected: tuple[np.ndarray, ...] = (out, lse)
    else:
        expected = (chosen,) if op == "indexer_topk" else references(op, arguments)
    for tensor, x, y in zip(spec.outputs, outputs, expected, strict=True):
        assert_close(x if isinstance(x, np.ndarray) else to_numpy(x), y, tolerance_of(spec, tensor.name, dtype, device))
