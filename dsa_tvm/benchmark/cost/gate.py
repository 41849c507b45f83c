"""Nothing is timed before it has computed what Transformers' eager attention computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..check import CheckError

#: Largest difference of outputs that is allowed, of the largest number in them.
_ALLOWED = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 5e-3}
#: Of the scores of a query: keys that two selections do not share have scores that differ by no more.
_TIE = 1e-5


def compare(results: Mapping[str, Mapping[str, Any]], dtype: str) -> str:
    """Compare every method with eager attention, on a short prompt and some steps behind it.

    Parameters
    ----------
    results : mapping
        What `Contender.checked` returned, by method; "eager" among them.
    dtype : str

    Returns
    -------
    str
        A line that says what was found.

    Raises
    ------
    CheckError
        Another output, or a selection that differs by more than ties.
    """
    expected, allowed = results["eager"], _ALLOWED[dtype]
    largest, ties = 0.0, 0
    for method, result in results.items():
        for out in result["all"]:
            largest = max(largest, _difference(method, out, expected["all"][0], allowed))
        if "some" in result:
            same = (result["selected"] == expected["selected"]).all(-1)
            if "scores" in result:
                ties += _count_ties(method, result, expected, same)
            largest = max(largest, _difference(method, result["some"][0][same], expected["some"][0][same], allowed))
    said = f"checked against eager: outputs differ by at most {largest:.1e} of the largest (allowed {allowed:g})"
    return said + (f"; {ties} queries select other keys of equal scores" if ties else "")


def _difference(method: str, out: np.ndarray, expected: np.ndarray, allowed: float) -> float:
    if not len(expected):
        return 0.0
    found = float(np.abs(out - expected).max() / np.abs(expected).max())
    if not found <= allowed:  # NaN, too
        raise CheckError(
            f"cost: {method}: expected the outputs of eager attention, got ones that differ by {found:.1e}"
        )
    return found


def _count_ties(method: str, result: Mapping[str, Any], expected: Mapping[str, Any], same: np.ndarray) -> int:
    """How many queries select other keys than eager attention, all of them by ties; `CheckError` where one is none."""
    for query in np.flatnonzero(~same):
        scores = result["scores"][query]
        others = scores[result["selected"][query] != expected["selected"][query]]
        spread = float(others.max() - others.min())
        if not spread <= _TIE * float(np.abs(scores[np.isfinite(scores)]).max(initial=0)):
            raise CheckError(
                f"cost: {method}: expected the keys that eager attention selects, got others for query {query}, "
                f"whose scores differ by {spread:.1e}"
            )
    return int((~same).sum())
