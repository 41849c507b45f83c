"""A tuning record: one measured candidate, and the checks that it is plausible."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import reprlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..errors import RecordError
from ..ops import OPS
from ..spec import DIMS, INT32_MAX

KINDS = ("trial", "final")
#: The format of `Record.date`, in UTC.
DATE_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
#: Times that are plausible: no clock resolves the first, and no kernel takes as long as the last.
PLAUSIBLE_SECONDS = (1e-9, 1e4)
#: The least share of the roof that a median may take. A CPU above its nominal clock explains no more than that.
ROOF_SHARE = 0.8


@dataclass(frozen=True)
class Record:
    """One measured candidate.

    Parameters
    ----------
    kind : str
        "trial" for a measurement during the search, "final" for a finalist that was measured again at its end.
    op : str
        A key of `OPS`.
    spec : str
        The `spec_hash` of the operator.
    types : tuple of str
        Element types of the operator's type variables, in order.
    target : str
        The target that the candidate was compiled for, such as ``x86-64-v4``.
    shape : mapping
        Every length of the operator by dimension name.
    decisions : mapping
        The candidate: parameters of the kernel factory by name.
    seconds, default_seconds : mapping
        By number of threads: the run times of the candidate and of the DEFAULT decisions, measured in turns.
    roof : mapping
        By number of threads: the least seconds that the arithmetic or the memory of the machine allows.
    error : str or None
        Why the candidate has no times. Such a record is kept, so that the candidate is not tried again.
    machine : str
        CPU model and count, or the key of a fleet.
    versions : mapping
        Versions of the packages that took part.
    date : str
        In the format `DATE_FORMAT`.

    Raises
    ------
    RecordError
        A field has another type, or a value that cannot be true.
    """

    kind: str
    op: str
    spec: str
    types: tuple[str, ...]
    target: str
    shape: Mapping[str, int]
    decisions: Mapping[str, int]
    seconds: Mapping[int, tuple[float, ...]]
    default_seconds: Mapping[int, tuple[float, ...]]
    roof: Mapping[int, float]
    error: str | None
    machine: str
    versions: Mapping[str, str]
    date: str

    def __post_init__(self) -> None:
        expect(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", self.kind)
        expect(isinstance(self.op, str) and self.op in OPS, "op", f"one of {', '.join(OPS)}", self.op)
        expect(self.spec == (spec := spec_hash(self.op)), f"of another spec of {self.op}", spec, self.spec)
        variants = [tuple(variant.values()) for variant in OPS[self.op].variants]
        expect(self.types in variants, "types", f"one of {variants}", self.types)
        expect(_is_name(self.target), "target", "a name without spaces or slashes", self.target)
        dims = OPS[self.op].dims
        expect(_is_map(self.shape, dims.__contains__, _is_int), "shape", f"whole {', '.join(dims)}", self.shape)
        for name in dims:
            length = self.shape.get(name, -1)
            expect(DIMS[name].admits(length), f"shape: {name}", DIMS[name].range, length)
        expect(_is_map(self.decisions, _is_name, _is_int), "decisions", "names and whole numbers", self.decisions)
        expect(len(self.decisions) > 0, "decisions", "at least one", self.decisions)
        expect(self.error is None or _is_text(self.error), "error", "None or a reason", self.error)
        self._check_times()
        expect(_is_printable(self.machine), "machine", "a printable name", self.machine)
        expect(_is_map(self.versions, _is_printable, _is_printable), "versions", "those of packages", self.versions)
        expect(_is_date(self.date), "date", DATE_FORMAT, self.date)

    def _check_times(self) -> None:
        measured = {"seconds": self.seconds, "default_seconds": self.default_seconds}
        for name, times in measured.items():
            low, high = PLAUSIBLE_SECONDS
            expect(_is_map(times, _is_threads, _is_times), name, f"threads and times in {low}..{high} s", times)
        expect(_is_map(self.roof, _is_threads, _is_seconds), "roof", "threads and seconds", self.roof)
        if self.error is not None:
            expect(not self.seconds, "seconds", "none beside an error", self.seconds)
            return
        expect(len(self.seconds) > 0, "seconds", "some where there is no error", self.seconds)
        for name, values in {"default_seconds": self.default_seconds, "roof": self.roof}.items():
            expect(values.keys() == self.seconds.keys(), name, f"threads {sorted(self.seconds)}", sorted(values))
        for name, times in measured.items():
            for threads, least in self.roof.items():
                # If a time is below what the machine can reach, a clock was wrong or a kernel skipped work.
                expected = f"a median of at least {ROOF_SHARE} x {least:.3g} s, the roof of {threads} threads"
                expect((got := statistics.median(times[threads])) >= ROOF_SHARE * least, name, expected, got)

    @property
    def speedup(self) -> float:
        """Speedup over DEFAULT: the geometric mean over the numbers of threads; 0 if there are no times."""
        ratios = self.speedups.values()
        return statistics.geometric_mean(ratios) if ratios else 0.0

    @property
    def speedups(self) -> dict[int, float]:
        """Speedup over DEFAULT for each number of threads."""
        median = statistics.median
        return {n: median(self.default_seconds[n]) / median(taken) for n, taken in sorted(self.seconds.items())}

    @property
    def key(self) -> tuple:
        """What identifies the measurement: everything but its result and its date."""
        return (self.kind, self.op, self.types, self.target, as_key(self.shape), as_key(self.decisions), self.machine)


@functools.cache
def spec_hash(op: str) -> str:
    """A hash of the parts of an operator that its records depend on: names, shapes, types and bounds of lengths.

    The served lengths and element types do not count, because builds and later versions of this package may serve
    more, and a record names those that it was measured with.

    Returns
    -------
    str
        16 hex digits.

    Raises
    ------
    RecordError
        No operator has this name.
    """
    expect(op in OPS, "op", f"one of {', '.join(OPS)}", op)
    spec = OPS[op]
    tensors = [[t.name, t.dtype, t.shape, t.optional] for t in (*spec.inputs, *spec.outputs)]
    dims = [[d.name, d.minimum, d.maximum, d.multiple, d.at_most] for d in map(DIMS.__getitem__, spec.dims)]
    attrs = [[a.name, a.kind.__name__, a.dim] for a in spec.attrs]
    return digest([spec.name, len(spec.inputs), tensors, dims, attrs])


def as_key(numbers: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Lengths or decisions as a key that can be looked up and compared."""
    return tuple(sorted(numbers.items()))


def canonical(document: Any) -> str:
    """`document` as ASCII JSON with sorted keys and no spaces. NaN and infinities raise a ValueError."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(document: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON document."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()[:16]


def expect(holds: bool, field: str, expected: str, got: object) -> None:
    """Raise a RecordError that names the field, unless `holds`."""
    if not holds:
        raise RecordError(f"{field}: expected {expected}, got {reprlib.repr(got)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_printable(value: Any) -> bool:
    return _is_text(value) and value.isprintable()


def _is_name(value: Any) -> bool:
    return _is_text(value) and re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", value) is not None


def _is_date(value: Any) -> bool:
    try:
        return datetime.strptime(value, DATE_FORMAT).strftime(DATE_FORMAT) == value
    except (TypeError, ValueError):
        return False


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= INT32_MAX


def _is_threads(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_seconds(value: Any) -> bool:
    # Comparisons are false for NaN and cannot overflow.
    return (type(value) is int or isinstance(value, float)) and 0 < value < PLAUSIBLE_SECONDS[1]


def _is_times(value: Any) -> bool:
    return (
        isinstance(value, tuple) and len(value) > 0 and all(_is_seconds(x) and x >= PLAUSIBLE_SECONDS[0] for x in value)
    )


def _is_map(value: Any, is_key: Callable[[Any], bool], is_value: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(is_key(key) and is_value(item) for key, item in value.items())
