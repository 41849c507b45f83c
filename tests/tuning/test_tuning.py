"""Tuning jobs: what is kept, what is resumed, and what a bad candidate, a killed job or a lost machine costs."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bad_kernels
import outside_kernels
import pytest

import dsa_tvm
from dsa_tvm import presets
from dsa_tvm.errors import DsaError
from dsa_tvm.records import Log
from dsa_tvm.terminal.progress import Progress
from dsa_tvm.tuning import failures
from dsa_tvm.tuning import fleet as fleets
from dsa_tvm.tuning import workers as workers_module
from dsa_tvm.tuning.building import Builder
from dsa_tvm.tuning.job import Job, Options
from dsa_tvm.tuning.tasks import Task
from dsa_tvm.tuning.workers import Worker, WorkerError, Workers

TARGET = "x86-64-v2"
TESTS = os.pathsep.join(str(Path(__file__).parent / room) for room in (".", ".."))
TASK = Task("topk", TARGET, presets.get("deepseek-v3.2"), 2, 6000)

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="candidates are linked with a C compiler")


COMMAND = (sys.executable, "-m", "dsa_tvm.cli", "tune")


def tune(*args):
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=600)


def started(*args, stderr=subprocess.PIPE, **options):
    """A job that runs beside the test."""
    return subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=stderr, text=True, **options)


def into(output, arguments):
    """The arguments of `finished` with another directory for the logs."""
    return [str(output) if Path(a).is_absolute() else a for a in arguments]


def log_of(output, op="topk", target=TARGET):
    records, damaged = Log(output / target / f"{op}.jsonl").read()
    assert not damaged
    keys = [record.key for record in records]
    assert len(set(keys)) == len(keys), "a trial was measured twice"
    return records


def trials(records):
    return [r for r in records if r.kind == "trial"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small job from the command line."""
    output = tmp_path_factory.mktemp("logs")
    arguments = ("topk", "--target", TARGET, "--shapes", "2x6000", "--output", str(output), "--threads", "1", "2")
    return output, arguments, tune(*arguments, "--trials", "10")


def test_job(finished):
    output, _, done = finished
    assert done.returncode == 0, done.stderr
    records = log_of(output)
    assert len(trials(records)) == 10
    assert {r.error for r in trials(records)} == {None}
    assert all(set(r.seconds) == {1, 2} and r.roof[1] > 0 for r in records)
    assert "trial 10/10" in done.stderr
    assert "DEFAULT" in done.stdout


def test_resume(finished):
    """The same command does nothing twice; more trials go on where it ended."""
    output, arguments, _ = finished
    before = log_of(output)
    again = tune(*arguments, "--trials", "10")
    assert again.returncode == 0, again.stderr
    assert "trial " not in again.stderr
    assert trials(log_of(output)) == trials(before)
    more = tune(*arguments, "--trials", "12")
    assert more.returncode == 0, more.stderr
    assert len(trials(log_of(output))) == 12


def test_element_types(tmp_path):
    """Of the attention, for which others than float32 are asked for."""
    arguments = ("sparse_mla", "--types", "bfloat16", "--target", TARGET, "--preset", "glm-5", "--shapes", "1x64")
    done = tune(*arguments, "--output", str(tmp_path), "--threads", "1", "--trials", "2")
    assert done.returncode == 0, done.stderr
    found = trials(log_of(tmp_path, "sparse_mla"))
    assert len(found) == 2 and {(r.types, r.error) for r in found} == {(("bfloat16",), None)}
    assert "sparse_mla bfloat16 1x64" in done.stdout + done.stderr


def test_a_target_with_kernels_for_some_types(tmp_path):
    """Without --target it is the one whose kernel this machine takes for the type; the roof is that of its products."""
    if dsa_tvm.active_target() != "x86-64-v4-bf16":
        pytest.skip("this machine has no bf16 dot products")
    arguments = ("sparse_mla", "--types", "bfloat16", "--preset", "glm-5", "--shapes", "1x2048", "--threads", "1")
    done = tune(*arguments, "--output", str(tmp_path), "--trials", "3")
    assert done.returncode == 0, done.stderr
    assert "the limit of its multiply-adds for bfloat16: " in done.stdout
    found = trials(log_of(tmp_path, "sparse_mla", "x86-64-v4-bf16"))
    assert len(found) == 3 and {(r.types, r.error) for r in found} == {(("bfloat16",), None)}
    assert all(record.roof[1] < statistics.median(record.seconds[1]) for record in found)
    # A build takes what was measured there for these types, and not for others.
    assert {path.parent.name for path in tmp_path.glob("*/*.jsonl")} == {"x86-64-v4-bf16"}


def test_damaged_log(finished, tmp_path):
    """A job goes on after its log was damaged, says so and measures the damaged trials' number again."""
    output, arguments, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    path = copy / TARGET / "topk.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\n" + lines[0][:40] + b"\n" + b"".join(lines[1:]) + lines[0][:77])
    done = tune(*into(copy, arguments), "--trials", "10")
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout + done.stderr
    records, damaged = Log(path).read()
    assert damaged
    assert len({r.key for r in trials(records)}) == len(trials(records)) >= 10


@contextlib.contextmanager
def job(output, *, seconds=60.0, limit=60.0, kernels=bad_kernels, work=None, **options):
    # An empty entry would be the working directory, and the checkout in it.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))}
    environment["DSA_TVM_TEST_STATE"] = str(output)
    work = work or output / "work"
    work.mkdir(parents=True, exist_ok=True)
    with Workers(2, environment) as workers:
        builder = Builder(workers, work, "cc", seconds, {"topk": kernels})
        chosen = Options(
            trials=options.get("trials", 14),
            timeout=600,
            threads=(1,),
            output=output,
            machine="test",
            gflops={(): {1: 1e3}},
            limit=limit,
        )
        yield Job(chosen, [TASK], workers, builder)


def test_bad_candidates(tmp_path):
    """Every way to go wrong is a failed trial with its reason, and the job finds the one candidate that works."""
    with job(tmp_path, trials=7, seconds=12, limit=12) as bad, Progress(7) as progress:
        bad.run(progress)
    found = {r.decisions["fault"]: r.error for r in trials(log_of(tmp_path))}
    assert len(found) == 7
    for fault, error in found.items():
        expected = {
            bad_kernels.NONE: "",
            bad_kernels.CRASH_COMPILING: "crashed: SIGSEGV",
            bad_kernels.HANG_COMPILING: "timed out",
            bad_kernels.REFUSED: "RuntimeError: no such kernel",
            bad_kernels.WRONG: "wrong result",
            bad_kernels.CRASH_RUNNING: "crashed: SIGSEGV",
            bad_kernels.HANG_RUNNING: "timed out",
        }[fault]
        assert bool(error) == bool(expected), (fault, error)
        assert (error or "").startswith(expected), (fault, error)


def test_bad_default(tmp_path, monkeypatch):
    """If DEFAULT itself is wrong there is nothing to compare with: the job ends and says so."""
    monkeypatch.setitem(bad_kernels.DEFAULT, TARGET, bad_kernels.Decisions(64, bad_kernels.WRONG))
    with (
        job(tmp_path, trials=3) as bad,
        Progress(3) as progress,
        pytest.raises(DsaError, match="topk 2x6000: DEFAULT itself failed: wrong result"),
    ):
        bad.run(progress)


@pytest.fixture
def impatient(monkeypatch):
    """No waiting for a disk to be cleared."""
    monkeypatch.setattr(workers_module, "PAUSES", (0.01, 0.01))


def test_surroundings(tmp_path, capsys, impatient):
    """A worker killed from outside, a full disk and missing memory are no candidate's fault: tried again, no record."""
    with job(tmp_path, trials=4, kernels=outside_kernels) as unlucky, Progress(4) as progress:
        unlucky.run(progress)
    found = {r.decisions["accident"]: r.error for r in trials(log_of(tmp_path))}
    assert found == dict.fromkeys(set(range(6)) - set(outside_kernels.ALWAYS))
    said = capsys.readouterr().out
    # What happened to some candidate for ever is told, with its cause, where it was proposed at all.
    for accident, cause in {outside_kernels.KILLED: "SIGKILL", outside_kernels.NO_MEMORY: "out of memory"}.items():
        assert not (tmp_path / str(accident)).exists() or cause in said
    # It is tried by the next job.
    with job(tmp_path, trials=6, kernels=outside_kernels) as unlucky, Progress(6) as progress:
        unlucky.run(progress)
    assert len(trials(log_of(tmp_path))) == 4
    said = capsys.readouterr().out
    assert "has no record: ended from outside: SIGKILL" in said and "has no record: out of memory" in said


def test_surroundings_stop_a_job(tmp_path, monkeypatch, impatient):
    """Where nothing can be tried any more, the job says why and stops."""
    monkeypatch.setattr(outside_kernels, "choices", lambda target: {"scan": (64,), "accident": (0, 4, 5)})
    monkeypatch.setattr(failures, "_MOST_LOST", 2)
    with (
        job(tmp_path, trials=3, kernels=outside_kernels) as unlucky,
        Progress(3) as progress,
        pytest.raises(DsaError, match=r"2 candidates in a row could not be tried; the last: .*(SIGKILL|out of memory)"),
    ):
        unlucky.run(progress)
    assert {r.error for r in trials(log_of(tmp_path))} <= {None}


def test_full_disk(tmp_path, small_disk, impatient):
    """What LLVM and the C compiler say of a full disk is the job's error, and no candidate's record."""
    disk = small_disk(300)
    for room in (0, 4, 100):
        (disk / "filler").write_bytes(b"x" * 1024 * (300 - room))
        with (
            job(tmp_path, trials=3, kernels=outside_kernels, work=disk / "work") as full,
            Progress(3) as progress,
            pytest.raises((DsaError, OSError), match=r"No space left on device"),
        ):
            full.run(progress)
        assert not log_of(tmp_path)
        shutil.rmtree(disk / "work")


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("BuildError", "cc -O2 x.c\n/usr/bin/ld: final link failed: No space left on device", True),
        ("BuildError", "gcc: fatal error: Killed signal terminated program cc1", True),
        ("BuildError", "nvcc error : 'cicc' died due to signal 9 (Kill signal)", True),
        ("BuildError", "nvcc error : 'cicc' died due to signal 11 (Invalid memory reference)", False),
        ("BuildError", "ptxas error : Entry function uses too much shared data", False),
        ("crashed", "crashed: exit status 1 (cuda: cuMemAlloc: out of memory)", True),
        ("crashed", "crashed: SIGSEGV", False),
        ("crashed", "crashed: SIGABRT (terminate called after throwing an instance of 'std::bad_alloc')", True),
        ("RuntimeError", "topk: no memory for the workspace of a task", True),
        ("SizeError", "topk: s_q, s_kv: expected inputs that fit into memory, got 1 and 9", True),
        ("CheckError", "topk: expected errors within the tolerance, no memory of which is left", False),
        ("timed out", "timed out after 180 s", False),
    ],
)
def test_whose_fault(kind, message, expected):
    assert WorkerError(kind, message).is_surroundings == expected


def test_a_worker_that_cannot_be_started(monkeypatch, impatient):
    """A limit on processes or open files is no traceback."""

    def refused(*args, **kwargs):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refused)
    with Workers(1) as workers, pytest.raises(WorkerError, match="Resource temporarily unavailable") as failed:
        workers.ask(("nothing", ()), 60)
    assert failed.value.is_surroundings


def test_many_descriptors():
    """A worker is waited for whose pipe has a number that select() does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("no more than 1024 files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    worker = Worker()
    try:
        with pytest.raises(WorkerError, match="nothing"):
            worker.ask(("nothing", ()), 60)
    finally:
        worker.stop()
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_implausible(tmp_path):
    """A time below the machine's limit is not believed."""
    with (
        job(tmp_path, trials=2) as fast,
        Progress(2) as progress,
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DsaError, match="implausible"),
    ):
        patch.setattr(Task, "roof", lambda self, gflops: {1: 1e3})
        fast.run(progress)


def test_killed_job(finished, tmp_path):
    """Kill -9 at random instants: the log keeps every finished trial, once, and no worker stays behind."""
    _, arguments, _ = finished
    lot = random.Random(7)
    output, temporary = tmp_path / "killed", tmp_path / "temporary"
    temporary.mkdir()
    seen = []
    for _ in range(int(os.environ.get("DSA_TVM_TEST_KILLS", "3"))):
        mark = {**os.environ, "DSA_TVM_TEST_JOB": str(output)}
        mark["TMPDIR"] = str(temporary)
        process = started(*into(output, arguments), "--trials", "200", stderr=subprocess.STDOUT, env=mark)
        announced = len(seen)
        stop = announced + lot.randrange(1, 12)
        for line in process.stdout:
            if match := re.search(r"trial (\d+)/200", line):
                announced = int(match[1])
                if announced >= stop:
                    break
        time.sleep(lot.random() * 1.5)
        process.kill()
        rest = process.stdout.read()
        process.wait()
        for match in re.finditer(r"trial (\d+)/200", rest):
            announced = int(match[1])
        records, _ = Log(output / TARGET / "topk.jsonl").read()
        now = [r.key for r in trials(records)]
        assert now[: len(seen)] == seen, "a finished trial was lost"
        assert len(set(now)) == len(now) >= announced
        seen = now
        deadline = time.monotonic() + 10
        while workers_of(output) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not workers_of(output)
        # What the kills before left was cleared: one directory is this kill's own.
        assert len(list(temporary.iterdir())) <= 1


def workers_of(output):
    """Processes of the job that writes to `output`; the job itself is gone."""
    mark, found = f"DSA_TVM_TEST_JOB={output}".encode(), []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def test_interrupted_job(finished, tmp_path):
    """Ctrl-C: exit status 130, one line, and the trials are kept."""
    _, arguments, _ = finished
    output = tmp_path / "interrupted"
    # Where the tests themselves are a shell's background job, they ignore the signal, and so would what they start.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = started(*into(output, arguments), "--trials", "200", preexec_fn=listening)
    for line in process.stderr:
        if "trial 3/200" in line:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert len(trials(log_of(output))) >= 3


def test_two_jobs_one_log(finished, tmp_path):
    """Two jobs at a time write one log; nothing of either is lost."""
    _, arguments, _ = finished
    output = tmp_path / "shared"
    jobs = [started(*into(output, arguments), "--trials", "8", "--seed", seed) for seed in ("1", "2")]
    measured = 0
    for each in jobs:
        _, stderr = each.communicate(timeout=300)
        assert each.returncode == 0, stderr
        assert "trial 8/8" in stderr
        measured += stderr.count("  trial ")
    records, damaged = Log(output / TARGET / "topk.jsonl").read()
    assert not damaged
    # What the other has already written when a job reads the log, that job need not measure; DEFAULT at least both do
    # when they start at one time. Whatever a job says it measured is in the log.
    assert 8 < measured <= 16
    assert len(trials(records)) == measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sort"], "operator: expected all or one of lightning_indexer, topk, sparse_mla, got 'sort'"),
        (["topk", "--target", "z80"], "target: expected one of x86-64-v2"),
        (
            ["topk", "--target", "x86-64-v4-bf16"],
            "target: expected one with kernels of topk, such as x86-64-v4, got",
        ),
        (
            ["sparse_mla", "--target", "x86-64-v4-bf16", "--types", "bfloat16", "float32"],
            "types: expected some of bfloat16 with x86-64-v4-bf16, got float32",
        ),
        (["topk", "--preset", "gpt"], "preset: expected one of deepseek-v3.2"),
        (["topk", "--trials", "0"], "trials: expected at least 1, got 0"),
        (["topk", "--timeout", "-1"], "timeout: expected a positive number"),
        (["topk", "--threads", "0"], "threads: expected 1..1024, got 0"),
        (["topk", "--types", "float32"], "types: expected none with topk, got 'float32'"),
        (["sparse_mla", "--types", "int8"], "types: expected one of bfloat16, float16, float32, got 'int8'"),
        (["--measure", "built", "--types", "float16"], "types: expected none beside --measure"),
        (["topk", "--shapes", "8"], "shapes: expected S_QxS_KV such as 1x32768, got '8'"),
        (["topk", "--rpc", "nowhere"], "rpc: expected HOST:PORT"),
        (["topk", "--rpc", "localhost:9190"], "key: expected the key"),
        (["topk", "--key", "a"], "key: expected --rpc"),
        (["topk", "--output", "/dev/null/logs"], "output: expected a directory to write to, got /dev/null/logs"),
        (["topk", "--cc", "no-such-cc"], "cc: expected a C compiler"),
        (["topk", "--shapes", "1x" + "9" * 5000], "shapes: expected S_QxS_KV"),
        (["topk", "--shapes", "1x99999999999"], "shapes: expected"),
        (["topk", "--rpc", "localhost:" + "9" * 5000, "--key", "a"], "rpc: expected HOST:PORT"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    given = [*arguments] if "--output" in arguments else [*arguments, "--output", str(tmp_path)]
    done = tune(*given)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_worker_reports(tmp_path):
    """A worker that dies says how, and the next request starts another."""
    worker = Worker()
    with pytest.raises(WorkerError, match="nothing") as failed:
        worker.ask(("nothing", ()), 60)
    assert failed.value.kind == "KeyError"
    with pytest.raises(WorkerError):
        worker.ask(("measure", (str(tmp_path / "none.so"), TASK, None, None)), 60)
    worker.stop()


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def fleet(servers):
    """A tracker and its servers; yields the tracker's port and the servers' processes."""
    port = free_port()
    started = []

    def start(*command):
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        started.append(process)
        return process

    start("tvm.exec.rpc_tracker", "--host", "localhost", "--port", str(port), "--port-end", str(port + 1))
    tracker = f"localhost:{port}"
    for i in range(servers):
        first = 9500 + 20 * i
        ports = ("--port", str(first), "--port-end", str(first + 20))
        start("tvm.exec.rpc_server", "--host", "localhost", "--tracker", tracker, "--key", "test", *ports)
    try:
        yield port, started[1:]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_fleet(finished, tmp_path):
    """Two servers share the trials; one is killed in the middle, and the job finishes on the other."""
    _, arguments, _ = finished
    output = tmp_path / "fleet"
    with fleet(2) as (port, servers):
        remote = ("--rpc", f"localhost:{port}", "--key", "test")
        process = started(*into(output, arguments), "--trials", "24", *remote)
        for line in process.stderr:
            if "trial 10/24" in line:
                break
        os.killpg(servers[0].pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr
        worked = servers[0].stdout.read().count(b"connected from")
        os.killpg(servers[1].pid, signal.SIGKILL)
        worked_too = servers[1].stdout.read().count(b"connected from")
    assert worked > 1
    assert worked_too > worked
    records = log_of(output)
    assert len(trials(records)) == 24
    assert {r.error for r in records} == {None}
    assert {r.machine for r in records} == {"rpc test"}


def test_no_server(tmp_path, monkeypatch):
    """No tracker, or a tracker without a server of the key: an error within a stated time that says what to start."""
    port = free_port()
    with pytest.raises(DsaError, match=r"within 1 s.*rpc_tracker --host"):
        fleets.count(fleets.Remote("localhost", port, "test"), 1)
    with fleet(0) as (port, _):
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("localhost", port)) and time.monotonic() < deadline:
            time.sleep(0.5)
        with pytest.raises(DsaError, match=r"key test.*within 1 s.*rpc_server --tracker"):
            fleets.count(fleets.Remote("localhost", port, "test"), 1)
