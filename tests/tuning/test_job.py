"""A tuning job whose candidates and workers are made up: what becomes of accidents while it measures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dsa_tvm import presets
from dsa_tvm.errors import DsaError
from dsa_tvm.records import Log
from dsa_tvm.terminal.progress import Progress
from dsa_tvm.tuning.failures import SURROUNDINGS, WorkerError
from dsa_tvm.tuning.job import Job, Options
from dsa_tvm.tuning.prebuilt import Listed
from dsa_tvm.tuning.tasks import Task

DEFAULT = {"slack": 0}
TASK = Task("topk", "x86-64-v3", presets.get("deepseek-v3.2"), 1, 4096)
GOOD = {"seconds": {1: [1e-3]}, "default_seconds": {1: [2e-3]}, "gflops": {}}


class Source:
    """Candidates 1, 2, ...; a library is a name."""

    versions = {"tvm": "0"}  # noqa: RUF012

    def __init__(self, count):
        self.decisions = [{"slack": n} for n in range(1, count + 1)]
        self.discarded = []

    def default(self, task):
        return dict(DEFAULT)

    def search(self, task, seed, batch):
        return Listed([DEFAULT, *self.decisions], batch)

    def libraries(self, task, proposals):
        for i, decisions in enumerate(proposals):
            yield i, decisions["slack"]

    def request(self, task, library, effort, remote):
        return ("measure", (library,))

    def discard(self, library):
        self.discarded.append(library)


def run(directory, outcomes, count=2):
    """Run a job in which measuring candidate n gives `outcomes[n]`; GOOD for others."""
    source = Source(count)
    answers = SimpleNamespace(
        map=lambda requests, *_: ((i, outcomes.get(library, GOOD)) for i, (_, (library,)) in enumerate(requests))
    )
    options = Options(count + 1, 600.0, (1,), directory, "machine", {(): {1: 100.0}})
    with Progress(count + 1) as progress:
        Job(options, [TASK], answers, source).run(progress)
    records, damage = Log(directory / TASK.target / "topk.jsonl").read()
    assert not damage
    return source, [r.decisions["slack"] for r in records if r.kind == "trial"]


def test_every_library_is_discarded(tmp_path):
    source, measured = run(tmp_path, {})
    assert sorted(measured) == [0, 1, 2] and {0, 1, 2} <= set(source.discarded)


def test_a_candidate_that_is_lost_while_it_is_measured(tmp_path, capsys):
    source, measured = run(tmp_path, {1: WorkerError(SURROUNDINGS, "the disk is full")})
    assert sorted(measured) == [0, 2] and 1 in source.discarded
    assert "topk 1x4096: a candidate could not be tried and has no record: the disk is full" in capsys.readouterr().out


def test_default_that_is_lost_while_it_is_measured(tmp_path):
    with pytest.raises(DsaError, match="tune: topk 1x4096: DEFAULT itself could not be tried: out of memory"):
        run(tmp_path, {0: WorkerError(SURROUNDINGS, "out of memory")})


def test_a_gpu_that_went_away(tmp_path):
    """No candidate is to blame, and all others would fail as well."""
    with pytest.raises(DsaError, match="tune: topk 1x4096: cuda: there is no GPU"):
        run(tmp_path, {1: WorkerError("LibraryError", "cuda: there is no GPU")})
    records, _ = Log(tmp_path / TASK.target / "topk.jsonl").read()
    assert all(record.error is None for record in records)
