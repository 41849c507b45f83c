"""Tuning for GPUs without one: candidates for the emulator, built in one process and measured in another."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_nvcc
import pytest

pytest.importorskip("tvm", reason="building needs apache-tvm")

import bad_cuda_kernels
from dsa_tvm.schedules.cuda.source import cuda_source
from test_cuda_doors import has_driver

from dsa_tvm import presets
from dsa_tvm.errors import DsaError
from dsa_tvm.records import Log
from dsa_tvm.runtime.files import owned
from dsa_tvm.terminal.progress import Progress
from dsa_tvm.tuning import prebuilt
from dsa_tvm.tuning.gpu.building import CudaBuilder
from dsa_tvm.tuning.job import Job, Options
from dsa_tvm.tuning.tasks import Task
from dsa_tvm.tuning.workers import Workers

#: What the emulator says it is.
TARGET = "sm_86"
PRESET = presets.get("deepseek-v3.2")
TESTS = os.pathsep.join(str(Path(__file__).parent / room) for room in (".", "..", "../gpu"))
COMMAND = (sys.executable, "-m", "dsa_tvm.cli", "tune")
SHAPES = ("--shapes", "2x6000", "1x20000")

pytestmark = pytest.mark.skipif(
    not shutil.which("cc") or not shutil.which("g++"), reason="candidates are compiled with a C and a C++ compiler"
)


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory):
    return emulated_nvcc.install(tmp_path_factory.mktemp("nvcc"))


@pytest.fixture(scope="module")
def gpu(nvcc):
    """The environment of a process that finds a GPU."""
    text = cuda_source([("unused", bad_cuda_kernels.tensor_ir(bad_cuda_kernels.DEFAULT))])
    return {"LD_LIBRARY_PATH": str(emulated_nvcc.emulator(text, nvcc.parent).parent)}


def with_tests():
    # An empty entry would be the working directory, and the checkout in it.
    return os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))


def tune(*arguments, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=900, env=os.environ | environment
    )


def kill_after(words, *arguments, **environment):
    """Start a job and kill it once it has said so."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            break
    process.kill()
    process.communicate()
    assert words in seen[-1], seen


def log_of(output):
    records, damaged = Log(output / TARGET / "topk.jsonl").read()
    assert not damaged
    keys = [record.key for record in records]
    assert len(set(keys)) == len(keys), "a trial was measured twice"
    return records


@pytest.fixture(scope="module")
def built(nvcc, tmp_path_factory):
    """The real top-k, its build killed in the middle and begun again."""
    directory = tmp_path_factory.mktemp("job") / "candidates"
    arguments = ("topk", "--target", TARGET, *SHAPES, "--trials", "3", "--build-only", directory, "--nvcc", nvcc)
    arguments += ("--output", directory.parent / "logs")
    kill_after("candidate 1/3", *arguments)
    finished = {path: path.stat().st_mtime_ns for path in directory.glob("*.so")}
    contents = prebuilt.load(directory)
    assert len(contents.families) == 1 and any(c.sha256 for c in contents.families[0].candidates)
    done = tune(*arguments)
    assert done.returncode == 0, done.stderr
    assert "3 candidates for sm_86" in done.stdout
    kept = [path for path, time in finished.items() if path.stat().st_mtime_ns == time]
    assert directory / "topk.rows.0001.so" in kept or directory / "topk.default.so" in kept
    again = tune(*arguments)
    assert again.returncode == 0 and "candidate " not in again.stderr
    return directory


@pytest.fixture(scope="module")
def measured(built, gpu, tmp_path_factory):
    """On a machine that has NumPy and a GPU and nothing else, killed in the middle and begun again."""
    bare = tmp_path_factory.mktemp("bare")
    for name in ("tvm", "tvm_ffi", "torch", "ml_dtypes", "xgboost"):
        (bare / f"{name}.py").write_text(f"raise ImportError('there is no {name} here')\n")
    path = os.pathsep.join(filter(None, [str(bare), os.environ.get("PYTHONPATH")]))
    logs = tmp_path_factory.mktemp("logs")
    environment = {**gpu, "PYTHONPATH": path, "PATH": str(bare)}
    arguments = ("--measure", built, "--output", logs)
    kill_after("trial 1/3", *arguments, **environment)
    before = log_of(logs)
    done = tune(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert log_of(logs)[: len(before)] == before
    again = tune(*arguments, **environment)
    assert again.returncode == 0 and "trial " not in again.stderr, again.stderr
    return logs, done


def test_a_job_on_two_machines(built, measured):
    logs, done = measured
    records = log_of(logs)
    trials = [r for r in records if r.kind == "trial"]
    (family,) = prebuilt.load(built).families
    assert family.candidates[0].decisions == family.default
    assert len(trials) == 2 * len(family.candidates) == 6
    assert {r.error for r in records} == {None} and {r.machine for r in records} == {"CUDA emulator"}
    assert {(r.shape["s_q"], r.shape["s_kv"]) for r in trials} == {(2, 6000), (1, 20000)}
    assert all(set(r.seconds) == {1} and "tvm" in r.versions for r in records)
    listed = [c.decisions for c in family.candidates]
    assert all(r.decisions in listed for r in records)
    assert "DEFAULT" in done.stdout
    # A finalist is measured at every size.
    finals = [r for r in records if r.kind == "final"]
    assert len(finals) == 2 * len({str(r.decisions) for r in finals})


def test_the_next_round_proposes_others(built, measured, nvcc, tmp_path):
    logs, _ = measured
    arguments = ("--target", TARGET, *SHAPES, "--trials", "1", "--nvcc", nvcc, "--output", logs)
    done = tune("topk", *arguments, "--build-only", tmp_path / "next")
    assert done.returncode == 0, done.stderr
    (family,) = prebuilt.load(tmp_path / "next").families
    known = [c.decisions for c in prebuilt.load(built).families[0].candidates]
    assert len(family.candidates) == 1 and family.candidates[0].decisions not in known


def test_a_damaged_library_is_built_again(built, measured, nvcc, gpu, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    broken = copy / "topk.rows.0002.so"
    broken.write_bytes(broken.read_bytes()[:-1])
    done = tune("--measure", copy, "--output", tmp_path / "logs", **gpu)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"expected the library {broken} as it was built" in done.stderr
    arguments = ("topk", "--target", TARGET, *SHAPES, "--trials", "3", "--build-only", copy, "--nvcc", nvcc)
    done = tune(*arguments)
    assert done.returncode == 0 and done.stderr.count("candidate ") == 1, done.stderr
    other = tune(*arguments[:3], "--shapes", "2x700", *arguments[6:])
    assert other.returncode == 1 and "an empty directory or one of the same job" in other.stderr


def test_tuning_on_this_machine(gpu, nvcc, tmp_path):
    arguments = ("topk", "--target", "cuda", "--shapes", "2x6000", "--trials", "2", "--nvcc", nvcc)
    done = tune(*arguments, "--output", tmp_path, **gpu)
    assert done.returncode == 0, done.stderr
    assert "sm_86 on CUDA emulator" in done.stdout
    assert len([r for r in log_of(tmp_path) if r.kind == "trial"]) == 2


@contextlib.contextmanager
def job(output, nvcc, gpu, *shapes, trials):
    work = output / "work"
    work.mkdir(parents=True)
    with (
        Workers(2, {"PYTHONPATH": with_tests()}, "nvcc") as compilers,
        Workers(1, gpu, "gpu") as workers,
    ):
        builder = CudaBuilder(compilers, work, "cc", str(nvcc), 60, bad_cuda_kernels.__name__)
        options = Options(
            trials=trials, timeout=900, threads=(1,), output=output, machine="test", gflops={}, limit=15.0
        )
        yield Job(options, [Task("topk", TARGET, PRESET, *shape, ()) for shape in shapes], workers, builder)


def test_bad_candidates(tmp_path, nvcc, gpu):
    """Every way to go wrong is a failed trial with its reason, at one size alone, and the job goes on."""
    with job(tmp_path, nvcc, gpu, (2, 700), (3, 900), trials=8) as bad, Progress(16) as progress:
        assert bad.run(progress) == []
    found = {}
    for record in log_of(tmp_path):
        found.setdefault(record.decisions["fault"], []).append(record.error)
    assert found.pop(bad_cuda_kernels.NONE) == [None, None]
    assert len(found) == 7
    for fault, (error,) in found.items():
        expected = {
            bad_cuda_kernels.CRASH_COMPILING: "crashed: SIGSEGV",
            bad_cuda_kernels.HANG_COMPILING: "timed out",
            bad_cuda_kernels.REFUSED: "RuntimeError: no such kernel",
            bad_cuda_kernels.WRONG: "wrong result: topk: the indices are not",
            bad_cuda_kernels.CRASH_RUNNING: "crashed: exit status 1 (cuda: ",
            bad_cuda_kernels.HANG_RUNNING: "timed out",
            bad_cuda_kernels.OVERRUN: "wrong result: topk: indices: memory behind its end was written",
        }[fault]
        assert error.startswith(expected), (fault, error)


def test_bad_default(tmp_path, nvcc, gpu, monkeypatch):
    monkeypatch.setattr(bad_cuda_kernels, "DEFAULT", bad_cuda_kernels.Decisions(32, bad_cuda_kernels.WRONG))
    with (
        job(tmp_path, nvcc, gpu, (2, 700), trials=2) as bad,
        Progress(2) as progress,
        pytest.raises(DsaError, match="topk 2x700: DEFAULT itself failed: wrong result"),
    ):
        bad.run(progress)


@pytest.fixture
def directory(tmp_path):
    """A directory as --build-only leaves it, of libraries that are none."""

    def library(name):
        (tmp_path / name).write_bytes(name.encode())
        return prebuilt.Built({"a": 1}, name, prebuilt.sha256(tmp_path / name))

    baseline, candidates = library("topk.default.so"), [library("topk.rows.0001.so")]
    spec = prebuilt.spec_hash("topk")
    family = prebuilt.Family("topk", "rows", [], spec, [[2, 700]], {"a": 1}, baseline, candidates)
    prebuilt.Contents("sm_90a", PRESET, {"tvm": "0"}, [family]).save(tmp_path)
    return tmp_path


def refused(directory, **environment):
    """The one line that says why nothing is measured there."""
    done = tune("--measure", directory, "--output", directory / "logs", **environment)
    assert done.returncode == 1, done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_another_gpu(directory, gpu):
    words = "expected a GPU that runs code for sm_90a, got CUDA emulator of compute capability 8.6"
    assert words in refused(directory, **gpu)


@pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
def test_no_driver(directory, tmp_path):
    words = "tune: expected a GPU to measure on, got: cuda: no CUDA driver could be loaded"
    assert words in refused(directory)
    done = tune("topk", "--target", "cuda", "--output", tmp_path / "logs")
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


ODD = [None, True, -1, 0, 1.5, 10**30, "", "x", "\0", [], [[]], {}, {"a": None}, [None, 1], [1, 2, 3]]


def anywhere(document):
    """Copies of a JSON document, each with an odd value in one place, or with something left out."""

    def places(value):
        if isinstance(value, dict | list):
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                yield value, key
                yield from places(value[key])

    for value, key in list(places(document)):
        kept = value[key]
        for odd in ODD:
            value[key] = odd
            yield copy.deepcopy(document)
        value[key] = kept
        if isinstance(value, dict):
            del value[key]
            yield copy.deepcopy(document)
            value[key] = kept


def test_a_directory_from_before_presets_held_the_scale(directory):
    path = directory / "job.json"
    document = json.loads(path.read_text())
    del document["sum"], document["preset"]["sm_scale"]
    path.write_text(json.dumps(document | {"sum": prebuilt.digest(document)}))
    assert prebuilt.load(directory).preset.lengths == PRESET.lengths


def test_damaged_directory(directory, tmp_path):
    path = directory / "job.json"
    whole = path.read_bytes()
    assert prebuilt.Prebuilt(directory, prebuilt.load(directory)).versions == {"tvm": "0"}
    assert "job.json, made by --build-only, got" in refused(directory / "nowhere")

    def expect_refusal(data, words="made by --build-only, got"):
        path.write_bytes(data)
        with pytest.raises(DsaError, match=words):
            prebuilt.load(directory)

    for length in range(0, len(whole), 7):
        expect_refusal(whole[:length])
    for at in range(0, len(whole), 5):
        changed = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        with contextlib.suppress(ValueError):
            if json.loads(changed) == json.loads(whole):
                continue
        expect_refusal(changed)
    for data in (b"[]", b"{}", b"[" * 10**5, b"\xff\xfe"):
        expect_refusal(data)

    def expect_refusal_of(words, **changes):
        """With the right checksum."""
        document = json.loads(whole)
        del document["sum"]
        document["families"][0].update(changes)
        expect_refusal(json.dumps(document | {"sum": prebuilt.digest(document)}).encode(), words)

    elsewhere = {"decisions": {"a": 1}, "file": "../topk.so", "sha256": "", "error": ""}
    expect_refusal_of("a file name that is not in this directory", candidates=[elsewhere])
    expect_refusal_of("for another version of topk", spec="0123")
    expect_refusal_of("element types that topk does not have", types=["int4"])
    expect_refusal_of("sort", op="sort")
    # Any value at any place, with the right checksum: taken or refused, and nothing else.
    for document in anywhere(json.loads(whole)):
        document.pop("sum", None)
        with contextlib.suppress(DsaError, RecursionError):
            path.write_bytes(json.dumps(document | {"sum": prebuilt.digest(document)}).encode())
            contents = prebuilt.load(directory)
            source = prebuilt.Prebuilt(directory, contents)
            for task in contents.tasks():
                list(source.libraries(task, source.search(task, 0, 8).ask()))
    path.write_bytes(whole)
    for damage in (lambda p: p.write_bytes(b"other"), lambda p: p.unlink()):
        damage(directory / "topk.rows.0001.so")
        with pytest.raises(DsaError, match=r"expected the library .*0001\.so as it was built"):
            prebuilt.Prebuilt(directory, prebuilt.load(directory))


def test_a_directory_that_is_being_filled(tmp_path):
    with owned(tmp_path):
        arguments = ("--target", "sm_86", "--build-only", tmp_path, "--output", tmp_path / "logs")
        done = tune("topk", *arguments, "--nvcc", sys.executable)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.endswith(f"expected a directory of its own, got {tmp_path}, which another process is filling")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--build-only", "d"], "build-only: expected --target ARCH such as sm_90a beside it, got none"),
        (["--build-only", "d", "--target", "cuda"], "build-only: expected --target ARCH"),
        (["--measure", "d", "--target", "sm_90a"], "target: expected none beside --measure"),
        (["--measure", "d", "--build-only", "e", "--target", "sm_90a"], "measure: expected a directory that was built"),
        (["--target", "sm_90a", "--threads", "2"], r"threads: expected none with a GPU, got [2]"),
        (["--target", "cuda", "--rpc", "a:1", "--key", "k"], "rpc: expected none with a GPU, got a:1"),
        (["--target", "sm_86", "--build-only", "d", "--nvcc", "no-such-nvcc"], "nvcc: expected NVIDIA's CUDA compiler"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    done = subprocess.run(
        [*COMMAND, "topk", "--output", str(tmp_path / "logs"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
