"""Checks results: sampled rows against the float64 references.

Our results have to be within the tolerances of the `OpSpec`, those of peers within wider ones. Results may be arrays or
torch tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import functions
from ..errors import DsaError
from ..ops import OPS
from ..runtime.packing import unpack_mla_rows
from ..spec import Tolerance
from .workload import Workload, to_numpy

_LOGITS = OPS["lightning_indexer"]
#: Peers may round products and sums to 16 bits on the way, but have to compute the same.
PEER_LOGITS = Tolerance(abs=2e-2, rel=2e-2, cos=2e-5)
PEER_OUT = Tolerance(abs=1e-2, rel=3.01 / 64, cos=1e-4)
#: Inputs that all queries share.
OF_KEYS = {t.name for spec in OPS.values() for t in spec.inputs if t.shape[0] != "s_q"}


class CheckError(DsaError, AssertionError):
    """A result differs from the float64 reference."""


@dataclass(frozen=True)
class Finding:
    """What a passed check found.

    Parameters
    ----------
    error : float
        Largest absolute error of the first output; 0 for indices.
    of_allowed : float
        Largest error as a fraction of what the tolerance allows there, over all outputs.
    near_ties : int
        Selected keys that float64 logits would exchange for others within the logits' tolerance.
    """

    error: float = 0.0
    of_allowed: float = 0.0
    near_ties: int = 0


def sample(rows: int) -> list[int]:
    """A few rows to check: the first, the middle and the last."""
    return sorted({0, rows // 2, rows - 1}) if rows else []


def compare(where: str, got: np.ndarray, reference: np.ndarray, tolerance: Tolerance) -> tuple[float, float]:
    """Check one tensor.

    Parameters
    ----------
    where : str
        The name of the result in messages.
    got : ndarray
        Any element type.
    reference : ndarray
        The same shape; usually float64.
    tolerance : Tolerance

    Returns
    -------
    error, of_allowed : float
        As in `Finding`.

    Raises
    ------
    CheckError
        The shape or the positions of infinities or NaN differ, an error is above ``abs + rel * |reference|``, or the
        cosine difference is above ``cos``.
    """
    got, reference = (np.asarray(a).astype(np.float64) for a in (got, reference))
    if got.shape != reference.shape:
        raise CheckError(f"{where}: expected the shape {reference.shape}, got {got.shape}")
    finite = np.isfinite(reference)
    if not np.array_equal(got[~finite], reference[~finite], equal_nan=True):
        raise CheckError(f"{where}: infinities or NaN are not where the reference has them")
    x, y = got[finite], reference[finite]
    if not np.isfinite(x).all():
        raise CheckError(f"{where}: infinities or NaN are not where the reference has them")
    if not len(x):
        return 0.0, 0.0
    error = np.abs(x - y)
    allowed = tolerance.abs + tolerance.rel * np.abs(y)
    # Where nothing is allowed, any error is infinitely too large.
    share = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
    if (worst := float(share.max())) > 1:
        values = f"{x[share.argmax()]:.9g} for {y[share.argmax()]:.9g}"
        raise CheckError(f"{where}: expected errors within the tolerance, got {worst:.3g} times that: {values}")
    if (cosine := cosine_difference(x, y)) > tolerance.cos:
        raise CheckError(f"{where}: expected a cosine difference of at most {tolerance.cos:g}, got {cosine:.3g}")
    return float(error.max()), worst


def cosine_difference(x: np.ndarray, y: np.ndarray) -> float:
    """``1 - 2 x.y / (x.x + y.y)``: 0 for equal arrays. Unlike an angle, it also sees a difference in length."""
    norm = float(x @ x + y @ y)
    return 1 - 2 * float(x @ y) / norm if norm else 0.0


def check_selection(where: str, row: np.ndarray, logits: np.ndarray, topk: int, tolerance: Tolerance) -> int:
    """Check one row of indices against exact logits.

    float32 may order two keys differently than float64 if their logits are closer than their errors. So every key has
    to be on the right side of the threshold within two errors. Everything else has to be exact.

    Parameters
    ----------
    where : str
        The name of the result in messages.
    row : ndarray [topk], int32
    logits : ndarray [s_kv], float64
        -inf for keys that the query may not see.
    topk : int
    tolerance : Tolerance
        The tolerance of the logits.

    Returns
    -------
    int
        The number of selected keys that are not in the float64 selection.

    Raises
    ------
    CheckError
        The selection is wrong.
    """
    visible = ~np.isneginf(logits)
    count = min(topk, int(visible.sum()))
    chosen = row[:count]
    if len(row) != topk or (row[count:] != -1).any():
        raise CheckError(f"{where}: expected {count} indices followed by -1")
    if not count:
        return 0
    if (chosen < 0).any() or (chosen >= len(logits)).any() or not visible[chosen].all():
        raise CheckError(f"{where}: an index is out of range")
    if (np.diff(chosen) <= 0).any():
        raise CheckError(f"{where}: the indices do not ascend")
    order = np.argsort(-logits, kind="stable")
    best = order[:count]
    threshold = float(logits[best[-1]])
    slack = 2 * (tolerance.abs + tolerance.rel * abs(threshold))
    if logits[chosen].min() < threshold - slack:
        raise CheckError(f"{where}: a selected key is below the threshold by more than the logits' tolerance")
    left_out = visible.copy()
    left_out[chosen] = False
    if left_out.any() and logits[left_out].max() > threshold + slack:
        raise CheckError(f"{where}: a key above the threshold by more than the logits' tolerance was left out")
    return int(np.setdiff1d(chosen, best, assume_unique=True).size)


def check_indices(
    where: str,
    indexer: Mapping[str, np.ndarray],
    indices: np.ndarray,
    topk: int,
    rows: Sequence[int],
) -> int:
    """Run `check_selection` for some rows and count near-ties. `indexer` has the inputs of `lightning_indexer`."""
    tolerance = _LOGITS.tolerance["logits"][str(indexer["q"].dtype)]
    near_ties = 0
    for m in rows:
        (logits,) = _LOGITS.reference(**_rows(indexer, [m]))
        near_ties += check_selection(f"{where}: row {m}", indices[m], logits[0], topk, tolerance)
    return near_ties


def indexer_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of `dsa_attention` that `indexer_topk` takes, under its names."""
    names = {"q": "index_q", "k": "index_k", "k_scale": "index_k_scale"}
    found = {t.name: inputs.get(names.get(t.name, t.name)) for t in _LOGITS.inputs}
    return {n: x for n, x in found.items() if x is not None}


def references(work: Workload, rows: Sequence[int]) -> tuple[Any, ...]:
    """The float64 outputs of some queries, for an operator with a single kernel."""
    return work.spec.reference(**_rows(work.inputs, rows), **work.attrs)


def check(
    work: Workload,
    outputs: Sequence[np.ndarray],
    rows: Sequence[int],
    where: str = "",
    known: tuple[Any, ...] | None = None,
    selected: np.ndarray | None = None,
    dtype: str = "",
) -> Finding:
    """Check the outputs of an operator.

    `dsa_attention` is checked in two halves, because a near-tie changes the output by more than rounding: first the
    selection against the logits, then the attention over that selection.

    Parameters
    ----------
    work : Workload
        The inputs of the operator.
    outputs : sequence of ndarray
        All outputs, in the operator's order.
    rows : sequence of int
        The queries to check.
    where : str
        The name of the result in messages; by default that of the operator.
    known : tuple, optional
        The `references`, for a caller that checks several results of one workload.
    selected : ndarray, optional
        The indices [s_q, topk] that `dsa_attention` selected; by default what `indexer_topk` selects here.
    dtype : str
        Element type whose tolerances apply; by default that of the first input.

    Returns
    -------
    Finding

    Raises
    ------
    CheckError
        An output is wrong.
    """
    where = where or work.op
    spec, inputs, attrs = work.spec, work.inputs, dict(work.attrs)
    rows = list(rows)
    if work.op == "indexer_topk":
        return Finding(near_ties=check_indices(where, inputs, outputs[0], attrs["topk"], rows))
    if work.op == "topk":
        (expected,) = known or references(work, rows)
        if not np.array_equal(outputs[0][rows], expected):
            raise CheckError(f"{where}: the indices are not those of a stable sort")
        return Finding()
    near_ties = 0
    dtype = dtype or str(inputs[spec.inputs[0].name].dtype)
    if work.op == "dsa_attention":
        indexer, topk = indexer_inputs(inputs), attrs.pop("topk")
        indices = functions.indexer_topk(**indexer, topk=topk) if selected is None else selected
        near_ties = check_indices(where, indexer, indices, topk, rows)
        out, _, lse = OPS["sparse_mla"].reference(inputs["q"][rows], inputs["kv"], indices[rows], **attrs)
        exact: tuple[Any, ...] = (out, lse)
    else:
        exact = known or references(work, rows)
    errors = [
        compare(f"{where}: {t.name}", got[rows], reference, spec.tolerance[t.name][dtype])
        for t, got, reference in zip(spec.outputs, outputs, exact, strict=True)
    ]
    return Finding(errors[0][0], max(share for _, share in errors), near_ties)


class Checker:
    """Checks several results of one workload, with references that are made once.

    Parameters
    ----------
    work : Workload
        Arrays or torch tensors.

    Attributes
    ----------
    rows : list of int
        The queries that are checked.
    """

    def __init__(self, work: Workload) -> None:
        self.rows = sample(work.lengths["s_q"])
        inputs = {name: to_numpy(x) for name, x in _rows(work.inputs, self.rows).items()}
        self._given = work
        self._work = Workload(work.op, inputs, work.attrs, {**work.lengths, "s_q": len(self.rows)})
        self._known: tuple[Any, ...] | None = None
        if work.op in ("lightning_indexer", "topk", "sparse_mla", "sparse_mla_fp8"):
            self._known = references(self._work, range(len(self.rows)))

    def ours(self, outputs: Sequence[Any]) -> Finding:
        """Check all our outputs with the tolerances of the operator.

        Parameters
        ----------
        outputs : sequence of ndarray or tensor
            All outputs, in the operator's order.

        Returns
        -------
        Finding

        Raises
        ------
        CheckError
            An output is wrong.
        """
        selected = None
        if self._work.op == "dsa_attention":
            # Select for all queries, because a call with the sampled ones may use another kernel.
            indexer = indexer_inputs(self._given.inputs)
            selected = self._sampled(functions.indexer_topk(**indexer, topk=self._work.attrs["topk"]))
        arrays = [self._sampled(x) for x in outputs]
        return check(self._work, arrays, range(len(self.rows)), known=self._known, selected=selected)

    def peer(self, name: str, result: Any) -> None:
        """Check the first output of a peer, in its own order, within `PEER_LOGITS` and `PEER_OUT`.

        Parameters
        ----------
        name : str
            The name of the peer in messages.
        result : ndarray or tensor, or (out, indices) for `dsa_attention`
            The output.

        Raises
        ------
        CheckError
            The output is wrong.
        """
        where, inputs, op = f"{name}: {self._work.op}", self._work.inputs, self._work.op
        if op == "dsa_attention":
            out, chosen = (self._sampled(x) for x in result)
            self._selection(where, indexer_inputs(inputs), chosen)
            self._attention(where, out, np.asarray(chosen, np.int32), inputs["kv"])
        elif op == "sparse_mla":
            self._attention(where, self._sampled(result), inputs["indices"], inputs["kv"])
        elif op == "sparse_mla_fp8":
            kv = unpack_mla_rows(inputs["kv"], self._work.attrs["d_v"])
            self._attention(where, self._sampled(result), inputs["indices"], kv)
        elif op == "indexer_topk":
            self._selection(where, inputs, self._sampled(result))
        elif op == "topk":
            self._topk(where, self._sampled(result))
        else:
            (logits,) = self._known or ()
            # Many peers leave logits outside the range of a query unchanged.
            compare(where, np.where(np.isneginf(logits), -np.inf, self._sampled(result)), logits, PEER_LOGITS)

    def _sampled(self, x: Any) -> np.ndarray:
        return to_numpy(x[self.rows])

    def _attention(self, where: str, out: np.ndarray, indices: np.ndarray, kv: np.ndarray) -> None:
        attrs = {name: self._work.attrs[name] for name in ("sm_scale", "d_v")}
        expected = OPS["sparse_mla"].reference(self._work.inputs["q"], kv, indices, **attrs)[0]
        compare(where, out, expected, PEER_OUT)

    def _selection(self, where: str, indexer: Mapping[str, np.ndarray], chosen: np.ndarray) -> None:
        (logits,) = _LOGITS.reference(**indexer)
        for row, exact in zip(chosen, logits, strict=True):
            padded = np.full(self._work.lengths["topk"], -1, np.int64)
            seen = np.sort(_visible(row, ~np.isneginf(exact)))
            padded[: len(seen)] = seen
            check_selection(where, padded, exact, len(padded), PEER_LOGITS)

    def _topk(self, where: str, chosen: np.ndarray) -> None:
        """Check that the values are the largest. A peer may choose among equal ones."""
        (expected,) = self._known or ()
        for row, logits, right in zip(chosen, self._work.inputs["logits"], expected, strict=True):
            seen, right = _visible(row, ~np.isneginf(logits)), _visible(right, ~np.isneginf(logits))
            if len(np.unique(seen)) != len(seen) or not np.array_equal(np.sort(logits[seen]), np.sort(logits[right])):
                raise CheckError(f"{where}: the values at the indices are not the largest")


def _visible(row: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The indices of a row that the query may see. A peer may fill the row with others."""
    row = row[(row >= 0) & (row < len(visible))]
    return row[visible[row]]


def _rows(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The inputs of some queries."""
    return {n: x if n in OF_KEYS else x[list(rows)] for n, x in inputs.items()}
