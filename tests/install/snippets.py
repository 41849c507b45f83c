"""The snippets of a README, and environments with only the packages that its text installs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from packaging.requirements import Requirement

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INSTALL = re.compile(r"pip install '?\.(?:\[([\w,]+)\])?'?((?: [a-z][\w-]*)*)")


@dataclass(frozen=True)
class Snippet:
    """A block of a README.

    Parameters
    ----------
    section : str
        The title above the block, or that of the file.
    language : str
        ``sh``, ``python`` and so on, or "".
    text : str
    extra : str, optional
        The extras in the last ``pip install`` before the block in the text of the section, with commas. None if there
        is no such command.
    others : tuple of str
        Further packages that the same command installs.
    line : int
    """

    section: str
    language: str
    text: str
    extra: str | None
    line: int
    others: tuple[str, ...] = ()


def snippets(path: Path) -> Iterator[Snippet]:
    """The snippets of a file, in order."""
    text = path.read_text(encoding="utf-8")
    for block in _BLOCK.finditer(text):
        before = text[: block.start()]
        title = re.split(r"^#+ ", _BLOCK.sub("", before), flags=re.MULTILINE)[-1]
        extra, others = [(None, ""), *_INSTALL.findall(title)][-1]
        yield Snippet(
            title.partition("\n")[0], block[1], block[2], extra, before.count("\n") + 2, tuple(others.split())
        )


def distributions(requirement: str) -> dict[str, importlib.metadata.Distribution]:
    """The packages that pip would install for a requirement, by name, as this Python has them."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen = set()
    left = [Requirement(requirement)]
    while left:
        wanted = left.pop()
        for extra in wanted.extras or {""}:
            name = wanted.name.lower().replace("_", "-")
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found[name] = importlib.metadata.distribution(name)
            for line in found[name].requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    left.append(needed)
    return found


def environment(directory: Path, *requirements: str) -> Path:
    """The ``bin`` of a virtual environment that links to this Python's packages for the requirements."""
    venv.create(directory, symlinks=True, with_pip=False)
    site = next(directory.glob("lib/python*/site-packages"))
    commands = directory / "bin"
    wanted = {name: found for requirement in requirements for name, found in distributions(requirement).items()}
    for distribution in wanted.values():
        files = distribution.files or ()
        for name in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(name)))
            if source.exists() and not (site / name).exists():
                (site / name).symlink_to(source)
        for entry in distribution.entry_points.select(group="console_scripts"):
            code = f"import sys; from {entry.module} import {entry.attr} as run; sys.exit(run())"
            # As a script has it, the working directory is not on the path.
            write_command(commands / entry.name, f'exec "{commands}/python" -P -c "{code}" "$@"')
    return commands


def write_command(path: Path, line: str) -> None:
    """An executable shell script of one line."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@dataclass(frozen=True)
class Place:
    """A place where snippets run.

    Parameters
    ----------
    commands, tools : Path
        First on PATH, before the system's.
    directory : Path
    """

    commands: Path
    tools: Path
    directory: Path

    @contextmanager
    def started(self, snippet: Snippet) -> Iterator[tuple[subprocess.Popen, IO[bytes]]]:
        """A running snippet. Afterwards all processes that it has started are ended."""
        # HOME is not there: nothing of the user's settings counts. OMP_WAIT_POLICY leaves the CPUs to other tests.
        variables = {"PATH": f"{self.commands}:{self.tools}:/usr/local/bin:/usr/bin:/bin", "OMP_WAIT_POLICY": "passive"}
        if "TMPDIR" in os.environ:
            variables["TMPDIR"] = os.environ["TMPDIR"]
        shell = ["bash", "-euo", "pipefail", "-c"]
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [*(["python", "-c"] if snippet.language == "python" else shell), snippet.text],
                cwd=self.directory,
                env=variables,
                executable=shutil.which("python" if snippet.language == "python" else "bash", path=variables["PATH"]),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                yield process, said
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def run(self, snippet: Snippet, seconds: float) -> str:
        """Run a snippet as it is printed, and return its output. It fails after `seconds`."""
        with self.started(snippet) as (process, file):
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            file.seek(0)
            said = file.read().decode(errors="replace")
            status = process.returncode
        assert status == 0, f"line {snippet.line}, status {status}:\n{snippet.text}\n{said}"
        return said


def ignored(root: Path, *others: str) -> Callable[[str, list[str]], set[str]]:
    """Leave out of `shutil.copytree` all that git does not track, and `others` at the top."""

    def choose(directory: str, names: list[str]) -> set[str]:
        top = {"build", "dist", *others} if Path(directory) == root else set()
        return {name for name in names if name.startswith(".") or name == "__pycache__" or name in top}

    return choose
