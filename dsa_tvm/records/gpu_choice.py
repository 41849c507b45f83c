"""What is tuned on GPUs: for each operator its sizes, the stages that have decisions of their own, and element types.

A kernel of a GPU serves every size of its stage, so that its decisions have to hold at all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..gpu.architectures import FEW_HEADS, HOPPER, is_arch
from ..ops import OPS
from ..spec import completed
from .choice import in_words, keeps_up
from .record import Record, as_key

#: The sizes that are measured: s_q and s_kv.
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
#: The stage of the operators that have one with decisions, but for few heads.
_STAGES = {"topk": "rows", "sparse_mla": "attend", "sparse_mla_fp8": "attend"}
#: Element types of the kernels of Hopper's own instructions.
_OF_HOPPER: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "lightning_indexer": tuple((name, name) for name in ("bfloat16", "float16", "float8_e4m3fn")),
    "topk": (),
    "sparse_mla": (("bfloat16",), ("float16",)),
    "sparse_mla_fp8": (("bfloat16",),),
}


def is_gpu(target: str) -> bool:
    """Whether a target is a GPU's architecture."""
    return is_arch(target)


def stage_of(op: str, lengths: Mapping[str, int], target: str, types: Sequence[str]) -> str:
    """The stage whose decisions a call of these lengths measures, as the build calls it."""
    if "h_q" in OPS[op].dims and lengths["h_q"] <= FEW_HEADS and "float32" not in types:
        return "few_heads"
    stage = _STAGES.get(op) or ("few" if lengths["s_q"] * lengths["s_kv"] <= _FEW_SCORES else "many")
    return f"hopper_{stage}" if target == HOPPER and tuple(types) in _OF_HOPPER[op] else stage


def stage_of_record(record: Record) -> str:
    """The stage that a record of a GPU measured."""
    return stage_of(record.op, record.shape, record.target, record.types)


@dataclass(frozen=True)
class Choice:
    """What a kernel gets.

    Parameters
    ----------
    records : tuple of Record
        The finals of the chosen decisions, one for each size; none for DEFAULT.
    why : str
    """

    records: tuple[Record, ...]
    why: str

    @property
    def decisions(self) -> Mapping[str, int] | None:
        """What was chosen; None for DEFAULT."""
        return self.records[0].decisions if self.records else None

    @property
    def speedup(self) -> float:
        """Over DEFAULT, the geometric mean of the sizes."""
        return statistics.geometric_mean(r.speedup for r in self.records) if self.records else 1.0


def choose(finals: Iterable[Record]) -> Choice:
    """The fastest decisions that hold at every size.

    Parameters
    ----------
    finals : iterable of Record
        Of one operator, target, choice of element types, stage and model. Of one size and decisions the latest counts.
    """
    sizes = by_size(finals)
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


def by_size(finals: Iterable[Record]) -> dict[tuple[int, int, int], list[Record]]:
    """The finals of one kernel by s_q, s_kv and h_q (0 where there is none): with times, of each decisions the latest.

    A kernel for few heads was perhaps measured for several numbers of them.
    """
    latest: dict[tuple[int, int, int], dict[tuple, Record]] = {}
    for record in finals:
        if record.kind == "final" and record.error is None:
            of = latest.setdefault((record.shape["s_q"], record.shape["s_kv"], record.shape.get("h_q", 0)), {})
            known = of.get(as_key(record.decisions))
            if known is None or known.date <= record.date:
                of[as_key(record.decisions)] = record
    return {size: list(of.values()) for size, of in sorted(latest.items())}


def explain(finals: Iterable[Record]) -> list[str]:
    """`choose` in words."""
    choice = choose(finals)
    return [f"{in_words(choice.decisions) if choice.decisions else 'DEFAULT'}; {choice.why}"]


def finals_of(
    records: Iterable[Record], op: str, target: str, types: Sequence[str], stage: str, lengths: Mapping[str, int]
) -> list[Record]:
    """The finals among `records` of one kernel; `lengths` are those of its model beside s_q and s_kv.

    For few heads those of any number of few heads count: a model has as many as its tensor parallelism leaves it.
    """
    known = completed(lengths)
    free = ("s_q", "s_kv", "h_q") if stage == "few_heads" else ("s_q", "s_kv")
    own = {name: known[name] for name in OPS[op].dims if name not in free}
    return [
        r
        for r in records
        if (r.op, r.target, r.types, r.kind) == (op, target, tuple(types), "final")
        and stage_of_record(r) == stage
        and all(r.shape[name] == length for name, length in own.items())
    ]
