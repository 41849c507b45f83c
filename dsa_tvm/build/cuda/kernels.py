"""The CUDA kernels of each operator: their decisions, element types, lengths, and what a launch has to know.

To add an operator, write a function here and enter it in `OPERATORS`. Then add a struct of the same name, with the
fields of `Kernel.facts`, to cuda/kernels.h, and its launches to cuda/stages.c.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ...gpu.architectures import ANY_GPU, FEW_HEADS, HOPPER
from ...ops import OPS, packed_rows, sparse_mla_fp8
from ...schedules.cuda import write_rows
from ...schedules.cuda.indexer.portable import kernel as lightning_indexer
from ...schedules.cuda.indexer.sm90 import kernel as hopper_indexer
from ...schedules.cuda.mla import combine
from ...schedules.cuda.mla.portable import kernel as sparse_mla
from ...schedules.cuda.mla.sm90 import kernel as hopper_mla
from ...schedules.cuda.topk import kernel as topk
from ...spec import Dim

#: Takes a stage, element types by type variable, the lengths that the code is made for, and the hand-made decisions.
#: Returns the decisions to make the kernel with.
Chosen = Callable[[str, Mapping[str, str], Mapping[str, int], Any], Any]


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Parameters
    ----------
    stage : str
        The launch of the operator that it serves. All kernels of a stage have the same parameters.
    decisions : Decisions or None
    make : callable
        Makes the PrimFunc.
    shared_bytes : int
        The most shared memory that a launch takes.
    facts : mapping
        What the launching code must know about the decisions: fields of ``struct cuda_<op>``.
    variant : mapping
        Element types of the type variables; empty if one kernel serves all.
    sizes : mapping
        Lengths that the code is made for, by dimension.
    limits : mapping
        The largest lengths that it serves, by dimension.
    hopper : bool
        Whether it uses instructions that only sm_90a has. Such a kernel needs tensors at multiples of 16 bytes, and is
        preferred to the other kernels of its stage.
    product : str
        The element type that its tensor cores multiply, if that depends on the architecture.
    """

    stage: str
    decisions: Any
    make: Callable[[], Any] = field(compare=False)
    shared_bytes: int
    facts: Mapping[str, int]
    variant: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    hopper: bool = False
    product: str = ""

    @property
    def rank(self) -> tuple[float, bool]:
        """The kernel with the lowest rank is taken among those of a stage that serve a call."""
        return min(self.limits.values(), default=math.inf), not self.hopper

    def symbol(self, op: str) -> str:
        """Its name in the library."""
        lengths = (*self.sizes.values(), *self.limits.values())
        kind = ("hopper",) if self.hopper and not self.stage.startswith("hopper") else ()
        return "__".join((f"dsa_{op}", self.stage, *kind, *self.variant.values(), *map(str, lengths)))


def _variants(op: str) -> list[dict[str, str]]:
    return [dict(variant) for variant in OPS[op].variants]


def _topk(arch: str, dims: Mapping[str, Dim], chosen: Chosen) -> Iterator[Kernel]:
    # All stages share one list in shared memory.
    c = chosen("rows", {}, {}, topk.DEFAULT.get(arch, topk.DEFAULT[ANY_GPU]))
    facts = {name: getattr(c, name) for name in ("list_factor", "list_min", "list_max")}
    facts["selector_bytes"] = c.shared_bytes(1) - 8 * c.capacity(1)
    for stage in topk.STAGES:
        make = functools.partial(topk.tensor_ir, {}, c, stage)
        yield Kernel(stage, c, make, c.shared_bytes(dims["topk"].maximum), facts)


def _lightning_indexer(arch: str, dims: Mapping[str, Dim], chosen: Chosen) -> Iterator[Kernel]:
    for stage, variant, d_idx in itertools.product(
        ("many", "few"), _variants("lightning_indexer"), dims["d_idx"].values
    ):
        sizes = {"d_idx": d_idx}
        c = chosen(stage, variant, sizes, lightning_indexer.default(variant, d_idx, stage == "few", arch))
        product = lightning_indexer.product_of(variant, arch)
        needed = functools.partial(c.shared_bytes, variant, product, d_idx)
        group = 8 * c.head_tiles
        key_bytes, group_bytes = needed(0), needed(group)
        yield Kernel(
            stage,
            c,
            functools.partial(lightning_indexer.tensor_ir, variant, product, c, d_idx),
            needed(dims["h_idx"].maximum),
            {
                **{"block_keys": c.block_keys, "queries": c.queries},
                **{"key_bytes": key_bytes, "group": group, "group_bytes": group_bytes - key_bytes},
            },
            variant,
            sizes,
            product=product,
        )
    if arch == HOPPER:
        yield from _hopper_indexer(dims, chosen)


def _hopper_indexer(dims: Mapping[str, Dim], chosen: Chosen) -> Iterator[Kernel]:
    variants = [v for v in _variants("lightning_indexer") if hopper_indexer.serves(v)]
    for stage, variant, d_idx, heads in itertools.product(
        ("hopper_many", "hopper_few"), variants, dims["d_idx"].values, hopper_indexer.HEADS
    ):
        sizes = {"d_idx": d_idx}
        c = chosen(stage, variant, sizes, hopper_indexer.default(variant, d_idx, stage == "hopper_few"))
        box_queries, box_heads, _ = c.q_box(variant, d_idx, heads)
        yield Kernel(
            stage,
            c,
            functools.partial(hopper_indexer.tensor_ir, variant, c, d_idx, heads),
            c.shared_bytes(variant, d_idx),
            {
                **{"block_keys": c.block_keys, "queries": c.queries(heads)},
                **{"heads": box_heads, "box_queries": box_queries, "span": hopper_indexer.span(variant, d_idx)},
            },
            variant,
            sizes,
            {"h_idx": heads},
            hopper=True,
        )


def _sparse_mla(arch: str, dims: Mapping[str, Dim], chosen: Chosen) -> Iterator[Kernel]:
    for variant in _variants("sparse_mla"):
        widths = itertools.product(dims["d_qk"].values, dims["d_v"].values)
        yield from _attentions(arch, dims, chosen, variant, variant, widths)


def _sparse_mla_fp8(arch: str, dims: Mapping[str, Dim], chosen: Chosen) -> Iterator[Kernel]:
    whole = [d_v for d_v in dims["d_v"].values if d_v % packed_rows.GROUP == 0]
    for variant in _variants("sparse_mla_fp8"):
        widths = itertools.product(dims["d_qk"].values, whole)
        yield from _attentions(arch, dims, chosen, variant, sparse_mla_fp8.KERNEL, widths)


def _attentions(
    arch: str,
    dims: Mapping[str, Dim],
    chosen: Chosen,
    variant: dict[str, str],
    types: dict[str, str],
    widths: Iterable[tuple[int, int]],
) -> Iterator[Kernel]:
    """The kernels for one variant of an operator. They are made for the element types `types`."""
    served = [(d_qk, d_v) for d_qk, d_v in widths if d_v <= d_qk]
    most = dims["h_q"].maximum
    for d_qk, d_v in served:
        limits: list[dict[str, int]] = [{}]
        if variant["T"] != "float32" and most > FEW_HEADS:
            limits.append({"h_q": FEW_HEADS})
        for limit in limits:
            default = sparse_mla.default(types, arch, few_heads=bool(limit))
            c = chosen("few_heads" if limit else "attend", variant, {"d_qk": d_qk, "d_v": d_v}, default)
            c.check(types, d_qk, d_v)
            yield _attention(sparse_mla, variant, types, c, d_qk, d_v, limit)
        if arch == HOPPER and _hopper_attends(types, d_qk, d_v):
            own = chosen("hopper_attend", variant, {"d_qk": d_qk, "d_v": d_v}, hopper_mla.DEFAULT[arch])
            own.check(types, d_qk, d_v)
            yield _attention(hopper_mla, variant, types, own, d_qk, d_v, {}, hopper=True)
    for d_v in dict.fromkeys(d_v for _, d_v in served):
        make = functools.partial(combine.tensor_ir, variant, d_v)
        yield Kernel("combine", None, make, 0, {}, variant, {"d_v": d_v})


def _hopper_attends(variant: dict[str, str], d_qk: int, d_v: int) -> bool:
    try:
        hopper_mla.DEFAULT[HOPPER].check(variant, d_qk, d_v)
    except ValueError:
        return False
    return True


def _attention(
    module: ModuleType,
    variant: dict[str, str],
    types: dict[str, str],
    c: Any,
    d_qk: int,
    d_v: int,
    limits: dict[str, int],
    hopper: bool = False,
) -> Kernel:
    facts = {"heads": c.heads, "block_keys": c.block_keys, "split_keys": c.split_keys, "stats": sparse_mla.STATS}
    make = functools.partial(module.tensor_ir, types, c, d_qk, d_v)
    lengths = {"d_qk": d_qk, "d_v": d_v}
    return Kernel("attend", c, make, c.shared_bytes(types, d_qk, d_v), facts, variant, lengths, limits, hopper)


def _write_rows(arch: str, dims: Mapping[str, Dim], chosen: Chosen) -> Iterator[Kernel]:
    # Rows of all types are copied as bytes.
    facts = {"copy_bytes": write_rows.COPY_BYTES, "rows": write_rows.ROWS}
    yield Kernel("copy", None, write_rows.copy_ir, 0, facts)
    yield Kernel("write", None, write_rows.tensor_ir, 0, facts)


#: By operator, a function of an architecture or `ANY_GPU`, the dimensions with their served values, and a `Chosen`.
OPERATORS: Mapping[str, Callable[[str, Mapping[str, Dim], Chosen], Iterator[Kernel]]] = {
    "lightning_indexer": _lightning_indexer,
    "topk": _topk,
    "sparse_mla": _sparse_mla,
    "sparse_mla_fp8": _sparse_mla_fp8,
    "write_rows": _write_rows,
}
