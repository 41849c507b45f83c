"""A directory of candidates that are built on one machine and measured on another.

``job.json`` lists them. It is a JSON object with a checksum, replaced as a whole after every candidate. So a stopped
build can go on, and damage is noticed. The libraries are beside it.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DsaError
from ..gpu.architectures import is_arch
from ..ops import OPS
from ..presets import Preset
from ..records import as_key, spec_hash
from ..records.record import digest
from ..runtime.files import sha256, write_atomically
from ..runtime.loading import CheckedFile
from ..spec import DIMS, INT32_MAX
from .failures import WorkerError
from .fleet import Remote
from .source import Decisions
from .tasks import Effort, Task
from .workers import Request

_NAME = "job.json"
_FORMAT = "dsa_tvm candidates 1"


@dataclass
class Built:
    """One candidate.

    Parameters
    ----------
    decisions : dict
    file : str
        Name of the library in the directory.
    sha256 : str
        SHA-256 of the file; "" until it is there.
    error : str
        Why it cannot be built, or "".
    """

    decisions: dict[str, int]
    file: str
    sha256: str = ""
    error: str = ""


@dataclass
class Family:
    """The candidates of one kernel, and the sizes to measure them at.

    Parameters
    ----------
    op, stage : str
    types : list of str
    spec : str
        `spec_hash` of the operator.
    shapes : list of [s_q, s_kv]
    default : dict
        DEFAULT of the kernel.
    baseline : Built
        The library of DEFAULT.
    candidates : list of Built
    """

    op: str
    stage: str
    types: list[str]
    spec: str
    shapes: list[list[int]]
    default: dict[str, int]
    baseline: Built
    candidates: list[Built] = field(default_factory=list)


@dataclass
class Contents:
    """What a directory contains.

    Parameters
    ----------
    target : str
        The architecture.
    preset : Preset
    versions : dict
        Packages that took part in the build.
    families : list of Family
    """

    target: str
    preset: Preset
    versions: dict[str, str]
    families: list[Family]

    def save(self, directory: Path) -> None:
        """Replace ``job.json``."""
        document = {"format": _FORMAT, **asdict(self)}
        text = json.dumps({**document, "sum": digest(document)}, indent=1)
        try:
            write_atomically(directory / _NAME, text.encode())
        except OSError as error:
            raise DsaError(f"tune: build-only: expected a directory to write to, got {error}") from error

    def is_built(self, directory: Path, candidate: Built) -> bool:
        """Whether a candidate's library is there and whole."""
        path = directory / candidate.file
        return bool(candidate.sha256) and path.is_file() and sha256(path) == candidate.sha256

    def tasks(self) -> list[Task]:
        """The tasks to measure."""
        return [
            Task(family.op, self.target, self.preset, s_q, s_kv, tuple(family.types))
            for family in self.families
            for s_q, s_kv in family.shapes
        ]


def exists(directory: Path) -> bool:
    """Whether a build has begun in a directory."""
    return (directory / _NAME).exists()


def load(directory: Path) -> Contents:
    """Read ``job.json``.

    Raises
    ------
    DsaError
        It is missing, damaged, or from another version of this package.
    """
    path = directory / _NAME
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(f"a file that is not in the format {_FORMAT!r}")
        stated = document.pop("sum", None)
        if digest(document) != stated:
            raise ValueError("a checksum that does not match")
        del document["format"]
        document["preset"] = _preset(document["preset"])
        _expect_map(document["versions"], str)
        document["families"] = [_family(f, document["target"], document["preset"]) for f in document["families"]]
        contents = Contents(**document)
        if not is_arch(contents.target):
            raise ValueError(f"an unknown architecture: {contents.target!r}")
    # A directory from somebody else may contain anything, so everything is checked.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DsaError(f"tune: expected {path}, made by --build-only, got {error}") from error
    return contents


def _preset(fields: dict[str, Any]) -> Preset:
    # Directories from before presets had a scale lack it. No candidate depends on it.
    preset = Preset(**{"sm_scale": 1.0} | fields)
    for name, length in preset.lengths.items():
        if type(length) is not int or not DIMS[name].admits(length):
            raise ValueError(f"an invalid {name}: {reprlib.repr(length)}")
    if type(preset.sm_scale) is not float or not math.isfinite(preset.sm_scale):
        raise ValueError(f"an invalid sm_scale: {reprlib.repr(preset.sm_scale)}")
    return preset


def _expect_map(value: Any, kind: type) -> None:
    """Check that a value maps names to values of exactly one type."""
    if not (isinstance(value, dict) and all(type(item) is kind for item in value.values())):
        raise ValueError(f"something else than names and {kind.__name__}: {reprlib.repr(value)}")


def _built(fields: dict[str, Any]) -> Built:
    built = Built(**fields)
    _expect_map(built.decisions, int)
    if not all(isinstance(text, str) for text in (built.file, built.sha256, built.error)):
        raise ValueError(f"an invalid candidate: {reprlib.repr(fields)}")
    return built


def _family(fields: dict[str, Any], target: str, preset: Preset) -> Family:
    family = Family(**fields)
    if family.op not in OPS or not isinstance(family.stage, str):
        raise ValueError(f"an unknown operator or stage: {reprlib.repr([family.op, family.stage])}")
    _expect_map(family.default, int)
    family.baseline = _built(fields["baseline"])
    family.candidates = [_built(c) for c in fields["candidates"]]
    for built in (family.baseline, *family.candidates):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.so", built.file):
            raise ValueError(f"a file name that is not in this directory: {built.file!r}")
    if tuple(family.types) not in [tuple(v.values()) for v in OPS[family.op].variants]:
        raise ValueError(f"element types that {family.op} does not have: {family.types}")
    for s_q, s_kv in family.shapes:
        if not all(type(n) is int and 1 <= n <= INT32_MAX for n in (s_q, s_kv)):
            raise ValueError(f"an invalid size: {reprlib.repr([s_q, s_kv])}")
        if Task(family.op, target, preset, s_q, s_kv, tuple(family.types)).stage != family.stage:
            raise ValueError(f"{family.op}: {s_q} x {s_kv}, which is not a size of the stage {family.stage}")
    if family.spec != spec_hash(family.op):
        raise ValueError(f"candidates for another version of {family.op}; this is dsa_tvm {__version__}")
    return family


class Prebuilt:
    """The candidates in a directory, as the `source.Source` of a job that builds none.

    Parameters
    ----------
    directory : Path
    contents : Contents

    Raises
    ------
    DsaError
        A library is missing or damaged.
    """

    def __init__(self, directory: Path, contents: Contents) -> None:
        self._directory = directory
        self.versions: Mapping[str, str] = contents.versions
        self._families = {(f.op, f.stage, tuple(f.types)): f for f in contents.families}
        for family in contents.families:
            for built in (family.baseline, *family.candidates):
                if not built.error and built.sha256 and not contents.is_built(directory, built):
                    raise DsaError(f"tune: expected the library {directory / built.file} as it was built, got another")
            if not family.baseline.sha256:
                raise DsaError(f"tune: {directory}: expected the library of DEFAULT of {family.op}, got none yet")

    def _family(self, task: Task) -> Family:
        return self._families[task.op, task.stage, task.types]

    def default(self, task: Task) -> dict[str, int]:
        """DEFAULT of the task's kernel as plain values."""
        return dict(self._family(task).default)

    def search(self, task: Task, seed: int, batch: int) -> Listed:
        """The candidates of the directory, in order."""
        return Listed([c.decisions for c in self._family(task).candidates if c.sha256 or c.error], batch)

    def libraries(self, task: Task, proposals: Sequence[Decisions]) -> Iterator[tuple[int, Path | WorkerError]]:
        """The libraries of proposals that were built, and the errors of the others."""
        known = {as_key(c.decisions): c for c in self._family(task).candidates}
        for i, decisions in enumerate(proposals):
            built = known[as_key(decisions)]
            yield i, WorkerError("BuildError", built.error) if built.error else self._directory / built.file

    def request(self, task: Task, library: Path, effort: Effort, remote: Remote | None) -> Request:
        """Measure a library in turns with that of DEFAULT. The worker checks both before it loads them."""
        family = self._family(task)
        built = next(c for c in family.candidates if c.file == library.name)
        files = (CheckedFile(str(self._directory / c.file), c.sha256) for c in (family.baseline, built))
        return ("measure", (*files, task, effort))

    def discard(self, library: Path) -> None:
        """Keep it: another machine may measure it too."""


class Listed:
    """Proposes the decisions of a list.

    Parameters
    ----------
    decisions : sequence of mapping
    batch : int
    """

    def __init__(self, decisions: Sequence[Decisions], batch: int) -> None:
        self._left = {as_key(d): dict(d) for d in decisions}
        self._all, self._batch = set(self._left), batch

    def covers(self, decisions: Decisions) -> bool:
        """Whether the decisions are on the list."""
        return as_key(decisions) in self._all

    def ask(self) -> list[dict[str, int]]:
        """The next decisions that are neither told nor skipped."""
        return list(self._left.values())[: self._batch]

    def tell(self, trials: list[tuple[Decisions, float | None]]) -> None:
        """Do not propose these again."""
        for decisions, _ in trials:
            self._left.pop(as_key(decisions), None)

    def skip(self, decisions: Decisions) -> None:
        """Do not propose this again."""
        self._left.pop(as_key(decisions), None)
