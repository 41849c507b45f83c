"""Text for terminals: aligned columns, numbers with three digits, and sizes that users write."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table. The first column is aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [aligned(row, widths) for row in (header, *rows)]


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table."""
    padded = [c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(padded).rstrip()


def digits(value: float) -> str:
    """A number with three significant digits, without an exponent from 0.001 on."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value >= 0.001 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """A time in seconds, milliseconds or microseconds."""
    units = (("s", 1.0), ("ms", 1e3), ("us", 1e6))
    unit, factor = next((u for u in units if seconds * u[1] >= 1), units[-1])
    return f"{digits(seconds * factor)} {unit}"


def size_of(text: str) -> tuple[int, int] | None:
    """The two lengths of a size such as ``1x32768``; None if `text` is something else."""
    left, _, right = text.partition("x")
    # Python refuses to read numbers of thousands of digits.
    if not all(n.isdecimal() and len(n) <= 10 for n in (left, right)):
        return None
    return int(left), int(right)
