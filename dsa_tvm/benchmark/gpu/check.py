"""Are the results on a GPU right, ours and those of peers? Sampled queries against float64, as in `gate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ops import OPS
from ...runtime.packing import unpack_mla_rows
from ...spec import Tolerance
from .. import check
from ..check import CheckError, Finding, compare
from ..workload import Workload
from .workload import sampled, to_numpy

#: Peers may round products and sums to 16 bits on the way; what they compute must be the same all the same.
LOGITS = Tolerance(abs=2e-2, rel=2e-2, cos=2e-5)
OUT = Tolerance(abs=1e-2, rel=3.01 / 64, cos=1e-4)


class Checker:
    """The references of some queries of one workload, made once.

    Parameters
    ----------
    work : Workload
        torch tensors.

    Attributes
    ----------
    rows : list of int
        The queries that are looked at.
    """

    def __init__(self, work: Workload) -> None:
        self.rows = check.sample(work.lengths["s_q"])
        self._work = sampled(work, self.rows)
        self._known: tuple[Any, ...] | None = None
        if work.op in ("lightning_indexer", "topk", "sparse_mla", "sparse_mla_fp8"):
            self._known = check.references(self._work, range(len(self.rows)))

    def ours(self, outputs: Sequence[Any], selected: Any = None) -> Finding:
        """Check our outputs, all of them, within the operator's tolerances.

        Parameters
        ----------
        outputs : sequence of tensor
        selected : tensor, optional
            What `dsa_attention` selected.

        Raises
        ------
        CheckError
        """
        arrays = [self._rows(x) for x in outputs]
        chosen = None if selected is None else self._rows(selected)
        return check.check(self._work, arrays, range(len(self.rows)), known=self._known, selected=chosen)

    def peer(self, name: str, result: Any) -> None:
        """Check a peer's first output, in its own order and within `LOGITS` and `OUT`.

        Parameters
        ----------
        name : str
            What to call it in messages.
        result : tensor, or (out, indices) for `dsa_attention`

        Raises
        ------
        CheckError
        """
        where, inputs, op = f"{name}: {self._work.op}", self._work.inputs, self._work.op
        if op == "dsa_attention":
            out, chosen = (self._rows(x) for x in result)
            self._selection(where, check.indexer_inputs(inputs), chosen)
            self._attention(where, out, np.asarray(chosen, np.int32), inputs["kv"])
        elif op == "sparse_mla":
            self._attention(where, self._rows(result), inputs["indices"], inputs["kv"])
        elif op == "sparse_mla_fp8":
            kv = unpack_mla_rows(inputs["kv"], self._work.attrs["d_v"])
            self._attention(where, self._rows(result), inputs["indices"], kv)
        elif op == "indexer_topk":
            self._selection(where, inputs, self._rows(result))
        elif op == "topk":
            self._topk(where, self._rows(result))
        else:
            (logits,) = self._known or ()
            # What is outside a query's range, many leave as it was.
            compare(where, np.where(np.isneginf(logits), -np.inf, self._rows(result)), logits, LOGITS)

    def _rows(self, x: Any) -> np.ndarray:
        return to_numpy(x[self.rows])

    def _attention(self, where: str, out: np.ndarray, indices: np.ndarray, kv: np.ndarray) -> None:
        attrs = {name: self._work.attrs[name] for name in ("sm_scale", "d_v")}
        expected = OPS["sparse_mla"].reference(self._work.inputs["q"], kv, indices, **attrs)[0]
        compare(where, out, expected, OUT)

    def _selection(self, where: str, indexer: Any, chosen: np.ndarray) -> None:
        (logits,) = OPS["lightning_indexer"].reference(**indexer)
        for row, exact in zip(chosen, logits, strict=True):
            padded = np.full(self._work.lengths["topk"], -1, np.int64)
            seen = np.sort(_visible(row, ~np.isneginf(exact)))
            padded[: len(seen)] = seen
            check.check_selection(where, padded, exact, len(padded), LOGITS)

    def _topk(self, where: str, chosen: np.ndarray) -> None:
        """The values must be the largest; which of equal ones, a peer may choose."""
        (expected,) = self._known or ()
        for row, logits, right in zip(chosen, self._work.inputs["logits"], expected, strict=True):
            seen, right = _visible(row, ~np.isneginf(logits)), _visible(right, ~np.isneginf(logits))
            if len(np.unique(seen)) != len(seen) or not np.array_equal(np.sort(logits[seen]), np.sort(logits[right])):
                raise CheckError(f"{where}: the values at the indices are not the largest")


def _visible(row: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The indices of a row that a query may see: a peer may fill up with others."""
    row = row[(row >= 0) & (row < len(visible))]
    return row[visible[row]]
