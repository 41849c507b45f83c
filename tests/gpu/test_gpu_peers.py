"""What ``dsa-tvm bench --suite cuda`` measures, and the peers it measures beside: shapes, counts, results, skips."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

import torch
from fake_gpu import CASES, SMALL

import dsa_tvm
from dsa_tvm import presets
from dsa_tvm.benchmark import check
from dsa_tvm.benchmark.gpu import peers as gpu_peers
from dsa_tvm.benchmark.gpu import torch_peers as gpu_torch
from dsa_tvm.benchmark.gpu import workload as gpu_workload
from dsa_tvm.benchmark.gpu.check import Checker
from dsa_tvm.benchmark.gpu.workload import Case
from dsa_tvm.benchmark.peers import Skipped
from dsa_tvm.errors import ArgumentError
from dsa_tvm.ops import OPS


def test_the_suite_has_the_issue_s_shapes():
    found = gpu_workload.cases([], [], [], None)
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
    assert {c.op for c in found} == set(OPS) == set(gpu_peers.BY_OPERATOR)
    assert all(gpu_workload.variant(OPS[c.op], c.dtype) is not None for c in found)
    assert len(found) == len(set(found))


def test_cases_can_be_chosen():
    assert gpu_workload.cases(["topk"], [3], [5, 7], None) == [Case("topk", "float32", 3, n) for n in (5, 7)]
    found = gpu_workload.cases(["topk", "lightning_indexer"], [1], [9], "float16")
    assert found == [Case("lightning_indexer", "float16", 1, 9)]
    assert {c.op for c in gpu_workload.cases([], [1], [9], "int8")} == {"lightning_indexer", "indexer_topk"}
    assert gpu_workload.variant(OPS["dsa_attention"], "float8_e4m3fn") == {"T": "bfloat16", "K": "float8_e4m3fn"}
    for ops, dtype in ((["topk"], "bfloat16"), (["sparse_mla"], "int8")):
        with pytest.raises(ArgumentError, match="bench: dtype: expected"):
            gpu_workload.cases(ops, [], [], dtype)


@pytest.mark.parametrize(("op", "dtype"), [*CASES, ("indexer_topk", "int8")])
def test_inputs_are_causal_and_seeded(op, dtype):
    first, second = (gpu_workload.make(Case(op, dtype, 5, 40), SMALL, "cpu") for _ in range(2))
    assert all(torch.equal(first.inputs[n], second.inputs[n]) for n in first.inputs)
    ends = np.arange(36, 41)
    if op == "topk":
        assert torch.isneginf(first.inputs["logits"]).sum(1).tolist() == (40 - ends).tolist()
    if op in ("sparse_mla", "sparse_mla_fp8"):
        for row, stop in zip(first.inputs["indices"].numpy(), ends, strict=True):
            assert len(set(row)) == 16 and (np.diff(row) > 0).all() and row[0] >= 0 and row[-1] < stop
    assert ("k_scale" in first.inputs) == (dtype in ("float8_e4m3fn", "int8") and op != "sparse_mla_fp8")


def test_few_keys_leave_indices_behind():
    rows = gpu_workload.make(Case("sparse_mla", "bfloat16", 2, 3), SMALL, "cpu").inputs["indices"].tolist()
    assert rows == [[0, 1, *[-1] * 14], [0, 1, 2, *[-1] * 13]]


def test_traffic_by_hand():
    def bytes_of(op, dtype, s_q, s_kv):
        return gpu_workload.traffic(gpu_workload.make(Case(op, dtype, s_q, s_kv), SMALL, "cpu"))

    # Queries see 29 and 30 keys. Of each: q 3 x 32, weights 3, ks, ke, and 30 logits out.
    assert bytes_of("lightning_indexer", "bfloat16", 2, 30) == 2 * (96 * 2 + 12 + 8) + 30 * 32 * 2 + 2 * 30 * 4
    assert bytes_of("lightning_indexer", "float8_e4m3fn", 2, 30) == 2 * (96 + 12 + 8) + 30 * (32 + 4) + 2 * 30 * 4
    assert bytes_of("topk", "float32", 2, 30) == (29 + 30) * 4 + 2 * 8 + 2 * 16 * 4
    # Each row of 16 of 400 keys counts once, however many queries select it.
    work = gpu_workload.make(Case("sparse_mla", "bfloat16", 2, 400), SMALL, "cpu")
    work.inputs["indices"][1] = work.inputs["indices"][0]
    assert gpu_workload.traffic(work) == 2 * 2 * 576 * 2 + 16 * 576 * 2 + 2 * 16 * 4 + 2 * 2 * (512 * 2 + 4 + 4)
    # Queries see 2 and 3 of three keys, and select all they see: 3 rows. out, max_logits and lse of 2 heads.
    indices, out = 2 * 16 * 4, 2 * 2 * (512 * 2 + 4 + 4)
    assert bytes_of("sparse_mla", "bfloat16", 2, 3) == 2 * 2 * 576 * 2 + 3 * 576 * 2 + indices + out
    assert bytes_of("sparse_mla_fp8", "float8_e4m3fn", 2, 3) == 2 * 2 * 576 * 2 + 3 * 656 + indices + out


@pytest.mark.parametrize(("op", "dtype"), CASES)
@pytest.mark.parametrize("s_q", [1, 6])
def test_torch_does_the_same_work(op, dtype, s_q, monkeypatch):
    """In one group, and in groups of few queries; and a wrong result is none."""
    work = gpu_workload.make(Case(op, dtype, s_q, 40), SMALL, "cpu")
    checker = Checker(work)
    for limit in (2**31, 1000):
        monkeypatch.setattr(gpu_torch, "LIMIT", limit)
        result = gpu_torch.prepare(work, 90)()
        checker.peer("torch", result)
    first = (result[0] if isinstance(result, tuple) else result).clone()
    first[s_q // 2].view(-1)[0] = 39 if first.dtype in (torch.int32, torch.int64) else 9
    first[s_q // 2].view(-1)[1] = first[s_q // 2].view(-1)[0]
    with pytest.raises(check.CheckError, match=f"torch: {op}"):
        checker.peer("torch", (first, result[1]) if isinstance(result, tuple) else first)


def test_no_product_of_8_bits_no_peer():
    for dtype, message in (("float8_e4m3fn", r"below compute capability 8\.9"), ("int8", "no int8 product")):
        work = gpu_workload.make(Case("lightning_indexer", dtype, 2, 40), SMALL, "cpu")
        with pytest.raises(Skipped, match=message):
            gpu_peers.prepare("torch", work, 86)


def test_our_own_bf16_is_a_peer():
    check_peer("bf16", Case("sparse_mla_fp8", "float8_e4m3fn", 6, 40), SMALL)


def test_flash_mla_has_pages_of_64_rows():
    rows = torch.arange(70, dtype=torch.uint8)[:, None].repeat(1, 656)
    cache = gpu_torch.flash_mla_cache(rows)
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
        if gpu_peers.importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed")
    with pytest.raises(Skipped, match=words):
        gpu_peers.prepare(name, gpu_workload.make(Case(op, dtype, 2, 40), SMALL, "cpu"), 90)


def package(monkeypatch, name, **functions):
    """A package of that name that has these functions."""
    made = types.ModuleType(name)
    made.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, made)


def check_peer(name, case, preset, capability=90):
    work = gpu_workload.make(case, preset, "cpu")
    peer = gpu_peers.prepare(name, work, capability)
    Checker(work).peer(name, peer.result(peer.call()))


@pytest.mark.parametrize("op", ["lightning_indexer", "indexer_topk"])
def test_deep_gemm_is_called_as_it_is_made(op, monkeypatch):
    def fp8_mqa_logits(q, kv, weights, ks, ke, clean_logits=False, max_seqlen_k=0):
        logits = dsa_tvm.lightning_indexer(q, kv[0], weights, ks, ke, kv[1])
        return logits if clean_logits else torch.where(torch.isneginf(logits), 1e30, logits)

    package(monkeypatch, "deep_gemm", fp8_mqa_logits=fp8_mqa_logits)
    check_peer("deep_gemm", Case(op, "float8_e4m3fn", 6, 40), SMALL)
    with pytest.raises(Skipped, match=r"begins at compute capability 9\.0"):
        check_peer("deep_gemm", Case(op, "float8_e4m3fn", 6, 40), SMALL, 86)


@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize("capability", [90, 100])
def test_flash_mla_is_called_as_it_is_made(d_qk, capability, monkeypatch):
    preset = presets.Preset(h_idx=3, d_idx=32, topk=16, h_q=64, d_qk=d_qk, d_v=512, sm_scale=0.06)
    old = capability == 90 or d_qk == 576

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, use_legacy=False):
        assert kv.dim() == indices.dim() == 3 and use_legacy == old
        return dsa_tvm.sparse_mla(q, kv[:, 0], indices[:, 0], sm_scale=sm_scale, d_v=d_v)

    package(monkeypatch, "flash_mla", flash_mla_sparse_fwd=flash_mla_sparse_fwd)
    check_peer("flash_mla", Case("sparse_mla", "bfloat16", 6, 40), preset, capability)
    with pytest.raises(Skipped, match="takes bfloat16 and 64 or 128 heads"):
        check_peer("flash_mla", Case("sparse_mla", "bfloat16", 6, 40), SMALL)


def test_flash_mla_decodes_from_its_cache(monkeypatch):
    preset = presets.Preset(h_idx=3, d_idx=32, topk=16, h_q=64, d_qk=576, d_v=512, sm_scale=0.06)
    schedule = object()

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=None, indices=None, use_legacy=False, kv_format=None,
    ):  # fmt: skip
        assert q.shape == (6, 1, 64, 576) and k_cache.shape == (1, 64, 1, 656) and indices.shape == (6, 1, 16)
        assert tile_scheduler_metadata is schedule and is_fp8_kvcache and use_legacy and kv_format == "V32"
        rows = k_cache.view(torch.uint8).view(-1, 656)[:40]
        out, _, lse = dsa_tvm.sparse_mla_fp8(q[:, 0], rows, indices[:, 0], sm_scale=softmax_scale, d_v=head_dim_v)
        return out[:, None], lse

    functions = {"flash_mla_with_kvcache": flash_mla_with_kvcache, "get_mla_metadata": lambda: (schedule, None)}
    package(monkeypatch, "flash_mla", **functions)
    check_peer("flash_mla_fp8", Case("sparse_mla_fp8", "float8_e4m3fn", 6, 40), preset)
    with pytest.raises(Skipped, match="rows of 576, and few queries"):
        check_peer("flash_mla_fp8", Case("sparse_mla_fp8", "float8_e4m3fn", 257, 40), preset)


@pytest.fixture
def vllm(monkeypatch):
    """Operators of vLLM's names and schemas that are ours."""

    def persistent_topk(logits, lengths, output, workspace, k, max_seq_len):
        assert workspace.dtype == torch.uint8 and max_seq_len == logits.shape[1]
        dsa_tvm.topk(logits, 0 * lengths, lengths, k, out=output)

    def top_k_per_row_prefill(logits, starts, ends, indices, rows, stride0, stride1, topk):
        assert (rows, stride0, stride1) == (len(logits), *logits.stride())
        dsa_tvm.topk(logits, starts, ends, topk, out=indices)

    def sparse_prefill_fwd(q, kv, indices, sm_scale, d_v, *optional):
        return list(dsa_tvm.sparse_mla(q, kv[:, 0], indices[:, 0], sm_scale=sm_scale, d_v=d_v))

    made = {
        persistent_topk: "_C:(Tensor logits, Tensor l, Tensor(a!) out, Tensor(b!) workspace, int k, int n) -> ()",
        top_k_per_row_prefill: "_C:(Tensor x, Tensor s, Tensor e, Tensor(a!) out, int m, int a, int b, int k) -> ()",
        sparse_prefill_fwd: "_flashmla_C:(Tensor q, Tensor kv, Tensor i, float scale, int d_v, Tensor? sink=None, "
        "Tensor? length=None, Tensor? out=None) -> Tensor[]",
    }
    if gpu_peers.importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    monkeypatch.setattr(gpu_peers, "_load_vllm", lambda pattern: None)
    libraries = [torch.library.Library(name, "FRAGMENT") for name in ("_C", "_flashmla_C")]
    for function, schema in made.items():
        namespace, arguments = schema.split(":", 1)
        library = next(x for x in libraries if x.ns == namespace)
        library.define(function.__name__ + arguments)
        library.impl(function.__name__, function, "CompositeExplicitAutograd")
    yield
    for library in libraries:
        library._destroy()


def test_vllm_is_called_as_it_is_made(vllm):
    preset = presets.Preset(h_idx=3, d_idx=32, topk=512, h_q=64, d_qk=576, d_v=512, sm_scale=0.06)
    for name in ("vllm", "vllm_prefill"):
        check_peer(name, Case("topk", "float32", 3, 900), preset)
    check_peer("vllm", Case("sparse_mla", "bfloat16", 3, 900), preset)
    with pytest.raises(Skipped, match="no operator _C"):
        gpu_peers._vllm_operator("", "_C", "missing")
