"""The command ``dsa-tvm records``."""

from __future__ import annotations

import argparse
import io
import sys

import numpy as np
import pytest
from tuning_records import make

from dsa_tvm.errors import ArgumentError, DsaError, RecordError
from dsa_tvm.records import Log, command, curve


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(a) for a in arguments]))


def variant(n):
    return {"slack": n, "scan": 64}


@pytest.fixture
def log(tmp_path):
    """A directory with four trials, one of them failed, and three finals."""
    log = Log(tmp_path / "logs" / "x86-64-v4" / "topk.jsonl")
    for n, speedup in enumerate((0.5, 1.1, 1.05)):
        log.append(make(bucket=(1, 32768), speedups=(speedup, speedup), decisions=variant(n)))
    log.append(make(bucket=(1, 32768), decisions=variant(3), seconds={}, error="crashed\n\x1b[2Jsignal 11"))
    log.append(make(bucket=(1, 32768), speedups=(1.25, 1.5), decisions=variant(1), kind="final"))
    log.append(make(bucket=(1, 32768), speedups=(1.25, 1.1), decisions=variant(2), kind="final"))
    log.append(make(bucket=(1, 4096), speedups=(4.0, 0.5), decisions=variant(4), kind="final"))
    return log


@pytest.fixture
def directory(log):
    return log.path.parent.parent


def damage(log):
    data = log.path.read_bytes()
    log.path.write_bytes(data[:50] + b"?" + data[51:] + b"torn")


def test_verify(directory, log, capsys):
    run("verify", directory)
    assert capsys.readouterr().out == f"{log.path}: 4 trials, 3 finals, 1 failed, 0 damaged\n"
    damage(log)
    with pytest.raises(RecordError, match="records verify: expected no damaged lines, got 4"):
        run("verify", directory, log.path)
    out = capsys.readouterr().out
    assert f"{log.path}: 3 trials, 3 finals, 1 failed, 2 damaged\n" in out
    assert out.count(f"  {log.path}:1: ") == out.count(f"  {log.path}:8: not a JSON record") == 2


def test_verify_the_logs_of_the_package(capsys):
    run("verify")
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "best", "show", "merge"])
def test_no_such_directory(command, tmp_path):
    with pytest.raises(RecordError, match=r"tuning logs: expected a directory, got .*nowhere"):
        run(command, tmp_path / "nowhere", *(["--into", tmp_path] if command == "merge" else []))


def test_best(directory, log, capsys):
    run("best", directory)
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(out[0]) == "x86-64-v4 topk: topk 2048 (deepseek-v3.2, deepseek-v3.2-tp8, glm-5)"
    assert " ".join(out[1]) == "size threads x DEFAULT ms of roof decisions"
    # DEFAULT takes 2.5 ms with one thread and 1.25 ms with two. The roofs are 0.1 and 0.05 ms.
    assert " ".join(out[2]) == (
        "1 x 4096 1, 2 4.000, 0.500 0.625, 2.50 16%, 2% scan=64 slack=4 (slower than DEFAULT somewhere: not used)"
    )
    assert " ".join(out[3]) == "1 x 32768 1, 2 1.250, 1.500 2.00, 0.833 5%, 6% scan=64 slack=1"
    assert " ".join(out[5]) == "topk 1 x 32768 (to 4 x 65536): scan=64 slack=1; 1.369 times as fast as DEFAULT"
    run("best", directory, "--target", "aarch64")
    run("best", directory, "--op", "sparse_mla")
    assert capsys.readouterr().out == "no finals\n" * 2
    damage(log)
    run("best", directory)
    assert "2 damaged lines left out" in capsys.readouterr().err


def test_best_of_a_gpu(tmp_path, capsys):
    """Operators that are tuned only for GPUs are listed too, and few heads count as a search of their own."""
    log = Log(tmp_path / "sm_90a" / "sparse_mla_fp8.jsonl")
    for h_q in (128, 16):
        shape = dict(make("sparse_mla_fp8", (1, 65536)).shape, h_q=h_q)
        log.append(make("sparse_mla_fp8", (1, 65536), (1.5,), kind="final", target="sm_90a", shape=shape))
    run("best", tmp_path)
    out = capsys.readouterr().out.splitlines()
    headings = [line for line in out if line.startswith("sm_90a")]
    assert [line.split(", ")[-1] for line in headings] == ["few_heads", "hopper_attend"]
    assert "(deepseek-v3.2-tp8)" in headings[0] and "(deepseek-v3.2)" in headings[1]


def test_show(directory, capsys):
    run("show", directory, "--shape", "1x32768")
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    models = "(deepseek-v3.2, deepseek-v3.2-tp8, glm-5)"
    assert lines[0] == f"x86-64-v4 topk: s_q 1, s_kv 32768, topk 2048 {models} on Xeon \xae, 2 CPUs"
    assert lines[2] == "1 1, 2 0.500, 0.500 5.00, 2.50 2%, 2% scan=64 slack=0"
    assert lines[5] == "4 - - - - scan=64 slack=3: crashed [2Jsignal 11" and "\x1b" not in out
    assert [line.split()[0] for line in lines[6:8]] == ["final", "final"]
    assert lines[9:11] == ["1.100 | ***", "1.091 |"] and lines[20] == "1.000 |*"
    run("show", directory / "x86-64-v4" / "topk.jsonl", "--op", "topk")
    assert "s_kv 4096" in capsys.readouterr().out
    run("show", directory, "--op", "sparse_mla")
    assert capsys.readouterr().out == "no records\n"
    with pytest.raises(SystemExit):
        run("show", directory, "--shape", "1x2x3")


def test_show_a_picture(directory, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "curve.png"
    with pytest.raises(ArgumentError, match="png: expected one search, got 2"):
        run("show", directory, "--png", file)
    with pytest.raises(RecordError, match="png: expected a file that can be written"):
        run("show", directory, "--shape", "1x32768", "--png", directory)
    run("show", directory, "--shape", "1x32768", "--png", file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_show_a_picture_without_matplotlib(directory, tmp_path, capsys, monkeypatch):
    """Errors come before anything is printed or written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = tmp_path / "curve.png"
    with pytest.raises(DsaError, match=r"png: expected matplotlib to be installed.*pip install 'dsa_tvm\[plot\]'"):
        run("show", directory, "--shape", "1x32768", "--png", file)
    assert not file.exists() and not capsys.readouterr().out


def test_merge(directory, log, tmp_path, capsys):
    into = tmp_path / "into"
    damage(log)
    other = Log(tmp_path / "other" / "x86-64-v4" / "topk.jsonl")
    other.append(make())
    run("merge", directory, other.path, "--into", into)
    captured = capsys.readouterr()
    merged = Log(into / "x86-64-v4" / "topk.jsonl")
    assert captured.out == f"{merged.path}: 7 lines added\n"
    assert captured.err.count("left out: ") == 2 and f"{log.path}:8: " in captured.err
    assert merged.read() == (log.read()[0] + other.read()[0], [])
    run("merge", directory, "--into", into)
    assert capsys.readouterr().out == f"{merged.path}: 0 lines added\n"


def test_merge_finals(directory, tmp_path, capsys):
    into = tmp_path / "into"
    run("merge", directory, "--finals", "--into", into)
    records, _ = Log(into / "x86-64-v4" / "topk.jsonl").read()
    assert [r.kind for r in records] == ["final"] * 3
    run("merge", directory, "--into", into)
    assert "4 lines added" in capsys.readouterr().out


def test_curve_as_text():
    lines = curve.as_text([0.5, 1.2, 1.1, 2.0, 0.0], height=3)
    assert lines == [" 2.000 |   **", " 1.500 |", " 1.000 |***", "       +-----", "        1   5 trials"]
    assert curve.as_text([0.9])[-3] == " 1.000 |*"
    wide = curve.as_text([1 + n / 1000 for n in range(1001)], width=10, height=2)
    assert wide[:2] == [" 2.000 |     *****", " 1.000 |*****"]


def heights(speedups):
    """Heights of the curve in a picture, in pixels above the axis of trials, from left to right."""
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(io.BytesIO(curve.as_png(speedups, width=500, height=300)))
    assert pixels.shape[:2] == (300, 500)
    colors = pixels[:, :, :3]
    # Only the curve has a colour. The axes are dark.
    drawn = colors.max(2) - colors.min(2) > 0.3
    axis = np.flatnonzero((colors.max(2) < 0.3).sum(1) > 300)[-1]
    columns = np.flatnonzero(drawn.any(0))
    return columns, np.array([axis - np.flatnonzero(drawn[:, x]).mean() for x in columns])


def test_curve_as_png():
    """The curve rises once, in the middle, from the bottom to the top."""
    columns, found = heights([1.0] * 50 + [2.0] * 25 + [0.0] * 25)
    middle = (columns[0] + columns[-1]) / 2
    left, right = found[columns < middle - 3], found[columns > middle + 3]
    assert np.ptp(left) == np.ptp(right) == 0 and 0 < left[0] < 10 and right[0] - left[0] > 200


def test_a_curve_of_one_trial():
    """A single failed trial is a line at the bottom, a better one a line at the top."""
    for speedup, low, high in ((0.0, 0, 10), (3.0, 200, 300)):
        columns, found = heights([speedup])
        assert len(columns) > 400 and np.ptp(found) == 0 and low < found[0] < high
