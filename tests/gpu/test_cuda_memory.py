"""Nothing but the outputs is written, on either device: every kernel on small inputs between poisoned memory.

These are the calls that ``tests/gpu/gpu_check.sh`` runs under compute-sanitizer.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from devices import as_tuple, complete, to_device
from operator_tensors import ATTENTIONS, SIZES, arrays, check, tensors
from samples import DTYPES, row_inputs

import dsa_tvm
from dsa_tvm.ops import OPS

#: Bytes in front of and behind every tensor, all ones: NaN, or -1.
GUARD = 256
VARIANTS = [(op, dict(variant)) for op in OPS for variant in OPS[op].variants]


def place(tensor, shift):
    """A copy between guards, so many elements off a boundary; and the whole memory."""
    offset, size = GUARD + shift * tensor.element_size(), tensor.nbytes
    memory = torch.full((offset + size + GUARD,), 0xFF, dtype=torch.uint8, device=tensor.device)
    # The allocator's own boundary is a wider one.
    placed = memory[offset : offset + size].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor), memory


def guards(memory, tensor, shift):
    start = GUARD + shift * tensor.element_size()
    return torch.cat([memory[:start], memory[start + tensor.nbytes :]])


@pytest.mark.parametrize(("op", "variant"), VARIANTS, ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
@pytest.mark.parametrize("size", SIZES)
def test_every_kernel_keeps_to_its_memory(op, variant, size, device):
    """At any alignment: the elements begin 1 to 3 of them behind a boundary."""
    given = complete(op, arrays(op, size, variant))
    inputs, memories = {}, {}
    for i, (name, x) in enumerate(given.items()):
        if isinstance(x, np.ndarray):
            inputs[name], memories[name] = place(to_device(x, device), i % 3 + 1)
    before = {name: memory.clone() for name, memory in memories.items()}
    attrs = {name: x for name, x in given.items() if name not in inputs}
    plain = as_tuple(getattr(dsa_tvm, op)(**inputs, **attrs))
    placed = [place(torch.full_like(x, -7), i % 3 + 1) for i, x in enumerate(plain)]
    outputs = tuple(x for x, _ in placed)
    getattr(dsa_tvm, op)(**inputs, **attrs, out=outputs)
    check(op, outputs, given, device)
    for name, memory in memories.items():
        assert torch.equal(memory, before[name]), f"{name} or the memory around it was written to"
    for i, (x, memory) in enumerate(placed):
        assert (guards(memory, x, i % 3 + 1) == 0xFF).all(), f"memory around output {i} was written to"
        assert x.is_contiguous() and x.data_ptr() % (4 * x.element_size())


@pytest.mark.parametrize(("op", "variant"), VARIANTS, ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
@pytest.mark.parametrize("size", SIZES)
def test_every_kernel_in_exact_memory(op, variant, size, gpu):
    """No guards: where every tensor is an allocation of its own, a sanitizer sees what is read behind one."""
    outputs = as_tuple(getattr(dsa_tvm, op)(**tensors(op, "cuda", size, variant)))
    torch.cuda.synchronize()
    check(op, outputs, complete(op, arrays(op, size, variant)), "cuda")


def test_the_guards_are_looked_at(device):
    """One element in front of an output, and one behind it."""
    for position in (-1, 6):
        x, memory = place(torch.zeros(2, 3, device=device), 1)
        assert (guards(memory, x, 1) == 0xFF).all()
        memory.view(torch.float32)[GUARD // 4 + 1 + position] = 0
        assert not (guards(memory, x, 1) == 0xFF).all()


#: Queries. On a GPU more than a grid's second and third dimension can have blocks.
ROWS = {"cpu": 700, "cuda": 70000}


@pytest.mark.parametrize("op", OPS)
def test_70000_queries(op, device):
    """The first and the last query or sequence, and those around the most blocks of a dimension."""
    rows, s_kv, topk = ROWS[device], 40, 3
    looked_at = [m for m in (0, 1, *range(65530, 65542), rows - 2, rows - 1) if m < rows]
    rng = np.random.default_rng(0)
    index = {
        "q": rng.standard_normal((rows, 1, 32), np.float32),
        "k": rng.standard_normal((s_kv, 32), np.float32),
        "weights": rng.random((rows, 1), np.float32),
        "ks": np.zeros(rows, np.int32),
        "ke": rng.integers(0, s_kv + 1, rows).astype(np.int32),
    }
    attention = {
        "q": rng.standard_normal((1, 1, 512), np.float32).repeat(rows, 0),
        "kv": rng.standard_normal((s_kv, 512), np.float32),
    }
    ranges = {n: index[n] for n in ("ks", "ke")}
    attrs = {"topk": topk, "sm_scale": 512**-0.5, "d_v": 512}
    logits = rng.standard_normal((rows, s_kv), np.float32)
    indices = rng.integers(-1, s_kv, (rows, topk)).astype(np.int32)
    named = {"index_q": index["q"], "index_k": index["k"]}
    if op == "sparse_mla_fp8":
        attention = {"q": attention["q"].astype(DTYPES["bfloat16"]), "kv": dsa_tvm.pack_mla_rows(attention["kv"])}
    known = index | attention if op == "dsa_attention" else attention if op in ATTENTIONS else index
    caches = row_inputs(rng, "float32", batch=rows, capacity=4, s_new=2, d_row=8)
    known = {"logits": logits, "indices": indices, **ranges, **named, **known, **caches, **attrs}
    spec = OPS[op]
    given = {n: known[n] for n in (*(t.name for t in spec.inputs), *(a.name for a in spec.attrs)) if n in known}
    tensors = {n: to_device(x, device) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    outputs = as_tuple(getattr(dsa_tvm, op)(**tensors))
    sampled = {n: x[looked_at] if isinstance(x, np.ndarray) and len(x) == rows else x for n, x in given.items()}
    optional = {t.name: None for t in spec.inputs if t.optional}
    check(op, [x[looked_at] for x in outputs], optional | sampled, device)
