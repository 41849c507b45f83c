"""What ``dsa-tvm bench --suite cuda`` measures, and the peers it measures beside: shapes, counts, results, skips."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
import types

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

import torch
from fake_gpu import CASES, SMALL
from peer_signatures import FUNCTIONS, VLLM, VLLM_SPARSE_PREFILL, stand_in

from dsa_tvm import presets
from dsa_tvm.benchmark import check, cuda, workload
from dsa_tvm.benchmark.check import Checker
from dsa_tvm.benchmark.peers import Skipped, torch_peer
from dsa_tvm.benchmark.peers import cuda as peers
from dsa_tvm.benchmark.suite import Case
from dsa_tvm.errors import ArgumentError
from dsa_tvm.ops import OPS

HEADS_64 = presets.Preset(h_idx=3, d_idx=32, topk=16, h_q=64, d_qk=576, d_v=512, sm_scale=0.06)


def test_the_suite_has_the_issue_s_shapes():
    found = cuda.cases([], [], [], None)
    lengths = {
        (op, name): sorted({getattr(c, name) for c in found if c.op == op}) for op in OPS for name in ("s_q", "s_kv")
    }
    thousands = [1024 * n for n in (4, 8, 16, 32, 64, 128)]
    assert lengths["lightning_indexer", "s_q"] == [1, 64, 2048, 4096]
    assert lengths["lightning_indexer", "s_kv"] == thousands
    assert lengths["topk", "s_q"] == [1, 4, 64, 4096] and lengths["topk", "s_kv"] == thousands[1:]
    assert {b * s for b in (1, 64, 128) for s in (1, 2)} | {4096} == set(lengths["sparse_mla", "s_q"])
    assert lengths["sparse_mla", "s_kv"] == thousands[1:]
    assert {c.dtype for c in found if c.op == "lightning_indexer"} == {"bfloat16", "float8_e4m3fn"}
    assert {c.op for c in found} == set(workload.OPERATORS) == set(peers.BY_OPERATOR)
    assert all(workload.variant(OPS[c.op], c.dtype) is not None for c in found)
    assert len(found) == len(set(found))


def test_cases_can_be_chosen():
    assert cuda.cases(["topk"], [3], [5, 7], None) == [Case("topk", "float32", 3, n) for n in (5, 7)]
    found = cuda.cases(["topk", "lightning_indexer"], [1], [9], "float16")
    assert found == [Case("lightning_indexer", "float16", 1, 9)]
    assert {c.op for c in cuda.cases([], [1], [9], "int8")} == {"lightning_indexer", "indexer_topk"}
    assert workload.variant(OPS["dsa_attention"], "float8_e4m3fn") == {"T": "bfloat16", "K": "float8_e4m3fn"}
    for ops, dtype in ((["topk"], "bfloat16"), (["sparse_mla"], "int8")):
        with pytest.raises(ArgumentError, match="bench: dtype: expected"):
            cuda.cases(ops, [], [], dtype)


@pytest.mark.parametrize(("op", "dtype"), [*CASES, ("indexer_topk", "int8")])
def test_inputs_are_causal_and_seeded(op, dtype):
    first, second = (cuda.make(Case(op, dtype, 5, 40), SMALL, "cpu") for _ in range(2))
    assert all(torch.equal(first.inputs[n], second.inputs[n]) for n in first.inputs)
    ends = np.arange(36, 41)
    if op == "topk":
        assert torch.isneginf(first.inputs["logits"]).sum(1).tolist() == (40 - ends).tolist()
    if op in ("sparse_mla", "sparse_mla_fp8"):
        for row, stop in zip(first.inputs["indices"].numpy(), ends, strict=True):
            assert len(set(row)) == 16 and (np.diff(row) > 0).all() and row[0] >= 0 and row[-1] < stop
    assert ("k_scale" in first.inputs) == (dtype in ("float8_e4m3fn", "int8") and op != "sparse_mla_fp8")


def test_few_keys_leave_indices_behind():
    rows = cuda.make(Case("sparse_mla", "bfloat16", 2, 3), SMALL, "cpu").inputs["indices"].tolist()
    assert rows == [[0, 1, *[-1] * 14], [0, 1, 2, *[-1] * 13]]


def test_traffic_by_hand():
    def bytes_of(op, dtype, s_q, s_kv):
        return workload.traffic(cuda.make(Case(op, dtype, s_q, s_kv), SMALL, "cpu"))

    # Queries see 29 and 30 keys. Of each: q 3 x 32, weights 3, ks, ke, and 30 logits out.
    assert bytes_of("lightning_indexer", "bfloat16", 2, 30) == 2 * (96 * 2 + 12 + 8) + 30 * 32 * 2 + 2 * 30 * 4
    assert bytes_of("lightning_indexer", "float8_e4m3fn", 2, 30) == 2 * (96 + 12 + 8) + 30 * (32 + 4) + 2 * 30 * 4
    assert bytes_of("topk", "float32", 2, 30) == (29 + 30) * 4 + 2 * 8 + 2 * 16 * 4
    # Each row of 16 of 400 keys counts once, however many queries select it.
    work = cuda.make(Case("sparse_mla", "bfloat16", 2, 400), SMALL, "cpu")
    work.inputs["indices"][1] = work.inputs["indices"][0]
    assert workload.traffic(work) == 2 * 2 * 576 * 2 + 16 * 576 * 2 + 2 * 16 * 4 + 2 * 2 * (512 * 2 + 4 + 4)
    # Queries see 2 and 3 of three keys, and select all they see: 3 rows. out, max_logits and lse of 2 heads.
    indices, out = 2 * 16 * 4, 2 * 2 * (512 * 2 + 4 + 4)
    assert bytes_of("sparse_mla", "bfloat16", 2, 3) == 2 * 2 * 576 * 2 + 3 * 576 * 2 + indices + out
    assert bytes_of("sparse_mla_fp8", "float8_e4m3fn", 2, 3) == 2 * 2 * 576 * 2 + 3 * 656 + indices + out


@pytest.mark.parametrize(("op", "dtype"), CASES)
@pytest.mark.parametrize(("s_q", "s_kv"), [(1, 40), (6, 40), (6, 9)])
def test_torch_does_the_same_work(op, dtype, s_q, s_kv, monkeypatch):
    """In one group, and in groups of few queries; with fewer keys than topk; and a wrong result is none."""
    work = cuda.make(Case(op, dtype, s_q, s_kv), SMALL, "cpu")
    checker = Checker(work)
    for limit in (2**31, 1000):
        monkeypatch.setattr(torch_peer, "LIMIT", limit)
        result = torch_peer.prepare(work, 90)()
        checker.peer("torch", result)
    first = (result[0] if isinstance(result, tuple) else result).clone()
    first[s_q // 2].view(-1)[0] = s_kv - 1 if first.dtype in (torch.int32, torch.int64) else 9
    first[s_q // 2].view(-1)[1] = first[s_q // 2].view(-1)[0]
    with pytest.raises(check.CheckError, match=f"torch: {op}"):
        checker.peer("torch", (first, result[1]) if isinstance(result, tuple) else first)


def test_no_product_of_8_bits_no_peer():
    for dtype, message in (("float8_e4m3fn", r"below compute capability 8\.9"), ("int8", "no int8 product")):
        work = cuda.make(Case("lightning_indexer", dtype, 2, 40), SMALL, "cpu")
        with pytest.raises(Skipped, match=message):
            peers.prepare("torch", work, 86)


def test_our_own_bf16_is_a_peer():
    check_peer("bf16", Case("sparse_mla_fp8", "float8_e4m3fn", 6, 40), SMALL)


def test_flash_mla_has_pages_of_64_rows():
    rows = torch.arange(70, dtype=torch.uint8)[:, None].repeat(1, 656)
    cache = peers.flash_mla_cache(rows)
    assert cache.shape == (2, 64, 1, 656) and cache.dtype == torch.float8_e4m3fn
    assert torch.equal(cache.view(torch.uint8).view(-1, 656)[:70], rows)


@pytest.mark.parametrize(
    ("name", "op", "dtype", "words"),
    [
        ("deep_gemm", "lightning_indexer", "bfloat16", "takes fp8"),
        ("deep_gemm", "lightning_indexer", "float8_e4m3fn", "deep_gemm does not import .*No module named 'deep_gemm'"),
        ("flash_mla", "sparse_mla", "bfloat16", "flash_mla does not import"),
        ("flash_mla_fp8", "sparse_mla_fp8", "float8_e4m3fn", "flash_mla does not import"),
        ("vllm", "sparse_mla", "bfloat16", "vllm is not installed"),
        ("vllm", "topk", "float32", "takes topk 512, 1024 and 2048"),
        ("vllm_prefill", "topk", "float32", "vllm is not installed"),
    ],
)
def test_peers_say_why_they_do_not_run(name, op, dtype, words, monkeypatch):
    for package in ("deep_gemm", "flash_mla", "vllm"):
        monkeypatch.delitem(sys.modules, package, raising=False)
        if importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed")
    with pytest.raises(Skipped, match=words):
        peers.prepare(name, cuda.make(Case(op, dtype, 2, 40), SMALL, "cpu"), 90)


@pytest.mark.parametrize(("distribution", "version", "source"), FUNCTIONS)
def test_signatures_are_those_of_the_packages(distribution, version, source):
    """Where the very version is there. It is not imported: that takes a GPU."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    if version not in found.version:
        pytest.skip(f"{distribution} is {found.version}")
    tree = ast.parse(found.locate_file(source).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    functions = {node.name: ast.unparse(node.args) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name, parameters in FUNCTIONS[distribution, version, source].items():
        assert functions[name] == ast.unparse(ast.parse(f"lambda {parameters}: 0", mode="eval").body.args)


def reference(op, **inputs):
    """What the operator is defined to return, as torch tensors: a stand-in for a package's kernel."""
    given = {n: workload.to_numpy(x) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    return [torch.from_numpy(np.asarray(x)) for x in OPS[op].reference(**given)]


def attention(q, kv, indices, sm_scale, d_v):
    """Of q [s_q, h_q, d_qk], kv [s_kv, 1, d_qk] and indices [s_q, 1, topk], as FlashMLA has them."""
    assert q.dtype == kv.dtype == torch.bfloat16 and indices.dtype == torch.int32
    assert kv.shape[1] == indices.shape[1] == 1 and kv.dim() == indices.dim() == 3
    out, most, lse = reference("sparse_mla", q=q, kv=kv[:, 0], indices=indices[:, 0], sm_scale=sm_scale, d_v=d_v)
    return out.bfloat16(), most.float(), lse.float()


@pytest.fixture
def install(monkeypatch):
    """Put a module in place that has the functions of a package's version, with these bodies."""

    def put(distribution, **bodies):
        ((key, functions),) = ((k, f) for k, f in FUNCTIONS.items() if k[0] == distribution)
        made = types.ModuleType(key[2].split("/")[0])
        for name, parameters in functions.items():
            setattr(made, name, stand_in(parameters, bodies.get(name, unexpected)))
        monkeypatch.setitem(sys.modules, made.__name__, made)

    return put


def unexpected(**arguments):
    raise AssertionError("not to be called")


def check_peer(name, case, preset, capability=90):
    """Call a peer as the benchmark does, and check its result as there; a wrong one is seen."""
    work = cuda.make(case, preset, "cpu")
    peer = peers.prepare(name, work, capability)
    result, checker = peer.result(peer.call()), Checker(work)
    checker.peer(name, result)
    result[-1] = 0
    with pytest.raises(check.CheckError, match=f"{name}: {case.op}"):
        checker.peer(name, result)


class Foreign:
    """A tensor of another framework."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


@pytest.mark.parametrize("op", ["lightning_indexer", "indexer_topk"])
@pytest.mark.parametrize("wrapped", [torch.Tensor, Foreign])
def test_deep_gemm(op, wrapped, install):
    def fp8_mqa_logits(q, kv, weights, ks, ke, clean_logits, max_seqlen_k):
        keys, scales = kv
        assert q.dtype == keys.dtype == torch.float8_e4m3fn and scales.dtype == weights.dtype == torch.float32
        assert q.dim() == 3 and keys.dim() == 2 and ks.dtype == ke.dtype == torch.int32 and max_seqlen_k == 0
        (logits,) = reference("lightning_indexer", q=q, k=keys, weights=weights, ks=ks, ke=ke, k_scale=scales)
        # What is out of a query's range is only said where it is asked for.
        logits = logits.float() if clean_logits else torch.where(torch.isneginf(logits), 1e30, logits).float()
        return logits if wrapped is torch.Tensor else wrapped(logits)

    install("sgl-deep-gemm", fp8_mqa_logits=fp8_mqa_logits)
    check_peer("deep_gemm", Case(op, "float8_e4m3fn", 6, 40), SMALL)
    with pytest.raises(Skipped, match=r"begins at compute capability 9\.0"):
        check_peer("deep_gemm", Case(op, "float8_e4m3fn", 6, 40), SMALL, 86)


@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("distribution", ["sgl-flash-mla", "flash-mla"])
def test_flash_mla(d_qk, capability, distribution, install):
    preset = presets.Preset(h_idx=3, d_idx=32, topk=16, h_q=64, d_qk=d_qk, d_v=512, sm_scale=0.06)
    asked = []

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, **options):
        asked.append(options.pop("use_legacy", None))
        assert all(value is None for value in options.values())
        return attention(q, kv, indices, sm_scale, d_v)

    install(distribution, flash_mla_sparse_fwd=flash_mla_sparse_fwd)
    check_peer("flash_mla", Case("sparse_mla", "bfloat16", 6, 40), preset, capability)
    # The kernels of Hopper and for rows of 576 are the older ones, where there are two kinds.
    assert set(asked) == {None if distribution == "flash-mla" else capability == 90 or d_qk == 576}
    with pytest.raises(Skipped, match="takes bfloat16 and 64 or 128 heads"):
        check_peer("flash_mla", Case("sparse_mla", "bfloat16", 6, 40), SMALL)


@pytest.mark.parametrize("distribution", ["sgl-flash-mla", "flash-mla"])
def test_flash_mla_decodes_from_its_cache(distribution, install):
    schedule = object()

    def flash_mla_with_kvcache(q, k_cache, head_dim_v, tile_scheduler_metadata, softmax_scale, indices, **options):
        assert q.shape == (6, 1, 64, 576) and k_cache.shape == (1, 64, 1, 656) and indices.shape == (6, 1, 16)
        assert tile_scheduler_metadata is schedule and options.pop("is_fp8_kvcache")
        if distribution == "sgl-flash-mla":
            assert options.pop("use_legacy") and options.pop("kv_format") == "V32"
        assert not any(options.values())
        rows = k_cache.view(torch.uint8).view(-1, 656)[:40]
        given = {"q": q[:, 0], "kv": rows, "indices": indices[:, 0], "sm_scale": softmax_scale, "d_v": head_dim_v}
        out, _, lse = reference("sparse_mla_fp8", **given)
        return out[:, None].bfloat16(), lse

    install(
        distribution,
        flash_mla_with_kvcache=flash_mla_with_kvcache,
        get_mla_metadata=lambda args, kwargs: (schedule, None),
    )
    check_peer("flash_mla_fp8", Case("sparse_mla_fp8", "float8_e4m3fn", 6, 40), HEADS_64)
    with pytest.raises(Skipped, match="rows of 576, and few queries"):
        check_peer("flash_mla_fp8", Case("sparse_mla_fp8", "float8_e4m3fn", 257, 40), HEADS_64)


@pytest.fixture(params=range(len(VLLM_SPARSE_PREFILL)))
def vllm(request, monkeypatch):
    """Operators of vLLM's names and schemas."""

    def persistent_topk(logits, lengths, output, workspace, k, max_seq_len):
        assert workspace.dtype == torch.uint8 and max_seq_len == logits.shape[1] and lengths.dtype == torch.int32
        output.copy_(reference("topk", logits=logits, ks=0 * lengths, ke=lengths, topk=k)[0])

    def top_k_per_row_prefill(logits, starts, ends, indices, rows, stride0, stride1, topk):
        assert (rows, stride0, stride1) == (len(logits), *logits.stride())
        indices.copy_(reference("topk", logits=logits, ks=starts, ke=ends, topk=topk)[0])

    def sparse_prefill_fwd(q, kv, indices, sm_scale, d_v, *optional):
        assert not any(optional)
        return list(attention(q, kv, indices, sm_scale, d_v))

    if importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    schemas = {**VLLM, "_flashmla_C::sparse_prefill_fwd": VLLM_SPARSE_PREFILL[request.param]}
    monkeypatch.setattr(peers, "_load_vllm", lambda pattern: None)
    libraries = {name: torch.library.Library(name, "FRAGMENT") for name in ("_C", "_flashmla_C")}
    for function in (persistent_topk, top_k_per_row_prefill, sparse_prefill_fwd):
        ((where, schema),) = ((n, s) for n, s in schemas.items() if n.endswith(f"::{function.__name__}"))
        library = libraries[where.split("::")[0]]
        library.define(function.__name__ + schema)
        library.impl(function.__name__, function, "CompositeExplicitAutograd")
    yield
    for library in libraries.values():
        library._destroy()


def test_vllm(vllm):
    preset = presets.Preset(h_idx=3, d_idx=32, topk=512, h_q=64, d_qk=576, d_v=512, sm_scale=0.06)
    for name in ("vllm", "vllm_prefill"):
        check_peer(name, Case("topk", "float32", 3, 900), preset)
    check_peer("vllm", Case("sparse_mla", "bfloat16", 3, 900), preset)
    with pytest.raises(Skipped, match="no operator _C"):
        peers._vllm_operator("", "_C", "missing")
