"""Tuning records: damaged, foreign and implausible lines are rejected, and none of them stops a reader."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_records import make, number

from dsa_tvm.errors import RecordError
from dsa_tvm.records import Log, journal, merge, read_directory, record, spec_hash
from dsa_tvm.records import log as records
from dsa_tvm.records.log import line_of, parse

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "logs" / "x86-64-v4" / "topk.jsonl")


def fill(log, count):
    written = [number(n) for n in range(count)]
    for item in written:
        log.append(item)
    return written


def signed(document):
    """A line with a correct checksum and any content."""
    return record.canonical(document | {"sum": record.digest(document)})


def document(**changes):
    """The content of a good line, without its checksum."""
    plain = json.loads(line_of(make()))
    del plain["sum"]
    return plain | changes


@pytest.mark.parametrize("op", ["lightning_indexer", "topk", "sparse_mla"])
def test_round_trip(op):
    final = make(op, (1, 32768), (1.5, 0.5, 2.0), kind="final")
    assert parse(line_of(final)) == parse(line_of(final).encode()) == final
    failed = make(op, (1, 32768), seconds={}, error="wrong result: \u00e9\nsecond line")
    assert parse(line_of(failed)) == failed and "\n" not in line_of(failed)


def test_speedup_and_key():
    mixed = make(speedups=(2.0, 0.5), seconds={1: (1e-3, 9.0, 1.25e-3), 2: (1e-3,)})
    assert mixed.speedups == {1: 2.0, 2: 1.25} and math.isclose(mixed.speedup, math.sqrt(2.5))
    assert make(seconds={}, error="crashed").speedup == 0
    assert make().key == make(date="2027-01-01T00:00:00Z", speedups=(1.0, 1.0)).key
    others = [make(kind="final"), make(bucket=(16, 4096)), make(machine="other"), number(1), make("sparse_mla")]
    assert len({item.key for item in [make(), *others]}) == 6


def test_the_readme_shows_a_record():
    example = (ROOT / "tuning_logs" / "README.md").read_text().split("```json\n")[1].split("```")[0]
    assert parse("".join(line.strip() for line in example.splitlines())).kind == "final"


def test_spec_hash(monkeypatch):
    code = "from dsa_tvm.records import spec_hash; print(spec_hash('sparse_mla'))"
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == spec_hash("sparse_mla") != spec_hash("topk"), done.stderr
    with pytest.raises(RecordError, match="op: expected one of"):
        spec_hash("softmax")
    computed, dims = spec_hash.__wrapped__, dict(record.DIMS)
    monkeypatch.setattr(record, "DIMS", dims)
    dims["d_v"] = replace(dims["d_v"], values=(64, 512))
    assert computed("sparse_mla") == spec_hash("sparse_mla")
    spec = record.OPS["sparse_mla"]
    monkeypatch.setattr(record, "OPS", {"sparse_mla": replace(spec, variants=spec.variants[:1])})
    assert computed("sparse_mla") == spec_hash("sparse_mla")
    dims["d_v"] = replace(dims["d_v"], maximum=2048)
    assert computed("sparse_mla") != spec_hash("sparse_mla")


def test_every_prefix(log):
    written = fill(log, 3)
    data = log.path.read_bytes()
    ends = [at for at, byte in enumerate(data) if byte == ord("\n")]
    for length in range(len(data) + 1):
        log.path.write_bytes(data[:length])
        found, damage = log.read()
        # A record without its newline is complete.
        assert found == written[: sum(length >= end for end in ends)]
        torn = length not in (0, *ends, *(end + 1 for end in ends))
        assert [item.line for item in damage] == [len(found) + 1] * torn


def test_flipped_bits(log):
    written = fill(log, 5)
    data, rng = log.path.read_bytes(), random.Random(0)
    newlines = [at for at, byte in enumerate(data) if byte == ord("\n")]
    # Flip every newline, and the letter of every exponent, which in the other case would mean the same number.
    exponents = [at for at in range(len(data)) if data[at - 1 : at + 2] in (b"5e-", b"1e-", b"2e-")]
    flips = [(at, bit) for at in newlines + exponents for bit in range(8)]
    flips += [(rng.randrange(len(data)), rng.randrange(8)) for _ in range(600)]
    assert exponents
    for at, bit in flips:
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        log.path.write_bytes(damaged)
        found, damage = log.read()
        line = data[:at].count(b"\n")
        lost = {line, line + 1} if at in newlines else {line}
        assert found == [item for n, item in enumerate(written) if n not in lost], (at, bit)
        assert damage and {item.line for item in damage} <= {line + 1, line + 2}


GOOD = line_of(make())
TWICE = GOOD.replace('{"date"', '{"date":"","date"')


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "blank line"),
        (b"  \t", "blank line"),
        (b"\xff\xfe garbage", "not a JSON record"),
        (b"\0" * 100, "not a JSON record"),
        (GOOD.encode() + b"\0", "not a JSON record"),
        (GOOD.encode()[:-1], "not a JSON record"),
        (GOOD.encode()[5:], "not a JSON record"),
        (b"[" * 50_000, "not a JSON record"),
        (b"1" * 5_000, "not a JSON record"),
        (b'{"a":NaN}', "not a JSON record"),
        (b"[]", "not a JSON record: not an object"),
        (b"x" * (2**20 + 1), "longer than 1048576 bytes"),
        (b"x" * 3_500_000, "longer than 1048576 bytes"),
        (signed(document(v=2)), "version: expected 1, got 2"),
        (signed(document(v=True)), "version: expected 1, got True"),
        (GOOD.replace('"scan":64', '"scan":65'), "checksum: expected"),
        (GOOD + "\r", "spelling: expected canonical JSON"),
        (GOOD.replace('":', '": '), "spelling: expected canonical JSON"),
        (TWICE, "spelling: expected canonical JSON"),
        (signed(document(extra=1)), "fields: expected"),
        (signed({k: v for k, v in document().items() if k != "roof"}), "fields: expected"),
        (signed(document(spec="0123456789abcdef")), "of another spec of topk: expected"),
        (line_of(make("sparse_mla")), "target and operator: expected x86-64-v4 topk, got 'x86-64-v4 sparse_mla'"),
        (line_of(make(target="aarch64")), "got 'aarch64 topk'"),
    ],
    ids=lambda x: "" if isinstance(x, bytes) else None,
)
def test_damage_is_reported_and_skipped(log, line, reason):
    first, second = fill(log, 2)
    data = line.encode() if isinstance(line, str) else line
    log.path.write_bytes(b"\n".join([line_of(first).encode(), data, line_of(second).encode(), b""]))
    found, (damage,) = log.read()
    assert found == [first, second]
    assert damage.line == 2 and damage.path == log.path and reason in damage.reason
    assert str(damage).startswith(f"{log.path}:2: ")


ONE, TWO = {"1": [1e-3]}, {"1": [1e-3], "2": [1e-3]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seconds": {"1": [0.0]}}, "seconds: expected"),
        ({"seconds": {"1": [-1e-3]}}, "seconds: expected"),
        ({"seconds": {"1": [1e-10]}}, "seconds: expected"),
        ({"seconds": {"1": [1e4]}}, "seconds: expected"),
        ({"seconds": {"1": [10**400]}}, "seconds: expected"),
        ({"seconds": {"1": []}}, "seconds: expected"),
        ({"seconds": {"0": [1e-3]}}, "seconds: expected"),
        ({"seconds": {"1.5": [1e-3]}}, "seconds: expected"),
        ({"default_seconds": {"1": [0.0]}}, "default_seconds: expected"),
        ({"roof": {"1": 0.0}}, "roof: expected"),
        ({"seconds": ONE, "default_seconds": TWO, "roof": {"1": 1e-4}}, "default_seconds: expected threads [1]"),
        ({"seconds": TWO, "default_seconds": TWO, "roof": {"1": 1e-4}}, "roof: expected threads [1, 2]"),
        ({"seconds": {}, "default_seconds": {}, "roof": {}}, "seconds: expected some"),
        ({"error": "crashed"}, "seconds: expected none"),
        ({"error": ""}, "error: expected"),
        # The median counts, so one slow run does not hide impossible ones.
        (
            {"seconds": {"1": [7.9e-5, 7.9e-5, 1.0]}, "default_seconds": ONE, "roof": {"1": 1e-4}},
            "seconds: expected a m",
        ),
        ({"seconds": ONE, "default_seconds": {"1": [7.9e-5]}, "roof": {"1": 1e-4}}, "default_seconds: expected a m"),
        ({"types": ["float32"]}, "types: expected"),
        ({"shape": {"s_q": 1, "s_kv": 4096}}, "shape: topk: expected 1..4096"),
        ({"shape": {"s_q": 1, "s_kv": 4096, "topk": 5000}}, "shape: topk: expected 1..4096, got 5000"),
        ({"shape": {"s_q": 1, "s_kv": 4096, "topk": 1, "d_v": 512}}, "shape: expected"),
        ({"decisions": {}}, "decisions: expected at least one"),
        ({"decisions": {"slack": True}}, "decisions: expected"),
        ({"decisions": {"slack": 1.0}}, "decisions: expected"),
        ({"decisions": {"slack": 2**31}}, "decisions: expected"),
        ({"date": "2026-11-23"}, "date: expected"),
        ({"date": "2026-1-2T03:04:05Z"}, "date: expected"),
        ({"date": "2026-02-30T00:00:00Z"}, "date: expected"),
        ({"machine": "clear\x1b[2J"}, "machine: expected"),
        ({"target": "../x"}, "target: expected"),
        ({"kind": "best"}, "kind: expected one of trial, final, got 'best'"),
        ({"op": "softmax"}, "op: expected one of"),
    ],
)
def test_what_cannot_be_true(changes, reason):
    """Lines with a correct checksum and a bad field."""
    with pytest.raises(RecordError) as caught:
        parse(signed(document(**changes)))
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("times", [(math.nan,), (math.inf,), (-math.inf,), [1e-3], 1e-3])
@pytest.mark.parametrize("threads", [1, 0, "1"])
def test_what_cannot_be_written(times, threads):
    """Values that no line can represent are refused too."""
    with pytest.raises(RecordError, match="seconds: expected"):
        make(seconds={threads: times}, default_seconds={threads: (1e-3,)}, roof={threads: 1e-4})
    if threads != 1:
        with pytest.raises(RecordError, match="seconds: expected"):
            make(seconds={threads: (1e-3,)}, default_seconds={threads: (1e-3,)}, roof={threads: 1e-4})


def test_roof_leaves_some_slack():
    times = {"seconds": {1: (8.1e-5,)}, "default_seconds": {1: (1e-4,)}, "roof": {1: 1e-4}}
    assert parse(line_of(make(**times))).seconds == times["seconds"]


WEIRD = [None, True, 0, -1, 1.5, 2**40, "", "x", "\ud800", "\x1b", [], [1], [[]], [None], {}, {"a": 1}, {"": {}}]
WEIRD += [{"1": 1}, {"1": [1, None]}, {"1": ["1"]}, {"1": {"1": [1]}}, {"9" * 50: [1.0]}, {"slack": [1]}, {"s_q": "1"}]


@pytest.mark.parametrize("field", sorted(document()))
def test_wrong_types(field):
    """A record is either refused with an error, or comes back unchanged from its line."""
    refused = 0
    for value in WEIRD:
        line = signed(document(**{field: value}))
        try:
            assert line_of(parse(line)) == line
        except RecordError:
            refused += 1
    assert refused >= len(WEIRD) - 7


def test_append_refuses_what_reading_would(log):
    with pytest.raises(RecordError, match="target and operator: expected x86-64-v4 topk, got 'aarch64 topk'"):
        log.append(make(target="aarch64"))
    with pytest.raises(RecordError, match=f"record: expected at most {journal.MAX_LINE} bytes"):
        log.append(make(seconds={}, error="x" * journal.MAX_LINE))
    assert log.read() == ([], []) and not log.path.exists()


def test_longest_line(log):
    room = journal.MAX_LINE - len(line_of(make(seconds={}, error="x"))) + 1
    longest = make(seconds={}, error="x" * room)
    log.append(longest)
    log.append(number(1))
    assert len(line_of(longest)) == journal.MAX_LINE and log.read() == ([longest, number(1)], [])


def test_merge(log, tmp_path):
    sources = [Log(tmp_path / name / "x86-64-v4" / "topk.jsonl") for name in "ab"]
    for item, numbers in zip([log, *sources], [(3, 1), (5, 1, 4), (4, 5, 6)], strict=True):
        for n in numbers:
            item.append(number(n))
    with open(sources[0].path, "ab") as file:
        file.write(b"damaged\n" + line_of(number(9)).encode())
    with open(log.path, "ab") as file:
        file.write(b"\n" + line_of(number(1)).encode() + b"\ntorn")
    log.path.chmod(0o600)
    added, damage = merge([source.path for source in sources], log.path)
    expected = [number(n) for n in (3, 1, 5, 4, 9, 6)]
    assert added == 4 and log.read() == (expected, [])
    assert [(d.path, d.line) for d in damage] == [(sources[0].path, 4), (log.path, 3), (log.path, 5)]
    assert log.path.stat().st_mode & 0o777 == 0o600
    before = log.path.read_bytes()
    assert merge([source.path for source in sources], log.path)[0] == 0 and log.path.read_bytes() == before
    assert merge([log.path], log.path) == (0, []) and log.path.read_bytes() == before
    assert len(sources[0].read()[0]) == 4, "a source was changed"


def test_merge_through_a_link(log, tmp_path):
    source = Log(tmp_path / "source" / "x86-64-v4" / "topk.jsonl")
    fill(source, 2)
    real = tmp_path / "elsewhere"
    real.touch()
    log.path.parent.mkdir(parents=True)
    log.path.symlink_to(real)
    assert merge([source.path], log.path)[0] == 2
    assert log.path.is_symlink() and real.read_bytes() == source.path.read_bytes()


def test_merge_refuses_another_place(log, tmp_path):
    with pytest.raises(RecordError, match=r"sparse_mla.jsonl: place: expected x86-64-v4 topk"):
        merge([tmp_path / "x86-64-v4" / "sparse_mla.jsonl"], log.path)


def test_directory(log, tmp_path):
    directory = log.path.parent.parent
    with pytest.raises(RecordError, match="tuning logs: expected a directory, got"):
        read_directory(directory)
    written = fill(log, 2)
    other = make("sparse_mla", target="aarch64")
    Log(directory / "aarch64" / "sparse_mla.jsonl").append(other)
    with open(log.path, "ab") as file:
        file.write(b"torn")
    found, (damage,) = read_directory(directory)
    assert found == [other, *written] and (damage.path, damage.line) == (log.path, 3)


def test_the_logs_of_the_package():
    directory = records.default_directory()
    assert (directory / "README.md").is_file() and not read_directory(directory)[1]
