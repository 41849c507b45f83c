"""A cache that is larger than what is in use, and one that holds many sequences, give the bits of exact ones.

The operators take the length in use as ke, or by the indices. What lies behind it, in front of it or in other sequences
is anything: NaN, infinities, whatever bytes there were.
"""

from __future__ import annotations

import numpy as np
import pytest
from samples import attention_inputs, indexer_inputs

import dsa_tvm
from dsa_tvm.ops import OPS

D_V, TOPK = 512, 40
ATTRS = {"sm_scale": 576**-0.5, "d_v": D_V}
INDEXERS = [pytest.param(v, id="-".join(v.values())) for v in OPS["indexer_topk"].variants]
WHOLE = [pytest.param(v, id="-".join(v.values())) for v in OPS["dsa_attention"].variants]


def garbage(rng, shape, dtype):
    """What memory may hold that nobody has written: any bytes, NaN and infinities among them."""
    x = rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)
    if dtype.name not in ("int8", "uint8"):
        flat = x.reshape(-1)
        flat[::3] = np.nan
        if dtype.name != "float8_e4m3fn":
            flat[1::3] = np.inf
    return x


def joined(rng, sequences, capacity):
    """The rows of sequences of different lengths in one array, from row ``b * capacity`` on, and garbage elsewhere."""
    first = sequences[0]
    cache = garbage(rng, (len(sequences) * capacity, *first.shape[1:]), first.dtype)
    for b, rows in enumerate(sequences):
        cache[b * capacity : b * capacity + len(rows)] = rows
    return cache


def index_case(variant, lengths, s_new, seed=0):
    """For each sequence, its last tokens' arguments of the indexer."""
    rng = np.random.default_rng(seed)
    scaled = variant["K"] in ("float8_e4m3fn", "int8")
    return [indexer_inputs(rng, variant, s_q=s_new, s_kv=n, h_idx=20, d_idx=64, scaled=scaled) for n in lengths]


def together(rng, cases, capacity):
    """The same as one call over one cache."""
    found = {n: np.concatenate([c[n] for c in cases]) for n in ("q", "weights")}
    found["k"] = joined(rng, [c["k"] for c in cases], capacity)
    for n in ("ks", "ke"):
        found[n] = np.concatenate([c[n] + np.int32(b * capacity) for b, c in enumerate(cases)])
    if cases[0]["k_scale"] is not None:
        found["k_scale"] = joined(rng, [c["k_scale"][:, None] for c in cases], capacity)[:, 0]
    return found


def local(indices, s_new, capacity):
    """Indices into each sequence's own rows."""
    first = (np.arange(len(indices)) // s_new * capacity)[:, None]
    return np.where(indices < 0, indices, indices - first).astype(np.int32)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("variant", INDEXERS)
@pytest.mark.parametrize(
    ("lengths", "s_new", "capacity"),
    [
        ([700], 1, 9000),  # one that few, and one that many keys' kernels are for
        ([700], 5, 701),
        ([60, 1, 233], 1, 256),
        ([9, 2500, 300, 77, 5, 6, 7, 8, 1000], 1, 2600),
        ([9, 2500, 300, 77], 5, 70000),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_indexer(variant, lengths, s_new, capacity, threads):
    cases = index_case(variant, lengths, s_new)
    all_of_them = together(np.random.default_rng(1), cases, capacity)
    indices = dsa_tvm.indexer_topk(**all_of_them, topk=TOPK, num_threads=threads)
    alone = [dsa_tvm.indexer_topk(**c, topk=TOPK) for c in cases]
    assert same_bits(local(indices, s_new, capacity), np.concatenate(alone))
    logits = dsa_tvm.lightning_indexer(**all_of_them, num_threads=threads)
    for b, (c, n) in enumerate(zip(cases, lengths, strict=True)):
        rows, start = slice(b * s_new, (b + 1) * s_new), b * capacity
        assert same_bits(logits[rows, start : start + n].copy(), dsa_tvm.lightning_indexer(**c))
        assert (logits[rows, :start] == -np.inf).all() and (logits[rows, start + n :] == -np.inf).all()
    assert same_bits(dsa_tvm.topk(logits, all_of_them["ks"], all_of_them["ke"], TOPK), indices)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "packed"])
@pytest.mark.parametrize("lengths", [[300], [70, 1, 200]], ids=str)
def test_attention_to_selected_rows(dtype, lengths):
    rng, capacity, packed = np.random.default_rng(0), 1000, dtype == "packed"
    op = dsa_tvm.sparse_mla_fp8 if packed else dsa_tvm.sparse_mla
    cases = [attention_inputs(rng, "bfloat16" if packed else dtype, s_kv=n, topk=TOPK) for n in lengths]
    for c in cases:
        c["indices"][:, ::7] = -1
        if packed:
            c["kv"] = dsa_tvm.pack_mla_rows(c["kv"])
    indices = [np.where(c["indices"] < 0, -1, c["indices"] + b * capacity) for b, c in enumerate(cases)]
    got = op(
        np.concatenate([c["q"] for c in cases]),
        joined(rng, [c["kv"] for c in cases], capacity),
        np.concatenate(indices).astype(np.int32),
        **ATTRS,
    )
    alone = [op(**c, **ATTRS) for c in cases]
    for i, x in enumerate(got):
        assert same_bits(x, np.concatenate([y[i] for y in alone]))


@pytest.mark.parametrize("variant", WHOLE)
@pytest.mark.parametrize("lengths", [[300], [70, 1, 200]], ids=str)
def test_the_whole(variant, lengths):
    rng, capacity, s_new = np.random.default_rng(0), 1000, 1
    cases, everything = index_case(variant, lengths, s_new), []
    for c, n in zip(cases, lengths, strict=True):
        own = attention_inputs(rng, variant["T"], s_q=s_new, s_kv=n)
        everything.append(renamed(c) | {"q": own["q"], "kv": own["kv"]})
    whole = renamed(together(rng, cases, capacity))
    whole["q"] = np.concatenate([c["q"] for c in everything])
    whole["kv"] = joined(rng, [c["kv"] for c in everything], capacity)
    got = dsa_tvm.dsa_attention(**whole, topk=TOPK, **ATTRS)
    alone = [dsa_tvm.dsa_attention(**c, topk=TOPK, **ATTRS) for c in everything]
    for i, x in enumerate(got):
        assert same_bits(x, np.concatenate([y[i] for y in alone]))


def renamed(index):
    """As `dsa_attention` has them."""
    names = {"q": "index_q", "k": "index_k", "k_scale": "index_k_scale"}
    return {names.get(n, n): x for n, x in index.items()}


@pytest.mark.parametrize("order", ["apart", "alternating", "nested", "backwards", "random"])
@pytest.mark.parametrize("threads", [1, 3])
def test_ranges_in_any_order(order, threads):
    """Queries that are scored together see different keys, the same, none, or more than there are."""
    rng, s_q, s_kv = np.random.default_rng(3), 70, 5000
    ks = np.arange(s_q) * 71
    ke = ks + 60
    if order == "alternating":
        ks = np.where(np.arange(s_q) % 2, 4000, 100)
        ke = ks + np.arange(s_q) * 9
    elif order == "nested":
        ks, ke = np.arange(s_q) * 20, s_kv - np.arange(s_q) * 20
    elif order == "backwards":
        ks, ke = ks[::-1], ke[::-1]
    elif order == "random":
        ks, ke = rng.integers(-100, s_kv + 100, (2, s_q))
        ks[:3], ke[:3] = (-(2**31), 2**31 - 1, 7), (2**31 - 1, -(2**31), 7)
    variant = OPS["indexer_topk"].variants[0]
    a = indexer_inputs(rng, variant, s_q=s_q, s_kv=s_kv, h_idx=20, d_idx=64)
    a |= {"ks": ks.astype(np.int32), "ke": ke.astype(np.int32)}
    # A key that anybody scores without seeing it is one too many only in time; that a logit is missing shows.
    logits = dsa_tvm.lightning_indexer(**a)
    expected = dsa_tvm.topk(logits, a["ks"], a["ke"], TOPK)
    for dirty in range(2):
        # Workspace comes back with what an earlier call left there: large logits would be selected.
        if dirty:
            high = {**a, "q": np.abs(a["q"]) * 9, "k": np.abs(a["k"]), "weights": np.abs(a["weights"])}
            dsa_tvm.indexer_topk(**high | {"ks": a["ks"] * 0, "ke": a["ks"] * 0 + s_kv}, topk=TOPK, num_threads=threads)
        assert same_bits(dsa_tvm.indexer_topk(**a, topk=TOPK, num_threads=threads), expected)
