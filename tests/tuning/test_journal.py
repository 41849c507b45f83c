"""Logs survive kills, full disks and other writers."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import stat
import time

import pytest
from tuning_records import finish, killed_before_call, number, start

from dsa_tvm.errors import RecordError
from dsa_tvm.records import Log, logs, merge
from dsa_tvm.records.log import line_of


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "logs" / "x86-64-v4" / "topk.jsonl")


def write(log, *numbers):
    for n in numbers:
        log.append(number(n))


def numbers(log):
    return [record.decisions["slack"] for record in log.read()[0]]


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize("before", ["nothing", "a log", "a torn log"])
def test_killed_at_every_call(log, before, torn):
    index, died = 0, True
    while died:
        shutil.rmtree(log.path.parent.parent, ignore_errors=True)
        if before != "nothing":
            write(log, 1, 2)
        if before == "a torn log":
            log.path.write_bytes(log.path.read_bytes()[:-9])
        kept = numbers(log)
        died = killed_before_call(index, lambda: write(log, 7), torn)
        assert numbers(log) in ([kept, [*kept, 7]] if died else [[*kept, 7]])
        kept = numbers(log)
        write(log, 8)
        assert numbers(log) == [*kept, 8]
        index += 1
    assert index > 5


def test_killed_at_random_instants(log):
    rng, known = random.Random(0), 0
    for _ in range(20):
        reader, writer = os.pipe()

        def work(first=known, writer=writer):
            for n in range(first, first + 10**6):
                write(log, n)
                os.write(writer, b".")

        child = start(work)
        os.close(writer)
        told = len(os.read(reader, 1))
        time.sleep(rng.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert finish(child)
        while more := os.read(reader, 4096):
            told += len(more)
        os.close(reader)
        # The process may have been killed after `append`, before it could report that.
        assert len(numbers(log)) - known in (told, told + 1)
        known = len(numbers(log))
        assert numbers(log) == list(range(known))


def test_merge_killed_at_every_call(log, tmp_path):
    source = Log(tmp_path / "source" / "x86-64-v4" / "topk.jsonl")
    write(source, 2, 3, 4)
    index, died = 0, True
    while died:
        shutil.rmtree(log.path.parent.parent, ignore_errors=True)
        write(log, 1, 2)
        died = killed_before_call(index, lambda: merge([source.path], log.path))
        assert numbers(log) in ([[1, 2], [1, 2, 3, 4]] if died else [[1, 2, 3, 4]])
        assert [item.path for item in logs(log.path.parent.parent)] == [log.path]
        write(log, 5)
        assert numbers(log)[-1] == 5 and not log.read()[1]
        index += 1
    assert index > 8


@pytest.mark.parametrize("writers", [2, 4])
@pytest.mark.parametrize("merging", [False, True], ids=["", "merging"])
def test_many_processes(log, tmp_path, writers, merging):
    """Appends are kept even if a merge replaces the file all the time."""
    each = 60
    source = Log(tmp_path / "source" / "x86-64-v4" / "topk.jsonl")
    write(source, -1, -2)
    stop = tmp_path / "stop"

    def merge_on():
        while not stop.exists():
            merge([source.path], log.path)
            # Let the others have the lock, which need not go to the process that waits longest.
            time.sleep(0.002)

    children = [start(lambda w=w: write(log, *range(w * each, (w + 1) * each))) for w in range(writers)]
    merger = start(merge_on) if merging else 0
    try:
        killed = [finish(child) for child in children]
    finally:
        stop.touch()
    assert not any(killed) and not (merging and finish(merger))
    found = numbers(log)
    assert sorted(found) == [-2, -1][: 2 * merging] + list(range(each * writers))
    for w in range(writers):
        mine = range(w * each, (w + 1) * each)
        assert [n for n in found if n in mine] == list(mine)
    assert not log.read()[1]


def test_a_line_that_is_being_written_is_not_torn(log):
    write(log, 1)
    reader, writer = os.pipe()

    def work():
        whole = os.write

        def slowly(file, data):
            whole(file, data[:100])
            whole(writer, b".")
            time.sleep(0.1)
            return 100 + whole(file, data[100:])

        os.write = slowly
        write(log, 2)

    child = start(work)
    os.read(reader, 1)
    assert numbers(log) == [1, 2] and not log.read()[1]
    assert not finish(child)


def test_a_long_log_is_not_read(log):
    write(log, 1)
    log.path.write_bytes(log.path.read_bytes() * 100_000)

    def read_so_far():
        with open("/proc/self/io", encoding="ascii") as file:
            return int(file.readline().split()[1])

    before = read_so_far()
    write(log, 2)
    assert read_so_far() - before < 10_000
    with open(log.path, "rb") as file:
        file.seek(-len(line_of(number(2))) - 1, os.SEEK_END)
        assert file.read().decode() == line_of(number(2)) + "\n"


@pytest.mark.parametrize("room", [0, 1, 100])
def test_file_that_may_not_grow(log, room):
    write(log, 1, 2)
    whole = log.path.read_bytes()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, resource.RLIM_INFINITY))
        with pytest.raises(RecordError, match=r"topk.jsonl: expected a file that can be written, got .*too large"):
            write(log, 3)

    assert not finish(start(work))
    assert log.path.read_bytes() == whole
    write(log, 4)
    assert numbers(log) == [1, 2, 4]


def test_full_disk(tmp_path, small_disk):
    disk = small_disk(32)
    log, written = Log(disk / "x86-64-v4" / "topk.jsonl"), []
    (disk / "filler").write_bytes(b"x" * 10_000)
    with pytest.raises(RecordError, match="No space left on device"):
        for n in range(1000):
            write(log, n)
            written.append(n)
    assert written and numbers(log) == written and not log.read()[1]
    before = log.path.read_bytes()
    source = Log(tmp_path / "source" / "x86-64-v4" / "topk.jsonl")
    write(source, *range(2000, 2020))
    with pytest.raises(RecordError, match="No space left on device"):
        merge([source.path], log.path)
    assert log.path.read_bytes() == before
    (disk / "filler").unlink()
    write(log, 7777)
    assert numbers(log) == [*written, 7777]


def test_what_is_no_regular_file(log):
    """FIFOs and devices are refused before any work. Nobody waits for them, empties them or replaces them."""
    log.path.parent.mkdir(parents=True)
    os.mkfifo(log.path)
    for action in (log.expect_writable, lambda: write(log, 1), lambda: merge([], log.path)):
        with pytest.raises(RecordError, match="not a regular file"):
            action()
    records, (damage,) = log.read()
    assert not records and damage.line == 0 and "not a regular file" in damage.reason
    assert stat.S_ISFIFO(log.path.stat().st_mode)
    log.path.unlink()
    log.path.symlink_to("/dev/null")
    with pytest.raises(RecordError, match="not a regular file"):
        write(log, 1)


def test_a_link_to_a_log(log, tmp_path):
    """Appends and merges go to the target of a link, and the link stays."""
    other = Log(tmp_path / "other" / log.path.parent.name / log.path.name)
    write(other, 1)
    log.path.parent.mkdir(parents=True)
    log.path.symlink_to(other.path)
    log.expect_writable()
    write(log, 2)
    source = Log(tmp_path / "source" / log.path.parent.name / log.path.name)
    write(source, 3)
    merge([source.path], log.path)
    assert log.path.is_symlink() and numbers(other) == numbers(log) == [1, 2, 3]


def test_disk_that_does_not_sync(log, monkeypatch):
    write(log, 1)
    whole = log.path.read_bytes()

    def fails(file):
        raise OSError(errno.EIO, "the disk is dying")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(RecordError, match="the disk is dying"):
            write(log, 2)
    assert log.path.read_bytes() == whole


def test_no_place_for_a_directory(log):
    log.path.parent.parent.mkdir()
    log.path.parent.write_text("a file")
    for action in (lambda: write(log, 1), lambda: merge([], log.path)):
        with pytest.raises(RecordError, match=r"topk.jsonl: expected a file that can be written"):
            action()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_that_may_not_be_written(log):
    log.path.parent.mkdir(parents=True, mode=0o500)
    with pytest.raises(RecordError, match="Permission denied"):
        write(log, 1)


def test_directory_in_place_of_a_log(log):
    log.path.mkdir(parents=True)
    with pytest.raises(RecordError, match="Is a directory"):
        write(log, 1)
    records, (damage,) = log.read()
    assert not records and damage.line == 0 and "cannot be read" in damage.reason
