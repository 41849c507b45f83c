"""Integers that a caller passes: from Python, NumPy or torch, but no number that would have to be rounded."""

from __future__ import annotations

import operator
from typing import Any

from ..errors import ArgumentError


def as_integer(op: str, name: str, value: Any) -> int:
    """Convert the argument `name` of `op` to an int.

    Raises
    ------
    ArgumentError
        `value` is not an integer.
    """
    try:
        return operator.index(value)
    except TypeError as error:  # an array of several elements has an __index__ that raises
        got = "None" if value is None else type(value).__name__
        raise ArgumentError(f"{op}: {name}: expected int, got {got}") from error
