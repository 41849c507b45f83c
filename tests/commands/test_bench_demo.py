"""The commands bench and demo, and what they are made of, at small sizes. Nothing here depends on a time."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dsa_tvm import cli, functions, presets
from dsa_tvm.benchmark import ceilings, check, clock, command, cpu, demo, prompt, sample_model, workload
from dsa_tvm.benchmark.peers import Peer, Skipped
from dsa_tvm.benchmark.peers import cpu as peers
from dsa_tvm.errors import ArgumentError
from dsa_tvm.models import sample
from dsa_tvm.ops import OPS
from dsa_tvm.ops.element_types import PRODUCTS
from dsa_tvm.runtime import machine
from dsa_tvm.spec import DIMS, Tolerance
from dsa_tvm.terminal import text as report

SMALL = presets.Preset(h_idx=3, d_idx=32, topk=16, h_q=2, d_qk=512, d_v=512, sm_scale=0.06)
TIGHT = Tolerance(abs=1e-6, rel=1e-6, cos=1e-6)


@pytest.fixture
def small(monkeypatch):
    """The default preset, small."""
    monkeypatch.setitem(presets.PRESETS, "deepseek-v3.2", SMALL)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_served(name):
    preset = presets.get(name)
    assert all(DIMS[d].serves(length) for d, length in preset.lengths.items())


def test_scales_are_the_models_own():
    """Those that Transformers computes; the width of an absorbed row would be another model."""
    mscale = 1.368887945  # 0.1 * ln(40) + 1
    assert presets.get("deepseek-v3.2").sm_scale == pytest.approx(0.0721687836 * mscale**2)
    assert presets.get("deepseek-v3.2-tp8").sm_scale == presets.get("deepseek-v3.2").sm_scale
    assert presets.get("glm-5").sm_scale == 1 / 16
    assert presets.get("deepseek-v4-512").sm_scale == presets.get("deepseek-v4-1024").sm_scale == 512**-0.5
    assert presets.mla_scale(192, rope_factor=40.0) == presets.mla_scale(192, mscale_all_dim=1.0) == 192**-0.5


def test_scales_are_those_of_transformers():
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    v32 = importlib.import_module("transformers.models.deepseek_v32.modeling_deepseek_v32")
    rope = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert presets.get("deepseek-v3.2").sm_scale == pytest.approx(v32.yarn_apply_mscale(rope, (128 + 64) ** -0.5))
    rope = {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7}
    scale = presets.mla_scale(192, rope_factor=8.0, mscale_all_dim=0.7)
    assert scale == pytest.approx(v32.yarn_apply_mscale(rope, 192**-0.5))


@pytest.mark.parametrize("name", ["sparse_mla", "sparse_mla_fp8", "dsa_attention"])
def test_no_door_has_a_default_scale(name):
    parameter = inspect.signature(getattr(functions, name)).parameters["sm_scale"]
    assert parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def test_workload_is_seeded_and_causal():
    first, second = (workload.make("dsa_attention", SMALL, 5, 3) for _ in range(2))
    assert all(np.array_equal(first.inputs[n], second.inputs[n]) for n in first.inputs)
    assert first.inputs["ke"].tolist() == [0, 0, 1, 2, 3]
    # Visible: 0 + 0 + 1 + 2 + 3 keys, all of them selected.
    expected = 6 * 2 * (3 * 32 + 2 * (512 + 512))
    assert workload.flops("dsa_attention", first.lengths, first.inputs["ks"], first.inputs["ke"]) == expected


@pytest.mark.parametrize("op", workload.OPERATORS)
@pytest.mark.parametrize("dtype", workload.DTYPES)
def test_the_check_passes_what_is_right(op, dtype):
    pytest.importorskip("ml_dtypes")
    if not workload.serves(op, dtype):
        pytest.skip(f"{op} has no {dtype}")
    work = workload.make(op, SMALL, 4, 50, types=workload.types_on_cpu(op, dtype))
    outputs = getattr(functions, op)(**work.inputs, **work.attrs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    finding = check.check(work, outputs, range(4))
    assert finding.of_allowed <= 1
    wrong = outputs[0].copy()
    wrong[2].flat[3] = 1 if wrong.dtype == np.int32 else 99
    with pytest.raises(check.CheckError, match=op):
        check.check(work, (wrong, *outputs[1:]), range(4))


def test_compare_looks_at_infinities_first():
    reference = np.array([1.0, -np.inf, np.nan])
    assert check.compare("x", reference.astype(np.float32), reference, TIGHT) == (0.0, 0.0)
    for wrong in ([1.0, np.inf, np.nan], [1.0, -np.inf, 0.0], [np.nan, -np.inf, np.nan], [1.1, -np.inf, np.nan]):
        with pytest.raises(check.CheckError):
            check.compare("x", np.array(wrong), reference, TIGHT)


def test_compare_without_any_tolerance():
    """No error is a fraction of nothing: it is 0 or infinitely too large, wherever in the tensor it stands."""
    exact = Tolerance(abs=0, rel=0, cos=0)
    assert check.compare("x", np.array([0, 2]), np.array([0, 2]), exact) == (0.0, 0.0)
    with pytest.raises(check.CheckError, match="x: expected errors within the tolerance, got inf times that: 3 for 2"):
        check.compare("x", np.array([0, 3]), np.array([0.0, 2.0]), exact)
    with pytest.raises(check.CheckError, match=r"x: expected the shape \(2,\), got \(1, 2\)"):
        check.compare("x", np.zeros((1, 2)), np.zeros(2), exact)


def test_a_selection_may_differ_by_near_ties_only():
    logits = np.array([5.0, 1.0, 1.0 + 1e-7, 4.0, -np.inf])

    def near_ties(*row):
        return check.check_selection("x", np.array(row, np.int32), logits, len(row), TIGHT)

    assert near_ties(0, 2, 3) == 0
    assert near_ties(0, 1, 3) == 1
    assert near_ties(0, 1, 2, 3, -1) == 0
    for wrong in ((1, 2, 3), (0, 3, 2), (0, 3, 3), (0, 3, 4), (0, 3, 9), (0, 3, -1), (0, 1, 2, 3, 4)):
        with pytest.raises(check.CheckError):
            near_ties(*wrong)


@pytest.mark.parametrize(
    "name, op", [("numpy", "topk"), *((name, op) for name in ("torch", "ort") for op in workload.OPERATORS)]
)
@pytest.mark.parametrize("s_q, s_kv", [(1, 40), (6, 40), (1, 9), (6, 9)])
def test_peers_do_the_same_work(name, op, s_q, s_kv):
    work = workload.make(op, SMALL, s_q, s_kv)
    try:
        peer = peers.prepare(name, work, 2)
    except Skipped as reason:
        pytest.skip(str(reason))
    result = peer.call()
    # What cannot be checked without the selection is compared with ours here: their first output.
    result = peer.result(result) if peer.result is not None else result[0]
    got = np.asarray(result[0] if isinstance(result, tuple) else result)
    # Packed rows go with queries in bfloat16.
    types = {} if workload.serves(op, "float32") else {"T": "bfloat16"}
    ours_at = work if not types else workload.make(op, SMALL, s_q, s_kv, types=types)
    ours = getattr(functions, op)(**ours_at.inputs, **work.attrs)
    if op in ("topk", "indexer_topk"):
        # In no order, and padded with what may not be selected.
        for row, expected, stop in zip(got, ours, range(s_kv - s_q + 1, s_kv + 1), strict=True):
            assert set(row[row < stop]) == set(expected[expected >= 0])
    else:
        expected = ours[0] if isinstance(ours, tuple) else ours
        error = 1e-4 if ours_at is work else 2e-2
        np.testing.assert_allclose(got, expected.astype(np.float32), rtol=error, atol=error)


@pytest.mark.parametrize("s_q", [1, 6])
@pytest.mark.parametrize("dtype", workload.DTYPES[1:])
@pytest.mark.parametrize("op", workload.OPERATORS)
def test_peers_take_our_types(op, dtype, s_q):
    """Torch in each type that it can multiply them in, the others in float32: all within what a peer may differ."""
    torch_peer = pytest.importorskip("dsa_tvm.benchmark.peers.torch_peer")
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    if not workload.serves(op, dtype):
        pytest.skip(f"{op} has no {dtype}")
    work = workload.make(op, SMALL, s_q, 40, types=workload.types_on_cpu(op, dtype))
    checker = check.Checker(work)
    tensors = {name: peers._tensor(x) for name, x in work.inputs.items()}
    of_queries = peers._dtype(work)
    first = tensors[work.spec.inputs[0].name]
    assert first.dtype is getattr(torch, of_queries) and of_queries in (dtype, "bfloat16", "float32")
    for form in torch_peer.forms(of_queries):
        call = torch_peer.prepare(workload.Workload(op, tensors, work.attrs, work.lengths), product=form)
        checker.peer(f"torch, {form}", call())
    assert torch_peer.fastest_form(of_queries, 1) in torch_peer.forms(of_queries)
    try:
        peer = peers.prepare("ort", work, 1)
    except Skipped as reason:
        pytest.skip(str(reason))
    if peer.result is not None:
        checker.peer("ORT", peer.result(peer.call()))


def test_bench_in_another_type(small, capsys, tmp_path):
    """Ours and torch in that type, and what of the machine's limits ours reaches; the gate is before the time."""
    pytest.importorskip("ml_dtypes")
    target = tmp_path / "figures.json"
    for dtype, ops in (("bfloat16", 6), ("float8_e4m3fn", 5), ("int8", 3)):
        arguments = ["bench", "--dtype", dtype, "--s-q", "1", "--s-kv", "40", "--threads", "1", "--seconds", "0.001"]
        assert cli.main([*arguments, "--json", str(target)]) == 0
        rows = json.loads(target.read_bytes())["rows"]
        assert len(rows) == ops and all(row["ours_ms"] > 0 and row["dtype"] == dtype for row in rows)
        printed = capsys.readouterr().out
        own = ceilings.Ceilings(dtype).product
        assert f"GFLOP/s of {own} products" in printed
        assert ("shares are of the float32 peak" in printed) == (own == "float32")
        for row in rows:
            assert (row["of_peak"] is None) == (row["op"] == "topk")
            assert row["of_read"] > 0 and row["bound"] in ("peak", "read")
            torch = row["peers"]["torch"]
            assert torch.get("skipped") or torch.get("product") in (PRODUCTS if row["op"] != "topk" else (None,))


def test_a_peer_that_is_wrong_has_no_time(small, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "_numpy", lambda work, threads: Peer(lambda: np.zeros((1, 16), np.int64)))
    target = tmp_path / "figures.json"
    arguments = ["bench", "topk", "--s-q", "1", "--s-kv", "40", "--threads", "1", "--seconds", "0.001"]
    assert cli.main([*arguments, "--json", str(target)]) == 0
    (row,) = json.loads(target.read_bytes())["rows"]
    assert (
        "its result is wrong" in row["peers"]["numpy"]["skipped"] and "its result is wrong" in capsys.readouterr().out
    )


@pytest.mark.parametrize("s_q", [1, 5])
def test_dense_model_attends_to_every_earlier_key(s_q):
    pytest.importorskip("onnxruntime")
    work = workload.make("dsa_attention", SMALL, s_q, 30)
    q, kv, ke = (work.inputs[n] for n in ("q", "kv", "ke"))
    running = peers.session(peers.dense_model(SMALL.sm_scale, work.lengths, s_q == 1), 1)
    indices = np.where(np.arange(30) < ke[:, None], np.arange(30), -1)
    expected = OPS["sparse_mla"].reference(q, kv, indices, sm_scale=SMALL.sm_scale, d_v=512)[0]
    np.testing.assert_allclose(running.run(None, {"q": q, "kv": kv, "ke": ke})[0], expected, rtol=1e-4, atol=1e-5)


def test_a_peer_that_needs_too_much_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(peers, "MEMORY_LIMIT", 1000)
    with pytest.raises(Skipped, match=r"would need .* KiB, the limit is 1 KiB"):
        peers.prepare("torch", workload.make("lightning_indexer", SMALL, 1, 100), 1)


def test_bench_prints_a_row_each_and_writes_json(small, capsys, tmp_path):
    target = tmp_path / "new" / "figures.json"
    arguments = ["bench", "--s-q", "1", "3", "--s-kv", "40", "--threads", "1", "2", "--seconds", "0.001"]
    assert cli.main([*arguments, "--json", str(target)]) == 0
    printed = capsys.readouterr()
    table = [line.split() for line in printed.out.splitlines() if line.split()[0] in OPS]
    ops = [op for op in workload.OPERATORS if workload.serves(op, "float32")]
    assert [line[:4] for line in table] == [
        [op, str(s_q), "40", str(threads)] for op in ops for s_q in (1, 3) for threads in (1, 2)
    ]
    assert "[20/20]" in printed.err and "[21/" not in printed.err
    document = json.loads(target.read_bytes())
    assert document["preset"]["topk"] == 16 and document["target"] and document["environment"]["packages"]
    assert len(document["rows"]) == 20
    assert all(row["ours_ms"] > 0 and row["failed"] is None for row in document["rows"])


def test_bench_gives_a_wrong_result_no_time(small, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "topk", lambda logits, ks, ke, topk, num_threads: np.zeros((1, topk), np.int32))
    target = tmp_path / "figures.json"
    arguments = ["bench", "topk", "lightning_indexer", "--s-q", "1", "--s-kv", "40", "--threads", "1"]
    assert cli.main([*arguments, "--seconds", "0.001", "--json", str(target)]) == 1
    printed = capsys.readouterr()
    lines = {line.split()[0]: line for line in printed.out.splitlines()}
    assert "FAILED" in lines["topk"] and "FAILED" not in lines["lightning_indexer"]
    assert "1 of 2 results are wrong" in printed.err
    wrong, right = json.loads(target.read_bytes())["rows"]
    assert wrong["failed"] and wrong["ours_ms"] is None and right["ours_ms"] > 0


def test_bench_keeps_what_is_done_on_interrupt(small, tmp_path, monkeypatch):
    done, medians = [], clock.medians

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(arguments)
        return medians(*arguments)

    monkeypatch.setattr(clock, "medians", interrupted)
    target = tmp_path / "figures.json"
    arguments = ["bench", "topk", "--s-q", "1", "--s-kv", "40", "50", "--threads", "1", "--seconds", "0.001"]
    assert cli.main([*arguments, "--json", str(target)]) == 130
    assert [row["s_kv"] for row in json.loads(target.read_bytes())["rows"]] == [40]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "operator: expected one of lightning_indexer.*got 'nonsense'"),
        (["topk", "--preset", "x"], "preset: expected one of deepseek-v3.2.*got 'x'"),
        (["topk", "--dtype", "float64"], "dtype: expected one of float32.*got 'float64'"),
        (["topk", "--s-q", "0"], "s_q: expected at least 1, got 0"),
        (["topk", "--s-kv", "-3"], "s_kv: expected at least 1, got -3"),
        (["topk", "--threads", "0"], "threads: expected 1..1024, got 0"),
        (["topk", "--seconds", "nan"], "seconds: expected a positive number, got nan"),
        (["topk", "--threads", "100000"], "threads: expected 1..1024, got 100000"),
        (["topk", "--json", "."], "json: expected a file that can be written, got .*Is a directory"),
        (["topk", "--json", "/dev/null/x"], "json: expected a file that can be written, got .*Not a directory"),
        (["topk", "--json", "/proc/none"], "json: expected a file that can be written"),
        (["topk", "--s-kv", str(10**12)], "s_kv: expected inputs that fit"),
    ],
)
def test_bench_refuses(arguments, message):
    args = cli._parser().parse_args(["bench", *arguments])
    with pytest.raises(ArgumentError, match=message):
        command.run(args)


@pytest.fixture
def tiny(small, monkeypatch, tmp_path):
    """A text, and a demo of few queries."""
    monkeypatch.setattr(demo, "CHUNK", 12)
    monkeypatch.setattr(demo, "STEPS", 3)

    def written(threads, step):
        step("with")
        step("without")
        took = SimpleNamespace(prefill_tokens=10, prefill_seconds=0.5, decode_tokens=2, decode_seconds=0.25)
        return sample_model.Run(took, took, sample.expected())

    monkeypatch.setattr(sample_model, "run", written)  # takes seconds, and tests/models runs it
    path = tmp_path / "text"
    path.write_text("to be, or not to be, that is the question\n" * 20)
    return path


def test_demo_checks_and_prints_a_table(tiny, capsys):
    pytest.importorskip("onnxruntime")
    assert cli.main(["demo", str(tiny), "--tokens", "500", "--threads", "2"]) == 0
    printed = capsys.readouterr()
    assert "500 tokens" in printed.out and "all checks passed" in printed.out
    for stage in ("prefill, 12 queries", "decode, a token"):
        (line,) = (line for line in printed.out.splitlines() if line.startswith(f"{stage}  "))
        assert line.count("x") >= 2 and "of allowed" in line
    (line,) = (line for line in printed.out.splitlines() if line.startswith("decode  ") and "of allowed" not in line)
    assert line.split() == ["decode", "2", "250", "ms", "8.00", "1.00x"]
    assert "[10/10]" in printed.err and "[11/" not in printed.err


def test_demo_fails_on_a_wrong_selection(tiny, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    right = functions.indexer_topk

    def wrong(*inputs, **keywords):
        indices = right(*inputs, **keywords)
        indices[:, 0] = 0
        return indices

    monkeypatch.setattr(functions, "indexer_topk", wrong)
    assert cli.main(["demo", str(tiny)]) == 1
    assert "all checks passed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (None, [], "can be read"),
        ("", [], "got an empty file"),
        ("short", [], "at least 31 bytes, got 5"),
        ("x" * 100, ["--tokens", "30"], "tokens: expected at least 31, got 30"),
        ("x" * 100, ["--threads", "-1"], "threads: expected 0 for all, or more, got -1"),
        ("x" * 100, ["--threads", "100000"], "threads: expected 1..1024, got 100000"),
    ],
)
def test_demo_refuses(tiny, content, arguments, message):
    tiny.unlink()
    if content is not None:
        tiny.write_text(content)
    with pytest.raises(ArgumentError, match=message):
        demo.run(cli._parser().parse_args(["demo", str(tiny), *arguments]))


def test_demo_takes_any_number_of_tokens(tiny):
    """More than the text has is all of it."""
    tokens, notes = demo._tokens(tiny, 10**20, 31, SMALL)
    assert len(tokens) == tiny.stat().st_size and not notes


@pytest.fixture
def short(monkeypatch):
    """Less memory than by default is needed."""

    def leave(size):
        monkeypatch.setattr(machine, "memory", lambda: machine.Memory(size, "a limit"))

    return leave


def test_demo_in_little_memory(tiny, short):
    """As many tokens as fit by default; a refusal that says what is needed otherwise."""
    for_40 = demo._OTHER_BYTES + prompt.size(40, SMALL)
    short(for_40)
    tokens, notes = demo._tokens(tiny, None, 31, SMALL)
    assert len(tokens) == 40 and "40 instead of 32768" in notes[0] and "a limit" in notes[0]
    assert len(demo._tokens(tiny, 40, 31, SMALL)[0]) == 40
    with pytest.raises(ArgumentError, match=r"expected at most 40, which fit into 180 MiB \(a limit\), got 41"):
        demo._tokens(tiny, 41, 31, SMALL)
    short(demo._OTHER_BYTES // 2)
    with pytest.raises(ArgumentError, match=r"expected 180 MiB of memory at least, got 90 MiB \(a limit\)"):
        demo._tokens(tiny, None, 31, SMALL)


def test_bench_in_little_memory(small, short, capsys, tmp_path, monkeypatch):
    """Sizes that do not fit are left out with what they need; those that were asked for are refused at once."""
    short(64 << 20)
    monkeypatch.setitem(cpu.DEFAULTS, "s_q", [1])
    monkeypatch.setitem(cpu.DEFAULTS, "s_kv", [40, 10**6])
    target = tmp_path / "figures.json"
    arguments = ["bench", "sparse_mla", "--threads", "1", "--seconds", "0.001", "--json", str(target)]
    assert cli.main(arguments) == 0
    first, second = json.loads(target.read_bytes())["rows"]
    assert first["ours_ms"] > 0 and second["ours_ms"] is None and "GiB of memory" in second["skipped"]
    said = capsys.readouterr().out
    assert "ours: needs" in said and "memory left at the end: 64 MiB (a limit)" in said
    target.unlink()
    assert cli.main([*arguments, "--s-kv", "40", "1000000"]) == 1
    assert "expected inputs that fit into memory, got 1 and 1000000" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("arguments", [["demo"], ["bench", "--seconds", "0.001", "--threads", "1"]])
def test_nothing_is_killed_in_a_control_group_of_300_mb(arguments, tmp_path):
    """The real thing, where a control group can be made: a result or a reason, never a kill."""
    group = Path(f"/sys/fs/cgroup/memory/dsa_tvm_test_{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(300 << 20))
    except OSError:
        pytest.skip("no control group of memory, version 1, can be made")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dsa_tvm.cli", *arguments],
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    assert "limit of the control group" in done.stdout


def test_demo_has_a_text_of_its_own():
    path = prompt.default_text()
    assert len(prompt.read(path, 32768, 1)) == 32768


def test_demo_without_onnx_says_so(tiny, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "dsa_tvm.export", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [n for n in sys.modules if n.startswith("dsa_tvm.export.")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["demo", str(tiny)]) == 1
    assert "onnx" in capsys.readouterr().err


def test_equal_contexts_have_related_keys():
    text = b"the cat sat on the mat; the dog ate all of it. the cat sat on a hat"
    inputs = prompt.embed(np.frombuffer(text, np.uint8), 4, SMALL)
    again, first = text.rindex(b"cat sat") + 6, text.index(b"cat sat") + 6
    similarity = inputs.index_k @ inputs.index_k[again]
    similarity[again] = -np.inf
    assert similarity.argmax() == first
    feed = inputs.feeds(len(text) - 2, 2)
    assert feed["q"].shape == (2, 2, 512) and feed["kv"].shape == (len(text), 512)
    assert all(x.flags.c_contiguous for x in feed.values())


def test_numbers_have_three_digits():
    assert [report.digits(x) for x in (1234.5, 99.96, 9.996, 0.5, 0.00012)] == [
        "1234",
        "100",
        "10.0",
        "0.500",
        "1.2e-04",
    ]
    assert [report.duration(x) for x in (12.0, 0.5, 2e-5)] == ["12.0 s", "500 ms", "20.0 us"]
    assert report.table(["a", "bb"], [["ccc", "d"]]) == ["a    bb", "ccc   d"]
