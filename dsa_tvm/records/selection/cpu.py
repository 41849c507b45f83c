"""Choose the decisions that a library is built with on CPUs: few kernels, each for sizes where it is clearly faster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ...errors import ArgumentError
from ...ops import OPS
from ...spec import INT32_MAX
from ..record import Record, as_key
from .finals import has_lengths, in_words, keeps_up, latest

#: The sizes at which finalists are measured, as s_q to s_kv. Each stands for the sizes around it.
BUCKETS: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    "lightning_indexer": {1: (2048, 32768, 131072), 16: (2048, 32768, 131072), 128: (2048, 32768)},
    "topk": {1: (4096, 32768, 131072), 16: (4096, 32768, 131072)},
    "sparse_mla": {1: (2048, 32768), 16: (32768,), 128: (32768,)},
}
#: A further kernel makes the library larger. It has to be this much faster for some bucket than those already chosen.
WORTH = 0.03

Bucket = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """Decisions for calls with at most these lengths that no earlier row serves."""

    s_q_max: int
    s_kv_max: int
    decisions: Mapping[str, int]


@dataclass(frozen=True)
class Choice:
    """The decisions for one bucket.

    Parameters
    ----------
    s_q, s_kv : int
        The bucket.
    s_q_max, s_kv_max : int
        The largest lengths that it stands for.
    record : Record or None
        The final of the chosen decisions at this bucket; None for DEFAULT.
    why : str
        The reason, for a person to read.
    """

    s_q: int
    s_kv: int
    s_q_max: int
    s_kv_max: int
    record: Record | None
    why: str


def choose(op: str, records: Iterable[Record], default: Mapping[str, int], lengths: Mapping[str, int]) -> list[Row]:
    """Make the rows of a library's table for one operator.

    Parameters
    ----------
    op : str
        A key of `BUCKETS`.
    records : iterable of Record
        The finals of `op` among them must be of one target and one choice of element types.
    default : mapping
        The DEFAULT decisions of the kernel. Finals with other parameters than these are left out.
    lengths : mapping
        Lengths other than s_q and s_kv that the finals were measured with, for example those of a preset.

    Returns
    -------
    list of Row
        The first row with ``s_q <= s_q_max and s_kv <= s_kv_max`` has the decisions for a call. Every call has one.

    Raises
    ------
    ArgumentError
        `op` has no buckets, a length is missing, or there are finals of several targets or element types.
    """
    groups: list[list[Row]] = []
    for _, group in groupby(choices(op, records, default, lengths), lambda choice: choice.s_q):
        rows = [Row(c.s_q_max, c.s_kv_max, dict(c.record.decisions) if c.record else dict(default)) for c in group]
        rows = [row for row, after in zip(rows, [*rows[1:], None], strict=True) if _differ(row, after)]
        previous = groups[-1] if groups else []
        if [(row.s_kv_max, row.decisions) for row in previous] == [(row.s_kv_max, row.decisions) for row in rows]:
            # Both s_q have the same decisions for every s_kv, so the rows of the larger one serve both.
            groups.pop()
        groups.append(rows)
    return [row for rows in groups for row in rows]


def choices(
    op: str, records: Iterable[Record], default: Mapping[str, int] | None, lengths: Mapping[str, int]
) -> list[Choice]:
    """The choice for every bucket, with its reason, in the order of `BUCKETS`.

    Parameters and errors are those of `choose`. Without `default`, finals with any parameters take part.
    """
    measured = by_size(op, records, lengths)
    usable: dict[Bucket, list[Record]] = {
        bucket: [r for r in found if keeps_up(r) and (default is None or _replaces(r.decisions, default))]
        for bucket, found in measured.items()
    }
    held = _cover(usable)
    found = []
    for s_q, s_q_max in _with_bounds(list(BUCKETS[op])):
        for s_kv, s_kv_max in _with_bounds(BUCKETS[op][s_q]):
            candidates = usable[s_q, s_kv]
            best = max((r for r in candidates if as_key(r.decisions) in held), key=lambda r: r.speedup, default=None)
            if best and best.speedup <= 1:
                best = None
            why = _why(best, candidates, len(measured[s_q, s_kv]))
            found.append(Choice(s_q, s_kv, s_q_max, s_kv_max, best, why))
    return found


def explain(
    op: str, records: Iterable[Record], lengths: Mapping[str, int], default: Mapping[str, int] | None = None
) -> list[str]:
    """`choices` in words: one line for each bucket."""
    told = []
    for choice in choices(op, records, default, lengths):
        limit = " x ".join(str(n) if n < INT32_MAX else "any" for n in (choice.s_q_max, choice.s_kv_max))
        what = in_words(choice.record.decisions if choice.record else None)
        told.append(f"{op} {choice.s_q} x {choice.s_kv} (to {limit}): {what}; {choice.why}")
    return told


def by_size(op: str, records: Iterable[Record], lengths: Mapping[str, int]) -> dict[Bucket, list[Record]]:
    """The finals of every bucket of `op` that have times. Of equal decisions only the latest final counts.

    A final that was measured at another size belongs to the bucket that serves that size.

    Parameters and errors are those of `choose`.
    """
    if op not in BUCKETS:
        raise ArgumentError(f"op: expected one of {', '.join(BUCKETS)}, got {op!r}")
    needed = [name for name in OPS[op].dims if name not in ("s_q", "s_kv")]
    if not lengths.keys() >= set(needed):
        raise ArgumentError(f"{op}: lengths: expected {', '.join(needed)}, got {dict(lengths)}")
    own = [r for r in records if (r.op, r.kind, r.error) == (op, "final", None) and has_lengths(r, lengths)]
    places = {(record.target, *record.types) for record in own}
    if len(places) > 1:
        raise ArgumentError(f"{op}: records: expected one target and choice of element types, got {sorted(places)}")
    found = latest(own, lambda record: bucket_of(op, record.shape["s_q"], record.shape["s_kv"]))
    return {bucket: found.get(bucket, []) for bucket in buckets(op)}


def stage_of(op: str, lengths: Mapping[str, int], target: str, types: Sequence[str]) -> str:
    """The empty name: on CPUs, an operator has one kernel to tune."""
    return ""


def buckets(op: str) -> list[Bucket]:
    """Every bucket of an operator, in the order of `BUCKETS`."""
    return [(s_q, s_kv) for s_q, row in BUCKETS[op].items() for s_kv in row]


def bucket_of(op: str, s_q: int, s_kv: int) -> Bucket:
    """The bucket that serves a size."""
    row = next(row for row, most in _with_bounds(list(BUCKETS[op])) if s_q <= most)
    return row, next(column for column, most in _with_bounds(BUCKETS[op][row]) if s_kv <= most)


def _cover(usable: Mapping[Bucket, Sequence[Record]]) -> set[tuple]:
    """Choose decisions to hold beside DEFAULT, greedily: first those with the largest gain over all buckets."""
    speedups = {(as_key(r.decisions), bucket): r.speedup for bucket, found in usable.items() for r in found}
    # Sorted, so that ties are resolved in the same way each time.
    names = sorted({name for name, _ in speedups})
    reached = dict.fromkeys(usable, 1.0)
    held: set[tuple] = set()
    while True:
        ratios = {n: [speedups.get((n, b), 0.0) / reached[b] for b in usable] for n in names}
        worthy = [name for name in names if max(ratios[name]) >= 1 + WORTH]
        if not worthy:
            return held
        best = max(worthy, key=lambda n: sum(math.log(r) for r in ratios[n] if r > 1))
        held.add(best)
        reached = {b: max(reached[b], speedups.get((best, b), 0.0)) for b in usable}


def _why(chosen: Record | None, candidates: Sequence[Record], measured: int) -> str:
    if not measured:
        return "nothing was measured there"
    if not candidates:
        return f"none of {measured} finals there has these parameters and is nowhere slower"
    best = max(r.speedup for r in candidates)
    if not chosen:
        if best <= 1:
            return f"none of {measured} finals there is faster"
        return f"the fastest final there is {best:.3f} times as fast, which is not worth a kernel"
    faster = f"{chosen.speedup:.3f} times as fast as DEFAULT"
    return faster if best <= chosen.speedup else f"{faster} ({best:.3f} would need one more kernel)"


def _replaces(decisions: Mapping[str, int], default: Mapping[str, int]) -> bool:
    return decisions.keys() == default.keys() and decisions != default


def _differ(row: Row, after: Row | None) -> bool:
    return after is None or row.decisions != after.decisions


def _with_bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Each size, with the largest size that is nearer to it than to the next one on a logarithmic scale."""
    return list(zip(sizes, [*(math.isqrt(a * b) for a, b in pairwise(sizes)), INT32_MAX], strict=True))
