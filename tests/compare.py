"""Results against a float64 reference."""

from __future__ import annotations

import numpy as np

from dsa_tvm.spec import OpSpec, Tolerance


def tolerance_of(spec: OpSpec, output: str, dtype: str, device: str = "cpu") -> Tolerance | None:
    """What an output of an operator may differ by, by the element type of its first input; None for indices.

    Tensor cores that multiply fp8 make sums that are less precise than those of float32, which all others hold to.
    """
    exact = output == "logits" and device == "cpu"
    return spec.tolerance.get(output, {}).get("float32" if exact else dtype)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance | None) -> None:
    """Raise `AssertionError` unless `actual` is `expected` within `tolerance`.

    Positions of NaN and of either infinity must be equal first; then every ``|err| <= abs + rel * |expected|``; then
    the cosine difference over all finite elements. Without a tolerance the two must be equal.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if tolerance is None:
        wrong = np.argwhere(actual != expected)
        assert not len(wrong), f"{len(wrong)} of {actual.size} differ, the first at {tuple(wrong[0])}"
        return
    x, y = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    for name in ("isnan", "isposinf", "isneginf"):
        test = getattr(np, name)
        wrong = np.argwhere(test(x) != test(y))
        assert not len(wrong), f"{name} differs, the first at {tuple(wrong[0])}"
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    excess = np.abs(x - y) - (tolerance.abs + tolerance.rel * np.abs(y))
    assert not (excess > 0).any(), (
        f"{(excess > 0).sum()} of {excess.size} beyond the tolerance, the worst {x[excess.argmax()]}, "
        f"expected {y[excess.argmax()]}"
    )
    difference = cosine_difference(x, y)
    assert difference <= tolerance.cos, f"cosine difference {difference}, expected at most {tolerance.cos}"


def cosine_difference(x: np.ndarray, y: np.ndarray) -> float:
    """``1 - 2 x.y / (x.x + y.y)``: 0 for equal arrays, and unlike an angle it also sees a difference in length."""
    total = np.sum(x * x + y * y)
    # The same number, without the cancellation.
    return float(np.sum((x - y) ** 2) / total) if total else 0.0
