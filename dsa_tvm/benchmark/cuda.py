"""``dsa-tvm bench --suite cuda``: shapes and figures for a GPU, and the errors that a GPU may raise."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .. import functions
from ..errors import ArgumentError, DsaError
from ..ops import OPS
from ..presets import Preset
from ..spec import INT32_MAX
from ..terminal.text import aligned, digits
from . import device, figures, workload
from .check import Checker
from .clock import Clock, DeviceClock
from .peers import Peer, cuda
from .suite import Case, LostError
from .workload import Workload

_DEFAULTS = {"seconds": 0.2}
_HEADER = {
    "operator": 17,
    "type": 13,
    "s_q": 5,
    "s_kv": 7,
    "ours ms": 9,
    "TFLOPS": 7,
    "TB/s": 7,
    "of GEMM": 8,
    "of copy": 8,
}


def _lengths(first: int, last: int) -> tuple[int, ...]:
    """Powers of two times 1024."""
    return tuple(1024 << i for i in range(first.bit_length() - 1, last.bit_length()))


#: By operator: element types, query tokens, key tokens. The attention's few queries are decoding: one or two tokens
#: each of 1, 64 or 128 sequences.
SUITE: Mapping[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = {
    "lightning_indexer": (("bfloat16", "float8_e4m3fn"), (1, 64, 2048, 4096), _lengths(4, 128)),
    "topk": (("float32",), (1, 4, 64, 4096), _lengths(8, 128)),
    "indexer_topk": (("bfloat16", "float8_e4m3fn"), (1, 64, 4096), (8192, 32768, 131072)),
    "sparse_mla": (("bfloat16",), (1, 2, 64, 128, 256, 4096), _lengths(8, 128)),
    "sparse_mla_fp8": (("float8_e4m3fn",), (1, 2, 64, 128, 256), _lengths(8, 128)),
    "dsa_attention": (("bfloat16",), (1, 64, 4096), (8192, 32768, 131072)),
}


def cases(ops: Sequence[str], s_q: Sequence[int], s_kv: Sequence[int], dtype: str | None) -> list[Case]:
    """The cases of some operators, or of all. Lengths and a type that the user gives replace the suite's.

    Raises
    ------
    ArgumentError
        An unknown type, or one that none of the operators has; a length that is out of range.
    """
    if max([*s_q, *s_kv], default=0) > INT32_MAX:
        raise ArgumentError(f"bench: s_q, s_kv: expected at most {INT32_MAX}, got {max([*s_q, *s_kv])}")
    if dtype is not None and dtype not in workload.DTYPES:
        raise ArgumentError(f"bench: dtype: expected one of {', '.join(workload.DTYPES)}, got {dtype!r}")
    found = []
    for op in dict.fromkeys(ops or SUITE):
        dtypes, few, keys = SUITE[op]
        served = [x for x in ([dtype] if dtype else dtypes) if workload.variant(OPS[op], x) is not None]
        found += [Case(op, *rest) for rest in itertools.product(served, s_q or few, s_kv or keys)]
    if not found:
        raise ArgumentError(f"bench: dtype: expected a type that {', '.join(ops)} takes, got {dtype!r}")
    return found


def make(case: Case, preset: Preset, where: Any, seed: int = 0) -> Workload:
    """The inputs of a case: `workload.make` on a torch device."""
    types = workload.variant(OPS[case.op], case.dtype)
    return workload.make(case.op, preset, case.s_q, case.s_kv, seed, types=types, device=where)


class CudaSuite:
    """A `Suite` on the current GPU of torch.

    Parameters
    ----------
    args : argparse.Namespace
        op, s_q, s_kv, threads, preset, dtype and seconds, as `dsa_tvm.cli` parses them.

    Raises
    ------
    ArgumentError
        An unknown operator, preset or type, or a number out of range.
    DsaError, LibraryError
        As `device.find`.
    """

    cases: Sequence[Case]
    clock: Clock
    seconds: float
    titles: Mapping[str, str] = cuda.TITLES
    out_of_memory: tuple[type[Exception], ...]

    def __init__(self, args: argparse.Namespace) -> None:
        args = figures.with_defaults(args, _DEFAULTS)
        self._preset, self._preset_name = figures.check_arguments(args, ("s_q", "s_kv")), args.preset
        self.seconds = args.seconds
        if args.threads:
            raise ArgumentError(f"bench: threads: expected none with --suite cuda, got {args.threads}")
        self.cases = cases(args.op, args.s_q, args.s_kv, args.dtype)
        self._gpu = device.find()
        self.clock, self.out_of_memory = DeviceClock(self._gpu), (self._gpu.out_of_memory,)
        self._ceilings, self._card = self._gpu.ceilings(), self._gpu.describe()

    def heading(self) -> list[str]:
        """As `Suite`."""
        measured = ", ".join(f"{name} {digits(value)}" for name, value in self._ceilings.items() if value)
        return [
            f"{self._card['name']}, torch {self._card['torch']}, CUDA {self._card['cuda']}, {self._preset_name}",
            f"measured ceilings: {measured}; times are medians, cold L2; x is the peer's time over ours",
        ]

    def document(self) -> dict[str, Any]:
        """As `Suite`."""
        sizes = {"name": self._preset_name, **asdict(self._preset)}
        found = {"suite": "cuda", "gpu": self._card, "ceilings": self._ceilings}
        return {**found, "preset": sizes, "seconds": self.seconds}

    def remarks(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """As `Suite`. There are none."""
        return []

    def header(self, op: str, first: bool) -> list[str]:
        """As `Suite`. Each operator has a table of its own, with its peers."""
        peers = [cell for name in self.peers(op) for cell in (f"{self.titles[name]} ms", "x")]
        return ["", aligned([*_HEADER, *peers], self._widths(op))]

    def line(self, row: Mapping[str, Any]) -> str:
        """As `Suite`."""
        return aligned(self._cells(row), self._widths(row["op"]))

    def _widths(self, op: str) -> list[int]:
        titles = [self.titles[name] for name in self.peers(op)]
        return [*_HEADER.values(), *(width for title in titles for width in (max(len(title) + 3, 9), 5))]

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        found = [row["op"], row["dtype"], str(row["s_q"]), str(row["s_kv"])]
        if row["ours_ms"] is None:
            found += ["FAILED" if row["failed"] else "-", "-", "-", "-", "-"]
        else:
            found += [digits(row["ours_ms"]), *("-" if row[n] is None else digits(row[n]) for n in ("tflops", "tbps"))]
            found += ["-" if row[n] is None else f"{100 * row[n]:.0f}%" for n in ("of_gemm", "of_copy")]
        return found + figures.peer_cells(row, self.peers(row["op"]))

    def title(self, case: Case) -> str:
        """As `Suite`."""
        return f"{case.op}  {case.dtype}  s_q {case.s_q}  s_kv {case.s_kv}"

    def blank(self, case: Case) -> dict[str, Any]:
        """As `Suite`."""
        row = {"op": case.op, "dtype": case.dtype, "s_q": case.s_q, "s_kv": case.s_kv}
        empty = dict.fromkeys(("ours_ms", "tflops", "tbps", "of_gemm", "of_copy"))
        return {**row, "failed": None, "skipped": None, "peers": {}, **empty}

    def inputs(self, case: Case) -> tuple[Workload, Checker]:
        """As `Suite`."""
        work = make(case, self._preset, self._gpu.device)
        return work, Checker(work)

    def ours(self, case: Case, work: Workload) -> Callable[[], Any]:
        """As `Suite`."""
        function = getattr(functions, case.op)
        return lambda: function(**work.inputs, **work.attrs)

    def peers(self, op: str) -> Sequence[str]:
        """As `Suite`."""
        return cuda.BY_OPERATOR[op]

    def peer(self, name: str, case: Case, work: Workload) -> Peer:
        """As `Suite`."""
        return cuda.prepare(name, work, self._gpu.capability)

    def figures(self, case: Case, work: Workload, seconds: float) -> dict[str, Any]:
        """As `Suite`: TFLOPS, TB/s, and their shares of what the card reached in a large product and a large copy."""
        tflops = workload.flops(case.op, work.lengths, *workload.ranges(work)) / seconds / 1e12 or None
        tbps = workload.traffic(work) / seconds / 1e12
        # Packed rows are multiplied as bf16; no product of int8 is measured.
        ceiling = {"float8_e4m3fn": "fp8_tflops", "int8": None}.get(case.dtype, "bf16_tflops")
        if case.op == "sparse_mla_fp8":
            ceiling = "bf16_tflops"
        gemm, copy = self._ceilings[ceiling] if ceiling else None, self._ceilings["copy_tbps"]
        return {
            "tflops": tflops,
            "tbps": tbps,
            "of_gemm": tflops / gemm if tflops and gemm else None,
            "of_copy": tbps / copy if copy else None,
        }

    def reason(self, error: Exception) -> str | None:
        """As `Suite`: no memory, or arguments that the operators refuse."""
        if isinstance(error, self.out_of_memory):
            return "out of memory"
        if isinstance(error, DsaError):
            self.check_alive(str(error))
            return str(error)
        if isinstance(error, RuntimeError):  # torch raises it for errors of CUDA
            self.check_alive(str(error).strip().partition("\n")[0][:200])
        return None

    def check_alive(self, after: str) -> None:
        """As `Suite`. After some errors of CUDA every later call fails."""
        try:
            self._gpu.synchronize()
        except Exception as error:  # torch's errors of CUDA have no other common base
            raise LostError(
                f"bench: the GPU does not go on after an error ({after}); run the rest by itself"
            ) from error

    def release(self) -> None:
        """As `Suite`."""
        self._gpu.free()
