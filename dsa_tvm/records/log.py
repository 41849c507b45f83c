"""Tuning logs: records as checksummed lines of ``<directory>/<target>/<op>.jsonl``.

Several jobs may write to one log at a time, and each may be killed at any instant: at most the line that was being
written is lost. A reader leaves out lines that are damaged, foreign or implausible, reports them, and goes on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import RecordError
from ..runtime import package_files
from . import journal
from .record import KINDS, Record, canonical, digest, expect

#: The version of the format.
VERSION = 1
_FIELDS = tuple(field.name for field in fields(Record))
_BY_THREADS = ("seconds", "default_seconds", "roof")


def line_of(record: Record) -> str:
    """A record as a line of a log, without the newline. `parse` turns it back into an equal record."""
    document: dict[str, Any] = {"v": VERSION} | {name: getattr(record, name) for name in _FIELDS}
    for name in ("shape", "decisions", "versions"):
        document[name] = dict(document[name])
    for name in _BY_THREADS:
        document[name] = {str(threads): value for threads, value in document[name].items()}
    return canonical(document | {"sum": digest(document)})


def parse(line: str | bytes) -> Record:
    """Read a record from a line of a log.

    Parameters
    ----------
    line : str or bytes
        The line without its newline.

    Returns
    -------
    Record

    Raises
    ------
    RecordError
        The line differs from what `line_of` writes, or says something that cannot be true.
    """
    if not line.strip():
        raise RecordError("blank line")
    if len(line) > journal.MAX_LINE:
        raise RecordError(f"longer than {journal.MAX_LINE} bytes")
    try:
        text = line if isinstance(line, str) else line.decode("ascii")
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        stated = document.pop("sum", None)
        computed = digest(document)
    # Brackets that are nested a thousand deep raise a RecursionError.
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not a JSON record: {error}") from error
    version = document.get("v")
    expect(type(version) is int and version == VERSION, "version", str(VERSION), version)
    expect(stated == computed, "checksum", computed, stated)
    # JSON has many spellings of one value, and a flipped bit may turn one into another: 1e-5 into 1E-5.
    expect(canonical(document | {"sum": stated}) == text, "spelling", "canonical JSON", text)
    del document["v"]
    expect(document.keys() == set(_FIELDS), "fields", ", ".join(_FIELDS), sorted(document))
    for name in _BY_THREADS:
        document[name] = _by_threads(document[name])
    document["types"] = _as_tuple(document["types"])
    return Record(**document)


@dataclass(frozen=True)
class Damage:
    """A line that is left out, and the reason. Line 0 stands for the whole file."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Log:
    """The records of one operator on one target.

    Parameters
    ----------
    path : Path
        ``<directory>/<target>/<op>.jsonl``; it need not exist.
    """

    path: Path

    @property
    def place(self) -> tuple[str, str]:
        """Target and operator, from the path."""
        path = Path(os.path.abspath(self.path))
        return path.parent.name, path.stem

    def append(self, record: Record) -> None:
        """Append a record. It is on the disk when this returns. Several threads and processes may append at a time.

        Raises
        ------
        RecordError
            The record has another target or operator, or the file cannot be written. The log is as it was before.
        """
        line = line_of(record).encode()
        self._expect_own(record)
        expect(len(line) <= journal.MAX_LINE, "record", f"at most {journal.MAX_LINE} bytes", len(line))
        try:
            journal.append(self.path, line)
        except OSError as error:
            raise RecordError(f"{self.path}: expected a file that can be written, got {error}") from error

    def expect_writable(self) -> None:
        """Find out before long work whether `append` will succeed.

        Raises
        ------
        RecordError
            The file cannot be written, or the disk is full.
        """
        try:
            journal.expect_appendable(self.path)
        except OSError as error:
            raise RecordError(f"{self.path}: expected a file that can be written, got {error}") from error

    def read(self) -> tuple[list[Record], list[Damage]]:
        """The records in the order of the file, and the lines that are left out.

        This never raises. A file that cannot be read is damage at line 0. A file that does not exist has no records.
        """
        records: list[Record] = []
        damage: list[Damage] = []
        try:
            self._sift(journal.lines(self.path), records, damage)
        except FileNotFoundError:
            pass
        except OSError as error:
            damage.append(Damage(self.path, 0, f"cannot be read: {error}"))
        return records, damage

    def _sift(self, lines: Iterable[bytes], records: list[Record], damage: list[Damage]) -> None:
        for number, line in enumerate(lines, 1):
            try:
                record = parse(line)
                self._expect_own(record)
            except RecordError as error:
                damage.append(Damage(self.path, number, str(error)))
            else:
                records.append(record)

    def _expect_own(self, record: Record) -> None:
        place = (record.target, record.op)
        expect(place == self.place, "target and operator", " ".join(self.place), " ".join(place))


def merge(sources: Iterable[Path], destination: Path, kinds: Collection[str] = KINDS) -> tuple[int, list[Damage]]:
    """Add the lines of other logs to a log, each line once.

    The log's own lines come first, and all lines stay in order. The log is replaced as a whole. Lines that are appended
    to it meanwhile are kept.

    Parameters
    ----------
    sources : iterable of Path
        Logs of the same operator and target.
    destination : Path
    kinds : collection of str
        Only records of these kinds are added.

    Returns
    -------
    int
        How many lines were added.
    list of Damage
        The lines that were left out, including those of the destination.

    Raises
    ------
    RecordError
        A source has another target or operator, or the destination cannot be written and is as it was before.
    """
    log = Log(destination)
    found: list[Record] = []
    damage: list[Damage] = []
    for source in map(Log, sources):
        expect(source.place == log.place, f"{source.path}: place", " ".join(log.place), " ".join(source.place))
        records, left_out = source.read()
        found += [record for record in records if record.kind in kinds]
        damage += left_out
    added = 0

    def union(lines: Iterator[bytes]) -> bytes:
        nonlocal added
        own: list[Record] = []
        log._sift(lines, own, damage)
        # A dict, because a set has no order.
        mine = dict.fromkeys(map(line_of, own))
        both = mine | dict.fromkeys(map(line_of, found))
        added = len(both) - len(mine)
        return "".join(f"{line}\n" for line in both).encode()

    try:
        journal.rewrite(destination, union)
    except OSError as error:
        raise RecordError(f"{destination}: expected a file that can be written, got {error}") from error
    return added, damage


def logs(directory: Path) -> list[Log]:
    """All logs in a directory."""
    expect(directory.is_dir(), "tuning logs", "a directory", str(directory))
    return [Log(path) for path in sorted(directory.glob("*/*.jsonl"))]


def read_directory(directory: Path) -> tuple[list[Record], list[Damage]]:
    """Read all logs in a directory, see `Log.read`."""
    read = [log.read() for log in logs(directory)]
    return [r for records, _ in read for r in records], [d for _, damage in read for d in damage]


def default_directory() -> Path:
    """The logs that come with the package."""
    return package_files.find("tuning_logs")


def _as_tuple(value: Any) -> Any:
    """A JSON array as a tuple. Anything else is returned unchanged, and `Record` refuses it."""
    return tuple(value) if isinstance(value, list) else value


def _by_threads(value: Any) -> Any:
    """A JSON object with its keys as numbers. Anything else is returned unchanged, and `Record` refuses it."""
    if not isinstance(value, dict) or not all(re.fullmatch("[1-9][0-9]{0,9}", key) for key in value):
        return value
    return {int(key): _as_tuple(item) for key, item in value.items()}
