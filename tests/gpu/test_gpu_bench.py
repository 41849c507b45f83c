"""``dsa-tvm bench --suite cuda`` on tensors of the CPU: timing in turns, the table, and what can go wrong."""

from __future__ import annotations

import itertools
import json
import re
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

import torch
from fake_gpu import CEILINGS, SMALL, FakeGpu

from dsa_tvm import cli, functions, presets
from dsa_tvm.benchmark import clock, command, cuda, device, workload
from dsa_tvm.benchmark.clock import DeviceClock
from dsa_tvm.benchmark.peers import Peer
from dsa_tvm.benchmark.peers import cuda as peers
from dsa_tvm.errors import ArgumentError, DsaError
from dsa_tvm.ops import OPS
from dsa_tvm.runtime import library

#: What our operators take on the GPU, and torch's; no two ratios are the same.
OURS = {op: (1 + i) * 1e-3 for i, op in enumerate(cuda.SUITE)}
TORCH = {op: (1.5 + 3 * i) * 1e-3 for i, op in enumerate(cuda.SUITE)}


@pytest.fixture
def gpu(monkeypatch):
    """In place of a GPU; the default preset is small."""
    fake = FakeGpu()
    monkeypatch.setattr(device, "find", lambda: fake)
    for op, seconds in OURS.items():
        monkeypatch.setattr(functions, op, fake.taking(seconds, getattr(functions, op)))
    prepare = peers._MAKERS["torch"]

    def torch_peer(work, capability):
        peer = prepare(work, capability)
        return Peer(fake.taking(TORCH[work.op], peer.call), peer.result)

    monkeypatch.setitem(peers._MAKERS, "torch", torch_peer)
    monkeypatch.setitem(presets.PRESETS, "deepseek-v3.2", SMALL)
    return fake


@pytest.mark.parametrize(("alternate", "order"), [(False, "ababab"), (True, "abbaab")])
def test_contenders_take_turns(alternate, order):
    """In order, or back and forth; a caller that has seen enough takes no more."""
    asked = []

    def turns():
        return clock.take_turns({n: lambda i, n=n: asked.append(n) or (n, i) for n in "ab"}, 3, alternate)

    assert list(turns()) == [{"a": ("a", i), "b": ("b", i)} for i in range(3)]
    assert asked == list(order)
    asked.clear()
    next(turns())
    assert asked == ["a", "b"]


def test_the_median_is_of_all_turns():
    """Of a clock that slows down from turn to turn, and takes two times in each."""

    class Slowing:
        def turns(self, call, seconds):
            call()
            assert seconds == 2
            return lambda i: [10.0**i, 3 * 10.0**i]

    done = []
    assert clock.medians(Slowing(), {"a": lambda: done.append("a"), "b": lambda: done.append("b")}, 10) == {
        "a": 200.0,
        "b": 200.0,
    }
    assert done == ["a", "b"]


def test_turns_leave_out_what_the_host_takes():
    """Two contenders, whose launches take longer than their work."""
    fake = FakeGpu()
    order = []

    def contender(name, launch, seconds):
        return fake.taking(seconds, lambda: order.append(name), launch)

    calls = {"a": contender("a", 2e-3, 1e-5), "b": contender("b", 5e-5, 1e-3)}
    times = clock.medians(DeviceClock(fake), calls, 0.1)
    assert times == pytest.approx({"a": 1e-5, "b": 1e-3})
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["a", "b"] * 6  # the warm-up, and five turns
    # A turn of 20 ms has as many calls as fit, and a wait at its end alone.
    assert order.count("a") - 2 == 5 * 3 and order.count("b") - 2 == 5 * 17
    assert fake.log.count("flush") == len(order) - 4 and fake.log[8:12] == ["flush"] * 3 + ["synchronize"]
    assert clock.medians(DeviceClock(fake), {"a": calls["a"]}, 1e-9)["a"] == pytest.approx(1e-5)


def test_a_run(gpu, capsys, tmp_path):
    target = tmp_path / "figures.json"
    arguments = ["bench", "--suite", "cuda", "--s-q", "1", "4", "--s-kv", "40", "--seconds", "0.01"]
    assert cli.main([*arguments, "--json", str(target)]) == 0
    printed = capsys.readouterr()
    document = json.loads(target.read_bytes())
    rows = document["rows"]
    assert document["gpu"]["name"] == "Fake" and document["ceilings"] == CEILINGS and document["environment"]
    assert document["suite"] == "cuda" and document["preset"]["topk"] == 16 and document["seconds"] == 0.01
    assert [(r["op"], r["dtype"]) for r in rows[::2]] == [
        (op, dtype) for op in cuda.SUITE for dtype in cuda.SUITE[op][0]
    ]
    for row in rows:
        op = row["op"]
        assert row["failed"] is row["skipped"] is None and row["tbps"] > 0 and row["error_of_allowed"] <= 1
        assert row["ours_ms"] == pytest.approx(1e3 * OURS[op])
        assert row["peers"]["torch"] == pytest.approx({"ms": 1e3 * TORCH[op], "ratio": TORCH[op] / OURS[op]})
        assert (row["tflops"] is None) == (op == "topk")
    lines = [line.split() for line in printed.out.splitlines()]
    table = [line[:4] for line in lines if line and line[0] in OPS and line[1] in workload.DTYPES]
    assert table == [[r["op"], r["dtype"], str(r["s_q"]), "40"] for r in rows]
    assert "-  DeepGEMM: DeepGEMM's fp8_mqa_logits takes fp8 queries and keys (lightning_indexer s_q 1" in printed.out
    assert f"[{len(rows)}/{len(rows)}]" in printed.err


def test_figures_by_hand(gpu, capsys, tmp_path):
    """Operations and bytes over the seconds of our call, and the cells that are printed of them."""
    target = tmp_path / "figures.json"
    arguments = ["bench", "lightning_indexer", "sparse_mla_fp8", "--suite", "cuda", "--s-q", "1", "--s-kv", "40"]
    assert cli.main([*arguments, "--seconds", "0.01", "--json", str(target)]) == 0
    bf16, fp8, packed = json.loads(target.read_bytes())["rows"]
    # 40 keys, 3 heads of 32. q, weights, ks, ke, k and, of fp8, a scale each; logits.
    assert bf16["tflops"] == pytest.approx(2 * 40 * 3 * 32 / 1e-3 / 1e12)
    assert bf16["tbps"] == pytest.approx((96 * 2 + 12 + 8 + 40 * 32 * 2 + 40 * 4) / 1e-3 / 1e12)
    assert bf16["of_gemm"] == pytest.approx(bf16["tflops"] / 1e-4) and bf16["of_copy"] == pytest.approx(
        bf16["tbps"] / 1e-5
    )
    assert fp8["tflops"] == pytest.approx(bf16["tflops"]) and fp8["of_gemm"] == pytest.approx(fp8["tflops"] / 2e-4)
    assert fp8["tbps"] == pytest.approx((96 + 12 + 8 + 40 * (32 + 4) + 40 * 4) / 1e-3 / 1e12)
    # 16 keys, 2 heads of 576 and 512, multiplied as bf16; ours on rows of bf16 is a peer.
    assert packed["tflops"] == pytest.approx(2 * 16 * 2 * (576 + 512) / OURS["sparse_mla_fp8"] / 1e12)
    assert packed["of_gemm"] == pytest.approx(packed["tflops"] / 1e-4)
    assert packed["peers"]["bf16"]["ratio"] == pytest.approx(OURS["sparse_mla"] / OURS["sparse_mla_fp8"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first, second, third = (line for line in lines if line and line[0] in OPS)
    expected = "lightning_indexer bfloat16 1 40 1.00 7.7e-06 2.9e-06 8% 29% 1.50 1.50"
    assert first[:11] == expected.split()
    assert second[1] == "float8_e4m3fn" and second[4:9] == ["1.00", "7.7e-06", "1.7e-06", "4%", "17%"]
    assert third[9:13] == ["4.00", "0.80", "13.5", "2.70"]


def run_one(op, tmp_path):
    target = tmp_path / "figures.json"
    code = cli.main(["bench", "--suite", "cuda", op, "--s-q", "2", "--s-kv", "40", "50", "--json", str(target)])
    return code, json.loads(target.read_bytes())["rows"]


def test_a_wrong_result_has_no_time(gpu, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "topk", lambda logits, ks, ke, topk: torch.zeros((2, topk), dtype=torch.int32))
    code, rows = run_one("topk", tmp_path)
    assert code == 1 and all(row["failed"] and row["ours_ms"] is None for row in rows)
    printed = capsys.readouterr()
    assert "FAILED" in printed.out and "2 of 2 results are wrong" in printed.err


def test_a_wrong_peer_has_no_time(gpu, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(peers._MAKERS, "vllm", lambda work, _: Peer(lambda: torch.zeros((2, 16)).int()))
    code, rows = run_one("topk", tmp_path)
    assert code == 0 and all("result is wrong" in row["peers"]["vllm"]["skipped"] for row in rows)
    assert all(row["ours_ms"] and row["peers"]["torch"]["ms"] for row in rows)


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def test_memory_that_runs_out_stops_one_shape_alone(gpu, capsys, tmp_path, monkeypatch):
    make = cuda.make
    monkeypatch.setattr(
        cuda,
        "make",
        lambda case, *rest: (raising(FakeGpu.out_of_memory()) if case.s_kv == 40 else make)(case, *rest),
    )
    monkeypatch.setitem(peers._MAKERS, "vllm", raising(FakeGpu.out_of_memory()))
    code, (first, second) = run_one("topk", tmp_path)
    assert code == 0 and first["skipped"] == "out of memory" and first["ours_ms"] is None
    assert second["ours_ms"] and second["peers"]["vllm"] == {"skipped": "out of memory"}
    assert "-  ours: out of memory (topk s_q 2 s_kv 40)" in capsys.readouterr().out


def test_operators_that_are_not_served_are_said(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "topk", raising(DsaError("topk: there are no CUDA kernels for it")))
    code, rows = run_one("topk", tmp_path)
    assert code == 0 and all("no CUDA kernels" in row["skipped"] for row in rows)


@pytest.mark.parametrize("where", ["ours", "peer"])
def test_a_gpu_that_is_lost_ends_it_and_keeps_what_is_done(gpu, capsys, tmp_path, monkeypatch, where):
    measured, done = command.measure, []

    def measure(*args):
        done.append(args)
        if len(done) == 2:
            gpu.dead = True
            error = raising(RuntimeError("CUDA error: an illegal memory access\nmore"))
            if where == "ours":
                monkeypatch.setattr(functions, "topk", error)
            else:
                monkeypatch.setitem(peers._MAKERS, "vllm", error)
        return measured(*args)

    monkeypatch.setattr(command, "measure", measure)
    code, rows = run_one("topk", tmp_path)
    assert code == 1 and len(rows) == 1
    assert capsys.readouterr().err.count("does not go on after an error (") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "operator: expected one of"),
        (["topk", "--threads", "2"], "threads: expected none with --suite cuda"),
        (["topk", "--dtype", "float16"], "dtype: expected a type that topk takes"),
        (["topk", "--s-kv", "0"], "s_kv: expected at least 1"),
        (["topk", "--s-kv", str(2**31)], "s_kv: expected at most"),
    ],
)
def test_refuses(gpu, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        args = cli._parser().parse_args(["bench", "--suite", "cuda", *arguments])
        args.run(args)


@pytest.mark.parametrize(
    ("version", "available", "words"),
    [
        (None, False, r"expected torch with CUDA, got .*, which has none"),
        ("13.0", False, "expected a CUDA GPU, got none that torch finds"),
        ("13.0", True, "expected a library with CUDA kernels, got one without; dsa-tvm build --target cuda"),
    ],
)
def test_without_a_gpu_one_line_says_what_is_missing(monkeypatch, capsys, version, available, words):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(library, "cuda_archs", lambda: ())
    assert cli.main(["bench", "--suite", "cuda"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"dsa-tvm: bench: suite cuda: {words}.*", line)


def test_without_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["bench", "--suite", "cuda"]) == 1
    assert (
        capsys.readouterr().err == "dsa-tvm: bench: suite cuda: expected torch with CUDA, got none; pip install torch\n"
    )


def test_a_gpu_s_clock_and_ceilings():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    gpu = device.Gpu()
    x = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = clock.medians(DeviceClock(gpu), {"half": lambda: x[: 2**27].zero_(), "all": x.zero_}, 0.1)
    assert 1.5 < times["all"] / times["half"] < 2.5
    assert all(value is None or value > 0 for value in gpu.ceilings(1024, 2**26).values())
