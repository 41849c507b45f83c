"""Choose the decisions of GPU kernels. For each operator: the sizes, stages and element types that are tuned.

A GPU kernel serves every size of its stage, so its decisions have to hold at all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...gpu.architectures import FEW_HEADS, HOPPER
from ...ops import OPS
from ...spec import completed
from ..record import Record, as_key
from .finals import has_lengths, in_words, keeps_up, latest

#: The sizes (s_q, s_kv) that are measured.
BUCKETS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "lightning_indexer": ((1, 8192), (1, 65536), (8, 16384), (64, 65536), (4096, 8192), (4096, 65536)),
    "topk": ((1, 8192), (1, 65536), (64, 65536), (4096, 8192), (4096, 65536)),
    "sparse_mla": ((1, 65536), (64, 65536), (4096, 65536)),
    "sparse_mla_fp8": ((1, 65536), (64, 65536), (256, 65536)),
}
#: The element types that are measured, in the order of the operator's type variables. Others have the decisions of one
#: of them: `build.cuda.plan`.
TIMED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "lightning_indexer": (("bfloat16", "bfloat16"), ("float8_e4m3fn", "float8_e4m3fn")),
    "topk": ((),),
    "sparse_mla": (("bfloat16",),),
    "sparse_mla_fp8": (("bfloat16",),),
}
#: The indexer has a kernel for few queries. Its decisions are tuned at up to so many scores, the others' at more. (When
#: a library launches it depends on the GPU's multiprocessors as well: cuda/stages.c. One that is made for tuning always
#: launches the stage that is tuned.)
_FEW_SCORES = 2**18
#: The tuned stage of operators that have only one, apart from the stage for few heads.
_STAGES = {"topk": "rows", "sparse_mla": "attend", "sparse_mla_fp8": "attend"}
#: Element types that have kernels with Hopper's own instructions.
_OF_HOPPER: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "lightning_indexer": tuple((name, name) for name in ("bfloat16", "float16", "float8_e4m3fn")),
    "topk": (),
    "sparse_mla": (("bfloat16",), ("float16",)),
    "sparse_mla_fp8": (("bfloat16",),),
}


def stage_of(op: str, lengths: Mapping[str, int], target: str, types: Sequence[str]) -> str:
    """The stage whose decisions a call with these lengths measures. The build uses the same names."""
    if "h_q" in OPS[op].dims and lengths["h_q"] <= FEW_HEADS and "float32" not in types:
        return "few_heads"
    stage = _STAGES.get(op) or ("few" if lengths["s_q"] * lengths["s_kv"] <= _FEW_SCORES else "many")
    return f"hopper_{stage}" if target == HOPPER and tuple(types) in _OF_HOPPER[op] else stage


@dataclass(frozen=True)
class Choice:
    """The decisions for one kernel.

    Parameters
    ----------
    records : tuple of Record
        The finals of the chosen decisions, one for each size; empty for DEFAULT.
    why : str
    """

    records: tuple[Record, ...]
    why: str

    @property
    def decisions(self) -> Mapping[str, int] | None:
        """The chosen decisions; None for DEFAULT."""
        return self.records[0].decisions if self.records else None

    @property
    def speedup(self) -> float:
        """Speedup over DEFAULT: the geometric mean over the sizes."""
        return statistics.geometric_mean(r.speedup for r in self.records) if self.records else 1.0


def choose(finals: Iterable[Record]) -> Choice:
    """Choose the fastest decisions that hold at every size.

    Parameters
    ----------
    finals : iterable of Record
        They are of one operator, target, choice of element types, stage and model. Of equal decisions at one size only
        the latest counts.
    """
    sizes = _by_size(finals)
    found: dict[tuple, list[Record]] = {}
    for records in sizes.values():
        for record in records:
            found.setdefault(as_key(record.decisions), []).append(record)
    complete = [Choice(tuple(records), "") for records in found.values() if len(records) == len(sizes)]
    holding = [choice for choice in complete if all(map(keeps_up, choice.records)) and choice.speedup > 1]
    if holding:
        best = max(holding, key=lambda choice: (choice.speedup, as_key(choice.records[0].decisions)))
        return Choice(best.records, f"{best.speedup:.3f} times as fast as DEFAULT at {len(sizes)} sizes")
    if not found:
        return Choice((), "nothing was measured")
    return Choice((), f"none of {len(found)} finalists was measured at all {len(sizes)} sizes and is faster")


def by_size(op: str, records: Iterable[Record], lengths: Mapping[str, int]) -> dict[tuple[int, int, int], list[Record]]:
    """The finals of one kernel that have times, by s_q, s_kv and h_q (0 if the operator has none), ascending.

    Of equal decisions only the latest final counts. A kernel for few heads may have been measured for several h_q.
    """
    return _by_size(records)


def _by_size(finals: Iterable[Record]) -> dict[tuple[int, int, int], list[Record]]:
    return dict(sorted(latest(finals, lambda r: (r.shape["s_q"], r.shape["s_kv"], r.shape.get("h_q", 0))).items()))


def explain(op: str, records: Iterable[Record], lengths: Mapping[str, int]) -> list[str]:
    """`choose` in words."""
    choice = choose(records)
    return [f"{in_words(choice.decisions)}; {choice.why}"]


def finals_of(
    records: Iterable[Record], op: str, target: str, types: Sequence[str], stage: str, lengths: Mapping[str, int]
) -> list[Record]:
    """The finals of one kernel among `records`. `lengths` are the lengths of its model other than s_q and s_kv.

    For the stage "few_heads", any small number of heads counts, because that depends on the tensor parallelism.
    """
    known = completed(lengths)
    free = ("s_q", "s_kv", "h_q") if stage == "few_heads" else ("s_q", "s_kv")
    return [
        r
        for r in records
        if (r.op, r.target, r.types, r.kind) == (op, target, tuple(types), "final")
        and stage_of(r.op, r.shape, r.target, r.types) == stage
        and has_lengths(r, known, free)
    ]
