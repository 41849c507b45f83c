"""A library is hashed once, and again if it may have changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from dsa_tvm.runtime import library, loading, verified

COUNT = """
import sys
from dsa_tvm.runtime import library, loading
read, number = loading.sha256, []
loading.sha256 = lambda descriptor: number.append(descriptor) or read(descriptor)
try:
    library.load(sys.argv[1])
except library.LibraryError as error:
    print(error, file=sys.stderr)
print(len(number))
"""


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A library that is old enough to be remembered, and a folder of the user's own."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    for name in (library.LIBRARY_NAME, library.MANIFEST_NAME):
        shutil.copy(library.default_path().parent / name, tmp_path / name)
    # In child processes of the tests, a file counts as settled at once.
    monkeypatch.setattr(verified, "_SETTLED_NS", -1)
    return tmp_path / library.LIBRARY_NAME


def times_hashed(path, settled="verified._SETTLED_NS = -1"):
    code = f"from dsa_tvm.runtime import verified\n{settled}\n{COUNT}"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), done.stderr


def test_the_second_process_need_not(copy):
    assert times_hashed(copy) == (1, "")
    assert times_hashed(copy) == (0, "")
    (folder,) = copy.parent.joinpath("runtime").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and all(file.stat().st_size == 0 for file in folder.iterdir())


def test_a_change_that_keeps_size_and_time(copy):
    assert times_hashed(copy) == (1, "")
    before = copy.stat()
    with open(copy, "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    number, said = times_hashed(copy)
    assert number == 1 and "it is damaged" in said


def test_another_file_of_the_same_name(copy):
    assert times_hashed(copy) == (1, "")
    shutil.copy2(copy, copy.with_suffix(".new"))
    os.replace(copy.with_suffix(".new"), copy)
    assert times_hashed(copy) == (1, "")


def test_another_manifest(copy):
    """The names in another manifest must not lead out of the folder."""
    assert times_hashed(copy) == (1, "")
    manifest = copy.parent / library.MANIFEST_NAME
    digest = library.verify(copy)["sha256"]
    for other in ("0" * 64, "/../../../../../../../../../../etc/passwd"):
        manifest.write_text(manifest.read_text().replace(digest, other))
        number, said = times_hashed(copy)
        assert number == 1 and "it is damaged" in said
        digest = other


def test_a_change_of_just_now_is_not_remembered(copy):
    """A second change within the same tick of the clock would go unnoticed."""
    for _ in range(2):
        assert times_hashed(copy, settled="verified._SETTLED_NS = 10**15") == (1, "")


@pytest.mark.parametrize("spoil", ["readable", "link", "file", "unwritable", "nowhere"])
def test_a_folder_that_others_could_have_made(copy, spoil, monkeypatch):
    assert times_hashed(copy) == (1, "")
    runtime = copy.parent / "runtime"
    folder = runtime / "dsa_tvm"
    if spoil == "readable":
        folder.chmod(0o770)
    elif spoil == "link":
        folder.rename(runtime / "other")
        folder.symlink_to(runtime / "other")
    elif spoil == "file":
        shutil.rmtree(folder)
        folder.touch()
    elif spoil == "unwritable":
        shutil.rmtree(folder)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc")
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(copy.parent / "nowhere"))
    assert times_hashed(copy) == (1, "")


def test_a_folder_of_another_user(copy, monkeypatch):
    verified.remember(copy.stat(), "a")
    assert verified._folder()
    monkeypatch.setattr(verified.os, "geteuid", lambda: 12345)
    assert verified._folder() is None


def test_this_process_remembers_without_a_folder(copy, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc")
    state = copy.stat()
    assert not verified.is_known(state, "a")
    verified.remember(state, "a")
    assert verified.is_known(state, "a") and not verified.is_known(state, "b")
    time.sleep(0.02)
    os.utime(copy)
    assert not verified.is_known(copy.stat(), "a")


def test_a_file_that_was_just_written_is_not_remembered(copy, monkeypatch):
    """Not in this process either: within a tick of the file system's clock it may change and keep its times."""
    monkeypatch.setattr(verified, "_SETTLED_NS", 10**18)
    monkeypatch.setattr(verified, "_here", set())
    hashed = []
    real = loading.sha256
    monkeypatch.setattr(loading, "sha256", lambda descriptor: hashed.append(1) or real(descriptor))
    for n in (1, 2):
        library.verify(copy)
        assert len(hashed) == n
    monkeypatch.setattr(verified, "_SETTLED_NS", -1)
    library.verify(copy)
    library.verify(copy)
    assert len(hashed) == 3
