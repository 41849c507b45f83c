"""``dsa-tvm bench --growth`` at small sizes. Nothing here depends on a time."""

from __future__ import annotations

import itertools
import json
import re
import sys

import numpy as np
import pytest

from dsa_tvm import cli, functions, presets
from dsa_tvm.benchmark import clock, workload
from dsa_tvm.benchmark.growth import command, picture, sweep
from dsa_tvm.runtime import machine

SMALL = presets.Preset(h_idx=3, d_idx=32, topk=16, h_q=2, d_qk=512, d_v=512, sm_scale=0.06)
SIZES = ["--s-q", "1", "3", "--s-kv", "20", "40", "80", "--topk", "8", "16", "--threads", "1", "2"]
QUICK = ["bench", "--growth", "--seconds", "0.001", *SIZES]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The default preset, small."""
    monkeypatch.setitem(presets.PRESETS, "deepseek-v3.2", SMALL)


def of(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_tables_figures_and_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    figures, png = tmp_path / "new" / "figures.json", tmp_path / "new" / "growth.png"
    assert cli.main([*QUICK, "--json", str(figures), "--out", str(png)]) == 0
    rows = json.loads(figures.read_bytes())["growth"]
    # s_kv, s_q, topk and threads; the indexer selects nothing.
    assert len(rows) == 3 * (3 + 2 + 2 + 2) + (3 + 2 + 2)
    assert all(row["ours_ms"] > 0 and row["line_ms"] > 0 and row["failed"] is row["skipped"] is None for row in rows)
    for row in rows:
        assert row["of_line"] == pytest.approx(row["ours_ms"] / row["line_ms"])
        assert row["of_read"] > 0 and (row["of_peak"] is None) == (row["op"] == "topk")
    assert png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert (
        "lightning_indexer: s_q 1, threads " in printed.out and "sparse_mla: s_kv 20, topk 16, threads " in printed.out
    )
    assert printed.out.count("x line") == 15 and "[34/34]" in printed.err


def test_the_line_is_the_operation_count():
    """Twice the keys are twice the work of the indexer, and none more for the attention beyond topk; threads divide."""
    found = {(s.op, s.varied): s for s in sweep.sweeps(["lightning_indexer", "sparse_mla", "topk"], {}, SMALL)}
    for op, growth in (("lightning_indexer", 2.0), ("sparse_mla", 1.0), ("topk", 2.0)):
        swept = found[op, "s_kv"]
        times = [swept.line(point, 1.0, SMALL) for point in swept.points]
        assert [point.s_kv for point in swept.points] == [2048 << i for i in range(9)]
        assert times[swept.points.index(swept.base)] == 1.0
        assert [b / a for a, b in itertools.pairwise(times)] == pytest.approx([growth] * 8)
    threads = found["sparse_mla", "threads"]
    expected = [threads.base.threads / point.threads for point in threads.points]
    assert [threads.line(point, 1.0, SMALL) for point in threads.points] == expected
    assert ("lightning_indexer", "topk") not in found
    few = found["sparse_mla", "topk"]
    assert few.line(few.points[0], 1.0, SMALL) == few.points[0].topk / few.base.topk
    # Causal: of 3 tokens the first sees two keys fewer than the last.
    point = sweep.Point("topk", s_q=3, s_kv=10, topk=2, threads=1)
    assert point.amount(SMALL) == 8 + 9 + 10


def test_one_value_is_kept():
    swept = sweep.sweeps(["topk"], {"s_q": [16], "s_kv": [64, 32], "topk": [], "threads": [1]}, SMALL)
    assert [s.varied for s in swept] == ["s_kv", "topk"]
    assert all(point.s_q == 16 and point.threads == 1 for s in swept for point in s.points)
    assert [point.s_kv for point in swept[0].points] == [32, 64]


def test_a_wrong_result_has_no_time(capsys, tmp_path, monkeypatch):
    right = functions.topk

    def wrong(logits, ks, ke, *, topk, num_threads):
        indices = right(logits, ks, ke, topk=topk)
        return indices if len(logits[0]) < 80 else indices * 0

    monkeypatch.setattr(functions, "topk", wrong)
    figures = tmp_path / "figures.json"
    assert cli.main(["bench", "topk", *QUICK[1:], "--json", str(figures)]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out and "1 of 9 results are wrong" in printed.err
    rows = json.loads(figures.read_bytes())["growth"]
    assert [row["s_kv"] for row in rows if row["failed"]] == [80]
    assert all(row["ours_ms"] > 0 for row in rows if not row["failed"])


def test_without_the_base_there_is_no_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "topk", lambda logits, ks, ke, topk, num_threads: np.zeros((1, topk), np.int32))
    assert cli.main(["bench", "topk", *QUICK[1:], "--s-q", "1"]) == 1
    assert "inf" not in capsys.readouterr().out


def test_what_memory_does_not_hold_is_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(64 << 20, "a limit"))
    figures = tmp_path / "figures.json"
    arguments = ["bench", "--growth", "sparse_mla", "--seconds", "0.001", "--s-q", "1", "--topk", "8", "--threads", "1"]
    assert cli.main([*arguments, "--s-kv", "40", "1000000", "--json", str(figures)]) == 0
    first, second = json.loads(figures.read_bytes())["growth"]
    assert first["ours_ms"] > 0 and second["ours_ms"] is None and "GiB of memory" in second["skipped"]
    said = capsys.readouterr().out
    assert "less is left" in said and "memory left at the end: 64 MiB (a limit)" in said


def test_what_is_done_is_kept_on_interrupt(tmp_path, monkeypatch):
    done, medians = [], clock.medians

    def interrupted(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(arguments)
        return medians(*arguments)

    monkeypatch.setattr(clock, "medians", interrupted)
    figures = tmp_path / "figures.json"
    assert cli.main(["bench", "topk", *QUICK[1:], "--json", str(figures)]) == 130
    assert [row["s_kv"] for row in json.loads(figures.read_bytes())["growth"]] == [20, 40, 80]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--growth", "--suite", "cuda"], "growth: expected --suite cpu, got cuda"),
        (["--growth", "--topk", "0"], "topk: expected 1..4096, got 0"),
        (["--growth", "--topk", "5000"], "topk: expected 1..4096, got 5000"),
        (["--growth", "--s-kv", "0"], "s_kv: expected at least 1, got 0"),
        (["--growth", "--threads", "0"], "threads: expected 1..1024, got 0"),
        (["--growth", "--dtype", "float64"], "dtype: expected one of float32"),
        (["sparse_mla", "--growth", "--dtype", "int8"], "dtype: expected one that sparse_mla takes, got 'int8'"),
        (["--growth", "--out", "."], "out: expected a file that can be written, got .*Is a directory"),
        (["--growth", "--out", "/proc/none"], "out: expected a file that can be written"),
        (["--growth", "--json", "/dev/null/x"], "json: expected a file that can be written, got .*Not a directory"),
        (["--out", "x.png"], "out: expected --growth beside it, got none"),
        (["--topk", "8"], "topk: expected --growth beside it, got none"),
    ],
)
def test_refused(arguments, message, capsys, monkeypatch):
    """Before anything is measured."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(workload, "make", None)
    assert cli.main(["bench", *arguments]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said


def test_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(workload, "make", None)
    assert cli.main(["bench", "--growth", "--out", "x.png"]) == 1
    assert "pip install 'dsa_tvm[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("varied", [("s_kv",), ("s_q", "threads"), ("s_kv", "s_q", "topk")])
def test_a_picture_of_what_there_is(varied):
    """Of some sweeps, with points that failed among them."""
    pytest.importorskip("matplotlib")
    rows = [
        {"op": op, "varied": name, "s_q": 1, "s_kv": 20, "topk": 8, "threads": 1, "ours_ms": ours, "line_ms": line}
        | {name: size}
        for op in ("topk", "sparse_mla")
        for name in varied
        for size, ours, line in ((1024, 0.5, 0.5), (2048, None, None), (3000, 2.0, None))
    ]
    assert picture.as_png(rows, "a title").startswith(b"\x89PNG")
    assert command.lines(sweep.Sweep("topk", "s_q", sweep.Point("topk", 1, 20, 8, 1), []), [])[0].startswith(
        "topk: s_kv"
    )
