"""Draw how a search went, as text and as a PNG: the best speedup so far over the number of trials."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise

#: Characters of 3 x 5 pixels: one digit for each row, whose three bits are the pixels from left to right.
_GLYPHS = {
    "0": "75557",
    "1": "26227",
    "2": "71747",
    "3": "71717",
    "4": "55711",
    "5": "74717",
    "6": "74757",
    "7": "71111",
    "8": "75757",
    "9": "75717",
    ".": "00002",
}


def as_text(speedups: Sequence[float], width: int = 72, height: int = 12) -> list[str]:
    """The lines of a plot. It starts at 1, the speed of DEFAULT.

    Parameters
    ----------
    speedups : sequence of float
        The speedups of the trials in order, at least one; 0 for a trial that failed.
    width, height : int
        Size of the plot in characters, without its axes.
    """
    columns = min(width, len(speedups))
    best, high = _sampled(speedups, columns)
    levels = [_level(value, high, height) for value in best]
    lines = []
    for row in reversed(range(height)):
        marks = "".join("*" if level == row else " " for level in levels)
        lines.append(f"{1 + row * (high - 1) / (height - 1):6.3f} |{marks}".rstrip())
    return [*lines, f"{'':6} +{'-' * columns}", f"{'':8}1{len(speedups):>{max(columns - 1, 2)}} trials"]


def as_png(speedups: Sequence[float], width: int = 640, height: int = 360) -> bytes:
    """The same plot as a picture, with the speedups beside the grid and the number of trials below."""
    left, bottom = 56, 24
    image = [bytearray(b"\xff" * width) for _ in range(height)]

    def write(text: str, x: int, y: int, scale: int = 2) -> None:
        for i, glyph in enumerate(text):
            for row, bits in enumerate(_GLYPHS[glyph]):
                for column in range(3):
                    if int(bits) >> (2 - column) & 1:
                        at = x + (4 * i + column) * scale
                        for line in image[y + row * scale : y + (row + 1) * scale]:
                            line[at : at + scale] = b"\0" * scale

    best, high = _sampled(speedups, width - left)
    rows = height - bottom
    for tick in range(5):
        value = 1 + tick * (high - 1) / 4
        y = rows - 1 - _level(value, high, rows - 10)
        image[y][left:] = b"\xcc" * (width - left)
        write(f"{value:.3f}", 6, y - 5)
    heights = [rows - 1 - _level(value, high, rows - 10) for value in best]
    for x, (before, now) in enumerate(pairwise([heights[0], *heights])):
        for y in range(now - 1, before + 1):
            image[y][left + x] = 0
    write("1", left, rows + 8)
    write(str(len(speedups)), width - 8 * len(str(len(speedups))), rows + 8)
    # Eight bits of grey. Each row begins with the number of its filter; 0 means no filter.
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line for line in image))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _sampled(speedups: Sequence[float], columns: int) -> tuple[list[float], float]:
    """The best so far at the end of each column, and the top of the axis."""
    best = list(accumulate(speedups, max, initial=1.0))[1:]
    # The axis ends above 1, so that a flat line is at the bottom.
    return [best[-(-(i + 1) * len(best) // columns) - 1] for i in range(columns)], max(best[-1], 1.01)


def _level(value: float, high: float, steps: int) -> int:
    return round((value - 1) / (high - 1) * (steps - 1))
