"""`dsa-tvm cost`: what is measured is right, what is left out has a reason, and the figures follow from the times."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import make  # noqa: E402

from dsa_tvm import presets  # noqa: E402
from dsa_tvm.benchmark import clock  # noqa: E402
from dsa_tvm.benchmark.check import CheckError  # noqa: E402
from dsa_tvm.benchmark.cost import dense, gate, measure, report  # noqa: E402
from dsa_tvm.benchmark.cost.contenders import CHECKED, CHECKED_TOPK, Contender, Layer  # noqa: E402
from dsa_tvm.benchmark.cost.measure import Growth, Measurement, Plan  # noqa: E402
from dsa_tvm.benchmark.cost.problem import LAYERS, METHODS, Problem  # noqa: E402
from dsa_tvm.benchmark.cost.processes import Left, Process  # noqa: E402
from dsa_tvm.cli import main  # noqa: E402
from dsa_tvm.errors import DsaError, ModelError  # noqa: E402
from dsa_tvm.models import layer as operators  # noqa: E402
from dsa_tvm.runtime import machine  # noqa: E402

SMALL = {"hidden_size": 64, "q_lora_rank": 32, "num_attention_heads": 4, "index_n_heads": 32, "index_topk": 40}


def problem(preset="deepseek-v3.2", dtype="float32", checkpoint=None, layer=0, chunk=24, **changes):
    return Problem(checkpoint, preset, layer, {**SMALL, **changes} if checkpoint is None else {}, dtype, chunk, 1)


@pytest.mark.parametrize("preset", LAYERS)
def test_presets_are_those_of_the_operators(preset):
    """The same numbers as `dsa_tvm.presets` has, from the configuration of a whole layer."""
    small = {"hidden_size": 64, "q_lora_rank": 32}
    layer = Layer(Problem(None, preset, 0, small, "float32", 1, 1), "eager")
    known, config = presets.get(preset), layer.full_config
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (known.h_idx, known.d_idx, known.topk)
    assert (config.num_attention_heads, config.kv_lora_rank) == (known.h_q, known.d_v)
    assert config.kv_lora_rank + config.qk_rope_head_dim == known.d_qk
    assert layer.attention.scaling == pytest.approx(known.sm_scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["deepseek-v3.2", "glm-5"])
def test_all_compute_what_eager_computes(preset, dtype):
    results = {method: Contender(problem(preset, dtype), method).checked() for method in METHODS}
    assert results["ours"]["selected"].sum(-1).tolist() == [min(i + 1, CHECKED_TOPK) for i in range(CHECKED)]
    assert len(results["dense"]["all"]) == max(len(dense.PREFILL), len(dense.DECODE))
    assert "outputs differ by at most" in gate.compare(results, dtype)
    # The selection counts: without it something else comes out.
    assert np.abs(results["eager"]["all"][0] - results["eager"]["some"][0]).max() > 0.02


@pytest.fixture(scope="module")
def checked():
    return {method: Contender(problem(), method).checked() for method in METHODS}


def changed(checked, method, key, value):
    return {**checked, method: {**checked[method], key: value}}


def test_the_gate_finds_a_wrong_output(checked):
    out = checked["dense"]["all"][1].copy()
    out[-1, 3] += 0.01 * np.abs(out).max()
    with pytest.raises(CheckError, match="dense: expected the outputs of eager attention, got ones that differ"):
        gate.compare(changed(checked, "dense", "all", [checked["dense"]["all"][0], out]), "float32")
    out = checked["ours"]["some"][0].copy()
    out[100] = np.nan
    with pytest.raises(CheckError, match="ours: expected the outputs of eager attention"):
        gate.compare(changed(checked, "ours", "some", [out]), "float32")


def test_the_gate_finds_a_wrong_selection(checked):
    selected = checked["ours"]["selected"].copy()
    worst = checked["ours"]["scores"][150, :151].argmin()
    best = checked["ours"]["scores"][150, :151].argmax()
    selected[150, [worst, best]] = selected[150, [best, worst]]
    with pytest.raises(CheckError, match=r"ours: .* keys that eager attention selects, got others for query 150"):
        gate.compare(changed(checked, "ours", "selected", selected), "float32")


def test_the_gate_counts_ties(checked):
    """Equal scores at the edge: either key will do, and the query's output is not compared."""
    scores, selected = checked["ours"]["scores"].copy(), checked["ours"]["selected"].copy()
    inside = int(np.flatnonzero(selected[150])[5])
    outside = int(np.flatnonzero(~selected[150, :151])[5])
    scores[150, outside] = scores[150, inside]
    selected[150, [inside, outside]] = selected[150, [outside, inside]]
    results = changed(changed(checked, "ours", "selected", selected), "ours", "scores", scores)
    assert gate.compare(results, "float32").endswith("; 1 queries select other keys of equal scores")


def test_the_gate_is_red_for_a_broken_layer(monkeypatch):
    """Not only for broken numbers: a selection that starts one key late."""
    right = operators.indexer_topk

    def late(q, k, weights, start, end, k_scale, *, topk):
        return right(q, k, weights, start + 1, end, k_scale, topk=topk)

    monkeypatch.setattr(operators, "indexer_topk", late)
    results = {method: Contender(problem(), method).checked() for method in ("ours", "eager")}
    with pytest.raises(CheckError, match="ours: expected the keys that eager attention selects"):
        gate.compare(results, "float32")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_call_is_at_its_position(phase):
    """All methods, over the same cache: with topk above the position they agree, and a call changes nothing."""
    outs = {}
    for method in METHODS:
        contender = Contender(problem(index_topk=100), method)
        contender.prepare(phase, 70)
        assert contender.call().shape[1] == (24 if phase == "prefill" else 1)
        if method == "dense":  # its cache is another draw: put that of the others in
            other = Contender(problem(index_topk=100), "eager")
            other.prepare(phase, 70)
            kept = next(x for x in other._arguments.values() if isinstance(x, transformers.Cache)).layers[0]
            rows = torch.cat([kept.keys[0, 0], kept.values[0, 0]], -1)
            contender._arguments["rows"][: len(rows)] = rows
        outs[method] = contender.call()
        assert torch.equal(outs[method], contender.call())
    for method, out in outs.items():
        torch.testing.assert_close(out, outs["eager"], rtol=0, atol=2e-5, msg=method)


def test_shares_are_parts_of_one():
    contender = Contender(problem(chunk=24), "ours")
    contender.prepare("prefill", 90)
    shares = contender.shares()
    assert set(shares) == {"projections", "indexer", "selection", "attention"}
    assert sum(shares.values()) == pytest.approx(1) and all(0 < x < 1 for x in shares.values())
    contender.prepare("decode", 30)  # topk is 40: nothing is scored
    shares = contender.shares()
    assert shares["indexer"] == shares["selection"] == 0 and sum(shares.values()) == pytest.approx(1)
    assert operators.indexer_topk.__name__ == "indexer_topk"


def test_growth():
    growth = Growth()
    assert growth.seconds(1000) == 0 and growth.bytes(1000) == 0
    growth.add(1000, 2.0, 100)
    assert growth.seconds(2000) == 0 and growth.bytes(4000) == 400
    growth.add(2000, 3.0, 150)
    assert growth.seconds(4000) == pytest.approx(5.0) and growth.bytes(4000) == 250
    growth.add(4000, 20.0, 150)  # one disturbed time; and bytes never shrink
    assert growth.seconds(8000) == pytest.approx(40.0) and growth.bytes(8000) == 150
    growth.add(8000, 19.0, 150)
    assert growth.seconds(16000) == pytest.approx(19.0)


class FakeProcess:
    """Takes seconds and bytes by formulas, in no time."""

    formulas: dict = {}  # noqa: RUF012
    asked: list = []  # noqa: RUF012

    def __init__(self, of, method):
        self.method, self.running, self.position = method, True, 0

    def stop(self):
        self.running = False

    def ask(self, name, *arguments, seconds=0.0):
        self.asked.append((self.method, name, *arguments))
        if name == "load":
            self.running = True
            return {"target": "t", "layer": {}, "bytes": 1000}
        if name == "prepare":
            self.position = arguments[1]
            found = self.formulas[self.method](self.position)
            if isinstance(found, str):
                self.running = found != "killed"
                raise Left(found)
            return {"seconds": found[0], "form": None}
        seconds_, grown = self.formulas[self.method](self.position) if name in ("time", "peak") else (0, 0)
        return {"time": [seconds_], "peak": 1000 + grown, "shares": {"projections": 1.0}}.get(name)


@pytest.fixture
def faked(monkeypatch):
    def run(positions, limit=60.0, seconds=1.0, memory=10**12, phases=("decode",), **formulas):
        monkeypatch.setattr(measure, "Process", FakeProcess)
        monkeypatch.setattr(FakeProcess, "formulas", formulas)
        monkeypatch.setattr(FakeProcess, "asked", [])
        monkeypatch.setattr(machine, "memory", lambda: machine.Memory(memory, "a limit"))
        plan = Plan(problem(), list(formulas), phases, positions, seconds, limit)
        with Measurement(plan) as measurement:
            measurement._bytes = dict.fromkeys(formulas, 1000)  # as `check` leaves it
            return {(row["position"], row["method"]): row for row in measurement.run(lambda line: None)}

    return run


def test_what_takes_too_long_is_left_out(faked):
    rows = faked(
        [1000, 2000, 4000, 8000], limit=20, ours=lambda p: (p / 1e4, 10), eager=lambda p: ((p / 1000) ** 2, 10)
    )
    assert rows[4000, "eager"]["call_seconds"] == 16 and rows[4000, "eager"]["calls"] == 1
    assert rows[8000, "eager"]["seconds"] is None
    assert rows[8000, "eager"]["left_out"] == "a call would take about 32 s by its growth; --limit is 20 s"
    assert ("eager", "prepare", "decode", 8000) not in FakeProcess.asked
    assert rows[8000, "ours"]["seconds"] == pytest.approx(0.8) and rows[8000, "ours"]["calls"] == clock.ROUNDS


def test_what_does_not_fit_is_left_out(faked):
    gib = 2**30
    rows = faked([1000, 2000, 4000], memory=10 * gib, ours=lambda p: (1e-3, 5), eager=lambda p: (1e-3, p * gib // 400))
    assert rows[2000, "eager"]["peak_bytes"] == 1000 + 5 * gib
    assert rows[4000, "eager"]["left_out"] == "would need about 10.0 GiB by its growth; 10.0 GiB (a limit) is left"


def test_what_failed_is_not_tried_again(faked):
    """And its process is started again for what comes after."""
    failing = lambda p: "killed" if p == 2000 else (1e-3, 5)  # noqa: E731
    rows = faked([1000, 2000, 4000], phases=("decode", "prefill"), ours=lambda p: (1e-3, 5), sdpa=failing)
    assert rows[2000, "sdpa"]["left_out"] == "killed"
    assert rows[4000, "sdpa"]["left_out"] == "killed (at 2000)"
    loads = [asked for asked in FakeProcess.asked if asked == ("sdpa", "load")]
    assert len(loads) == 1


def test_a_token_of_a_chunk(faked):
    """Seconds are those of a token; the first positions are shorter than the chunk."""
    rows = faked([10, 1000], phases=("prefill",), ours=lambda p: (0.48, 5))
    assert rows[10, "ours"]["seconds"] == pytest.approx(0.048) and rows[10, "ours"]["queries"] == 10
    assert rows[1000, "ours"]["seconds"] == pytest.approx(0.02) and rows[1000, "ours"]["queries"] == 24


def rows_of(**seconds):
    """Rows of decode, by method a list of seconds at 1000, 2000, ..."""
    return [
        {"phase": "decode", "position": 1000 * (i + 1), "method": method, "seconds": x}
        for method, values in seconds.items()
        for i, x in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("ours", "others", "wins", "halves"),
    [
        ([1, 1, 1, 1], [0.5, 1.5, 1.9, 2.5], 2000, 4000),
        ([1, 1, 1, 1], [1.5, 0.9, 1.5, 1.6], 3000, None),  # not where it only once was
        ([1, 1, 1, 1], [3, 3, 3, 3], 1000, 1000),
        ([1, 1, 1, 1], [3, 3, 3, 0.9], None, None),
        ([1, 1, 1, 1], [3, 3, None, None], 1000, 1000),
        ([1, None, 1, 1], [3, 3, 3, 3], 1000, 1000),
    ],
)
def test_where_ours_wins(ours, others, wins, halves):
    rows = rows_of(ours=ours, dense=others)
    ratios = report.ratios_to_ours(rows, "decode", "dense")
    assert report.first_above(ratios, 1.0) == wins and report.first_above(ratios, 2.0) == halves
    (line,) = report.summary(rows)
    assert line.startswith("decode, against dense MLA: ")
    assert (f"cheaper from {wins} on" in line) == (wins is not None)
    assert (f"less than half from {halves} on" in line) == (halves is not None)


def test_price():
    """Two dollars an hour, a millisecond a token: 1000 s for a million tokens."""
    assert report.price(1e-3, 2.0) == pytest.approx(2000 / 3600)


def test_memory_that_is_not_there_is_a_reason():
    """The real thing in a process: an allocation fails, nothing is killed, and the process goes on."""
    process = Process(problem(chunk=1024), "eager")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, hard))  # inherited
        process.ask("load")
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        with pytest.raises(Left, match=r"does not fit into what was left: 1\..* GiB \(ulimit -d\)"):
            process.ask("prepare", "prefill", 16384)
        assert process.running
        assert process.ask("prepare", "decode", 50)["seconds"] > 0
        assert 0 < process.ask("peak") < 2 << 30
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        process.stop()


def test_a_process_that_dies_or_hangs_is_a_reason(monkeypatch):
    process = Process(problem(), "eager")
    try:
        process.ask("load")
        os.kill(process._process.pid, 9)
        with pytest.raises(Left, match="its process ended with signal SIGKILL, as where memory is short"):
            process.ask("peak")
        assert not process.running
        process.ask("load")
        process.ask("prepare", "decode", 50)
        with pytest.raises(Left, match=r"a call took more than 0\.2 s"):
            process.ask("time", 100.0, seconds=0.2)
        assert not process.running
    finally:
        process.stop()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "glm"
    make("glm-shared").save_pretrained(directory)
    return directory


def test_command(saved, tmp_path, capsys):
    """A layer of a checkpoint, all methods, figures that follow from each other."""
    image = pytest.importorskip("matplotlib.image")
    picture, figures = tmp_path / "new" / "cost.png", tmp_path / "cost.json"
    arguments = ["cost", str(saved), "--layer", "1", "--positions", "300", "150", "--chunk", "32", "--seconds", "0.01"]
    more = ["--threads", "1", "--price", "3.6", "--out", str(picture), "--json", str(figures)]
    assert main([*arguments, *more]) == 0
    said = capsys.readouterr()
    assert "[9/9]" in said.err and "[10/" not in said.err
    document = json.loads(figures.read_bytes())
    order = [(row["phase"], row["position"], row["method"]) for row in document["rows"]]
    assert order == [(ph, p, m) for ph in ("prefill", "decode") for p in (150, 300) for m in METHODS]
    for row in document["rows"]:
        assert row["left_out"] is None and row["calls"] >= 1 and row["peak_bytes"] > 50 << 20
        assert row["seconds"] * row["queries"] == pytest.approx(row["call_seconds"])
        assert row["price_a_million"] == pytest.approx(row["seconds"] * 1e3)
        assert (row["form"] is not None) == (row["method"] == "dense")
        assert (row["shares"] is not None) == (row["method"] == "ours")
    assert document["layer"]["model_type"] == "glm_moe_dsa" and document["layer"]["index_topk"] == 96
    assert document["environment"]["packages"] and document["checked"].startswith("checked against eager")
    lines = said.out.splitlines()
    assert f"layer 1 of {saved}" in lines[0] and "$3.6 an hour" in lines[0]
    assert sum(line.startswith(("prefill ", "decode ")) and line.split()[1].isdecimal() for line in lines) == 16
    assert sum("against" in line and "times our price at 300" in line for line in lines) == 6
    assert image.imread(picture).shape[:2] == (380, 960)


def test_some_methods_and_phases(saved, tmp_path, capsys):
    """Eager attention is what the others are checked against, timed or not."""
    arguments = ["cost", str(saved), "--positions", "120", "--seconds", "0.01", "--threads", "1"]
    assert main([*arguments, "--methods", "dense", "ours", "--phases", "decode"]) == 0
    said = capsys.readouterr().out
    assert "checked against eager" in said and "prefill  " not in said.replace("prefill: ", "")
    assert not re.search("^decode +120 +eager", said, re.MULTILINE) and "$2 an hour" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "x"], "preset: expected one of deepseek-v3.2, .*got 'x'"),
        (["--preset", "deepseek-v4-512"], "preset: expected one of deepseek-v3.2, .*got 'deepseek-v4-512'"),
        (["--price", "nan"], "price: expected a positive number, got nan"),
        (["--price", "-1"], "price: expected a positive number, got -1.0"),
        (["--limit", "0"], "limit: expected a positive number, got 0.0"),
        (["--positions", "0"], "positions: expected 1..16777215, got 0"),
        (["--chunk", "0"], "chunk: expected at least 1, got 0"),
        (["--index-heads", "-3"], "index-heads: expected at least 1, got -3"),
        (["--threads", "100000"], "threads: expected 1..1024, got 100000"),
        (["--out", "."], "out: expected a file that can be written, got .*Is a directory"),
        (["--json", "/dev/null/x"], "json: expected a file that can be written, got .*Not a directory"),
        (["none", "--heads", "3"], "expected a preset where num_attention_heads are given, got none"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(["cost", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_checkpoints_that_do_not_serve(saved, tmp_path):
    with pytest.raises(ModelError, match="expected a directory with config"):
        Contender(problem(checkpoint=tmp_path / "none"), "ours")
    with pytest.raises(ModelError, match="layer: expected one with an indexer, got 2, which shares a selection"):
        Contender(problem(checkpoint=saved, layer=2), "ours")
    with pytest.raises(DsaError, match=r"layer: expected 0\.\.2, got 3"):
        Contender(problem(checkpoint=saved, layer=3), "ours")


def test_errors_of_a_process_reach_the_command(tmp_path, capsys):
    assert main(["cost", str(tmp_path / "none"), "--threads", "1"]) == 1
    assert re.search("dsa-tvm: .*none: expected a directory with config.json, got none", capsys.readouterr().err)


def test_positions_past_the_last(saved, capsys):
    arguments = ["cost", str(saved), "--positions", "100", "163841", "--methods", "ours", "--threads", "1"]
    assert main(arguments) == 1
    assert "positions: expected at most 163840, which the model has, got 163841" in capsys.readouterr().err


def test_what_is_done_is_kept_on_interrupt(saved, tmp_path, monkeypatch):
    """And no process is left."""
    line = report.line

    def interrupted(row, *arguments):
        if row["phase"] == "decode":
            raise KeyboardInterrupt
        return line(row, *arguments)

    monkeypatch.setattr(report, "line", interrupted)
    target = tmp_path / "cost.json"
    arguments = ["cost", str(saved), "--positions", "90", "--methods", "ours", "--seconds", "0.01", "--threads", "1"]
    assert main([*arguments, "--json", str(target)]) == 130
    assert [row["phase"] for row in json.loads(target.read_bytes())["rows"]] == ["prefill", "decode"]
    assert not multiprocessing.active_children()


def test_without_packages(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["cost", "--out", "x.png"]) == 1
    assert "pip install 'dsa_tvm[plot]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["cost"]) == 1
    assert "pip install 'dsa_tvm[models]'" in capsys.readouterr().err


def test_a_checkpoint_is_read_in_parts(saved):
    """One layer, and its attention alone, as the whole model has them; what is amiss is named."""
    from dsa_tvm.models.checkpoint import Checkpoint

    model = make("glm-shared")
    with Checkpoint(saved) as checkpoint:
        made = checkpoint.family.module.GlmMoeDsaDecoderLayer
        layer = checkpoint.read(lambda: made(checkpoint.config, 1), "model.layers.1.")
        expected = model.model.layers[1].state_dict()
        assert layer.state_dict().keys() == expected.keys() and not layer.training
        assert all(torch.equal(x, expected[name]) for name, x in layer.state_dict().items())
        with pytest.raises(ModelError, match=r"tensors missing in the files: model\.layers\.2\.self_attn\.indexer"):
            checkpoint.read(lambda: made(checkpoint.config, 1).self_attn, "model.layers.2.self_attn.")
        with pytest.raises(ModelError, match=r"not expected of the model: model\.layers\.0\.input_layernorm"):
            checkpoint.read(
                lambda: torch.nn.ModuleDict({"self_attn": made(checkpoint.config, 0).self_attn}), "model.layers.0."
            )


def test_types_of_parts_are_those_of_the_whole(saved):
    from dsa_tvm.models.checkpoint import Checkpoint, load_model

    for dtype in (torch.float16, torch.bfloat16):
        whole = load_model(saved, dtype=dtype).model.layers[1].state_dict()
        with Checkpoint(saved, dtype=dtype) as checkpoint:
            made = checkpoint.family.module.GlmMoeDsaDecoderLayer
            layer = checkpoint.read(lambda: made(checkpoint.config, 1), "model.layers.1.")  # noqa: B023
        assert {n: x.dtype for n, x in layer.state_dict().items()} == {n: x.dtype for n, x in whole.items()}
        assert all(torch.equal(x, whole[n]) for n, x in layer.state_dict().items())


def test_forms_are_timed_and_one_is_kept():
    contender = Contender(problem(), "dense")
    assert contender.form is None
    contender.prepare("prefill", 60)
    contender.call()
    assert contender.form in dense.PREFILL
    contender.prepare("decode", 60)
    contender.call()
    assert contender.form in dense.DECODE
