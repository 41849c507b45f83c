"""What the selection for every device starts from: finals that have times, by size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar

from ...ops import OPS
from ..record import Record, as_key

#: A finalist may have been this much slower than DEFAULT at some number of threads: repeated measurements differ so.
SLOWER = 0.01

Size = TypeVar("Size")


def latest(records: Iterable[Record], size_of: Callable[[Record], Size]) -> dict[Size, list[Record]]:
    """The finals that have times, by size. Of equal decisions at one size only the latest final counts.

    Parameters
    ----------
    records : iterable of Record
        All of one kernel. Trials and failures are left out.
    size_of : callable
        The size that a record counts for.
    """
    found: dict[Size, dict[tuple, Record]] = {}
    for record in records:
        if record.kind == "final" and record.error is None:
            by_decisions = found.setdefault(size_of(record), {})
            known = by_decisions.get(as_key(record.decisions))
            if known is None or known.date <= record.date:
                by_decisions[as_key(record.decisions)] = record
    return {size: list(by_decisions.values()) for size, by_decisions in found.items()}


def has_lengths(record: Record, lengths: Mapping[str, int], free: Collection[str] = ("s_q", "s_kv")) -> bool:
    """Whether a record was measured with the lengths of a model, apart from those in `free`."""
    return all(record.shape[name] == lengths[name] for name in OPS[record.op].dims if name not in free)


def keeps_up(record: Record) -> bool:
    """Whether the candidate was not clearly slower than DEFAULT at any number of threads."""
    return min(record.speedups.values()) * (1 + SLOWER) >= 1


def in_words(decisions: Mapping[str, int] | None) -> str:
    """Decisions as ``name=value``; ``DEFAULT`` for None."""
    return "DEFAULT" if decisions is None else " ".join(f"{name}={value}" for name, value in sorted(decisions.items()))
