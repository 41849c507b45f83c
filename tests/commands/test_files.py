"""Files are written where the path leads, whole or not at all. Temporary files are removed even after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dsa_tvm.runtime import files
from dsa_tvm.runtime.files import expect_writable, expect_writable_directory, scratch, write_atomically

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_links_stay(tmp_path):
    """Symbolic links stay and lead to the new content, also chains of links and links to a missing file."""
    first, second, target = tmp_path / "first", tmp_path / "second", tmp_path / "there" / "file"
    target.parent.mkdir()
    first.symlink_to("second")
    second.symlink_to(target)
    for data in (b"new", b"newer"):
        expect_writable(first)
        write_atomically(first, data)
        assert first.is_symlink() and second.is_symlink() and target.read_bytes() == data
    assert os.listdir(target.parent) == ["file"]


def test_a_link_to_itself(tmp_path):
    path = tmp_path / "loop"
    path.symlink_to(path)
    for action in (expect_writable, lambda p: write_atomically(p, b"x")):
        with pytest.raises(OSError, match="symbolic links"):
            action(path)


def test_fifo(tmp_path):
    """A FIFO gets more than fits in a pipe, and is still there."""
    path, data, read = tmp_path / "fifo", os.urandom(300_000), []
    os.mkfifo(path)
    expect_writable(path)  # does not wait for the reader
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    reader.start()
    write_atomically(path, data)
    reader.join(30)
    assert read == [data] and stat.S_ISFIFO(path.stat().st_mode)


def test_a_device_stays_one(tmp_path):
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.stat("/dev/null").st_rdev)
    except PermissionError:
        path.symlink_to("/dev/null")
    expect_writable(path)
    write_atomically(path, b"x")
    assert stat.S_ISCHR(path.stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    link = tmp_path / "link"
    link.symlink_to(path)
    write_atomically(link, b"x")
    assert stat.S_ISCHR(path.stat().st_mode) and link.is_symlink()
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(Path("/dev/full"), b"x")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_goes_on(tmp_path, name):
    """A file that the shell has opened is neither replaced nor overwritten from its start."""
    code = (
        "from pathlib import Path; from dsa_tvm.runtime.files import expect_writable, write_atomically\n"
        f"path = Path({name!r}); print('before'); expect_writable(path)\n"
        "write_atomically(path, b'data\\n'); print('end')"
    )
    path = tmp_path / "out"
    with open(path, "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert path.read_text() == "before\ndata\nend\n"


def test_permissions(tmp_path):
    """A file keeps its permissions. A new file gets those that the umask allows."""
    private, new = tmp_path / "private", tmp_path / "new"
    private.write_bytes(b"old")
    private.chmod(0o600)
    write_atomically(private, b"new")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = os.umask(0o027)
    try:
        write_atomically(new, b"new", 0o755)
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == 0o750


@ROOT_ONLY
def test_owner(tmp_path):
    path = tmp_path / "theirs"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    write_atomically(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("x" * 255)
    expect_writable(path)
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(IsADirectoryError):
        expect_writable(tmp_path)
    for path in (tmp_path / "file" / "below", Path("/proc/none/file")):
        with pytest.raises(OSError):
            expect_writable(path)
    for path in (tmp_path / "file", Path("/proc/none")):
        with pytest.raises(OSError):
            expect_writable_directory(path)
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk(small_disk):
    disk = small_disk(64)
    (disk / "old").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(disk / "old", bytes(100_000))
    (disk / "filler").write_bytes(bytes((64 - 4) * 1024))
    for path in (disk / "old", disk / "new"):
        # The error names the path of the caller, not a temporary file.
        with pytest.raises(OSError, match=f"No space left on device: '{disk}'"):
            expect_writable(path)
    with pytest.raises(OSError, match="No space left"):
        expect_writable_directory(disk)
    assert (disk / "old").read_bytes() == b"old" and sorted(os.listdir(disk)) == ["filler", "old"]


@ROOT_ONLY
def test_a_mounted_file_is_written_in_place(tmp_path):
    """A mounted file, as in containers, cannot be replaced."""
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.write_bytes(b"inner")
    outer.write_bytes(b"a longer text")
    if not shutil.which("mount") or subprocess.run(["mount", "--bind", outer, inner], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        expect_writable(inner)
        with pytest.raises(OSError, match="busy"):
            write_atomically(inner, b"new")
        assert outer.read_bytes() == b"a longer text"
        write_atomically(inner, b"new", in_place=True)
        assert outer.read_bytes() == b"new" and sorted(os.listdir(tmp_path)) == ["inner", "outer"]
    finally:
        subprocess.run(["umount", str(inner)], check=True)


WAITS = """
import sys, time
from dsa_tvm.runtime.files import scratch
with scratch() as directory:
    (directory / "file").touch()
    print(directory, flush=True)
    sys.stdin.read()
"""


def test_scratch_clears_what_nobody_owns(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))

    def started():
        child = subprocess.Popen(
            [sys.executable, "-c", WAITS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        return child, Path(child.stdout.readline().strip())

    killed, left = started()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left.is_dir()
    living, owned = started()
    assert not left.exists() and owned.is_dir()
    # Files with other names, and the targets of links, are not touched.
    precious = tmp_path / "dsa-tvm.scratch.notes"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / "dsa-tvm.scratch.abcdefgh").symlink_to(precious)
    with scratch() as mine:
        assert mine.parent == tmp_path and (owned / "file").exists() and (precious / "file").exists()
    living.communicate("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dsa-tvm.scratch.abcdefgh", precious.name]


def test_scratch_is_its_own_owner(tmp_path, monkeypatch):
    """One process may have two scratch directories."""
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    with scratch() as first, scratch() as second:
        assert first.is_dir() and second.is_dir() and first != second
    assert not list(tmp_path.iterdir())
