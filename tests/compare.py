"""Results against a float64 reference."""

from __future__ import annotations

import numpy as np

from dsa_tvm.benchmark.check import compare
from dsa_tvm.spec import OpSpec, Tolerance


def tolerance_of(spec: OpSpec, output: str, dtype: str, device: str = "cpu") -> Tolerance | None:
    """The tolerance of an output, by the element type of the first input; None for indices.

    On CPUs logits have the tolerance of float32 for every element type. Tensor cores that multiply fp8 sum less
    precisely.
    """
    exact = output == "logits" and device == "cpu"
    return spec.tolerance.get(output, {}).get("float32" if exact else dtype)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance | None) -> None:
    """Raise `AssertionError` unless `actual` is `expected` within `tolerance`. Without one the two must be equal."""
    if tolerance is not None:
        compare("result", actual, expected, tolerance)
        return
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    wrong = np.argwhere(actual != expected)
    assert not len(wrong), f"{len(wrong)} of {actual.size} differ, the first at {tuple(wrong[0])}"
