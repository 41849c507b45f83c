"""``dsa-tvm bench --suite cuda``: the operators and the peers on one GPU, in one run, checked first."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ... import functions, presets
from ...errors import ArgumentError, DsaError
from ...terminal.progress import Progress
from ...terminal.text import aligned, digits
from .. import check, figures, workload
from ..peers import Skipped
from ..workload import Workload
from . import clock as gpu_device
from . import peers as gpu_peers
from . import workload as gpu_workload
from .check import Checker
from .clock import Gpu
from .workload import Case

_DEFAULTS = {"seconds": 0.2}
_WIDTHS = [17, 13, 5, 7, 9, 7, 7, 8, 8]
_HEADER = ["operator", "type", "s_q", "s_kv", "ours ms", "TFLOPS", "TB/s", "of GEMM", "of copy"]


def run(args: argparse.Namespace) -> None:
    """Time what the command line asks for; print a table for each operator, and write all with ``--json``.

    Parameters
    ----------
    args : argparse.Namespace
        op, s_q, s_kv, threads, preset, dtype, seconds and json, as `dsa_tvm.cli` parses them.

    Raises
    ------
    ArgumentError
        An unknown operator, preset or type, or a number out of range.
    gate.CheckError
        An operator gave a wrong result. It has no time in the table; the others do.
    DsaError
        There is no GPU to measure, or it stopped working.
    LibraryError
        As `dsa_tvm.runtime.library.load`, or the library has no CUDA kernels.
    """
    args = figures.with_defaults(args, _DEFAULTS)
    preset = figures.check_arguments(args, ("s_q", "s_kv"))
    if args.threads:
        raise ArgumentError(f"bench: threads: expected none with --suite cuda, got {args.threads}")
    cases = gpu_workload.cases(args.op, args.s_q, args.s_kv, args.dtype)
    gpu = gpu_device.find()
    ceilings = gpu.ceilings()
    card = gpu.describe()
    print(f"{card['name']}, torch {card['torch']}, CUDA {card['cuda']}, {args.preset}")
    measured = ", ".join(f"{name} {digits(value)}" for name, value in ceilings.items() if value)
    print(f"measured ceilings: {measured}; times are medians, cold L2; x is the peer's time over ours")
    rows: list[dict[str, Any]] = []
    try:
        with Progress(len(cases)) as progress:
            operator = None
            for case in cases:
                if case.op != operator:
                    operator = case.op
                    _say_header(progress, operator)
                progress.step(f"{case.op}  {case.dtype}  s_q {case.s_q}  s_kv {case.s_kv}")
                row = measure(case, preset, gpu, args.seconds, ceilings)
                rows.append(row)
                _say(progress, row)
    finally:
        # After Ctrl-C as well: what has been measured has been measured.
        if args.json and rows:
            sizes = {"name": args.preset, **asdict(preset)}
            document = {"suite": "cuda", "gpu": card, "ceilings": ceilings, "preset": sizes, "seconds": args.seconds}
            figures.write(args.json, {**document, "rows": rows})
    for line in figures.notes(rows, gpu_peers.TITLES):
        print(line)
    figures.raise_for_wrong(rows)


def measure(
    case: Case, preset: presets.Preset, gpu: Gpu, seconds: float, ceilings: Mapping[str, float | None]
) -> dict[str, Any]:
    """One row of the results.

    Parameters
    ----------
    case : Case
    preset : Preset
    gpu : Gpu
    seconds : float
        Time for each contender.
    ceilings : mapping
        `Gpu.ceilings`.

    Returns
    -------
    dict
        op, dtype, s_q, s_kv; ours_ms, tflops, tbps, of_gemm, of_copy (None where there is no such figure); "failed"
        where our result was wrong, "skipped" where there is none; "peers" by name: ms and ratio, or "skipped".

    Raises
    ------
    DsaError
        The GPU stopped working.
    """
    row: dict[str, Any] = {**asdict(case), "failed": None, "skipped": None, "peers": {}}
    row |= dict.fromkeys(("ours_ms", "tflops", "tbps", "of_gemm", "of_copy"))
    try:
        return row | _measured(case, preset, gpu, seconds, ceilings, row["peers"])
    except check.CheckError as error:
        return row | {"failed": str(error)}
    except gpu.out_of_memory:
        return row | {"skipped": "out of memory"}
    except DsaError as error:
        _check_alive(gpu, str(error))
        return row | {"skipped": str(error)}
    except RuntimeError as error:  # torch's, of CUDA
        _check_alive(gpu, _first_line(error))
        raise
    finally:
        gpu.free()


def _measured(
    case: Case,
    preset: presets.Preset,
    gpu: Gpu,
    seconds: float,
    ceilings: Mapping[str, float | None],
    peers: dict[str, Any],
) -> dict[str, Any]:
    work = gpu_workload.make(case, preset, gpu.device)
    ours = _ours(work)
    outputs = ours()
    checker = Checker(work)
    selected = None
    if case.op == "dsa_attention":
        selected = functions.indexer_topk(**check.indexer_inputs(work.inputs), topk=work.attrs["topk"])
    finding = checker.ours(outputs if isinstance(outputs, tuple) else (outputs,), selected)
    del outputs, selected
    calls: dict[str, Callable[[], Any]] = {"ours": ours}
    for name in gpu_peers.BY_OPERATOR[case.op]:
        try:
            calls[name] = _peer(name, work, checker, gpu)
        except Skipped as reason:
            peers[name] = {"skipped": str(reason)}
    times = gpu_device.in_turns(gpu, calls, seconds)
    taken = times.pop("ours")
    peers |= figures.peer_figures(times, taken)
    ks, ke = gpu_workload.ranges(work)
    tflops = workload.flops(case.op, work.lengths, ks, ke) / taken / 1e12 or None
    tbps = gpu_workload.traffic(work) / taken / 1e12
    # Packed rows are multiplied as bf16; no product of int8 is measured.
    ceiling = {"float8_e4m3fn": "fp8_tflops", "int8": None}.get(case.dtype, "bf16_tflops")
    if case.op == "sparse_mla_fp8":
        ceiling = "bf16_tflops"
    gemm = ceilings[ceiling] if ceiling else None
    return {
        "ours_ms": 1e3 * taken,
        "tflops": tflops,
        "tbps": tbps,
        "of_gemm": tflops / gemm if tflops and gemm else None,
        "of_copy": tbps / copy if (copy := ceilings["copy_tbps"]) else None,
        "max_error": finding.error,
        "error_of_allowed": finding.of_allowed,
        "near_ties": finding.near_ties,
    }


def _ours(work: Workload) -> Callable[[], Any]:
    function = getattr(functions, work.op)
    return lambda: function(**work.inputs, **work.attrs)


def _peer(name: str, work: Workload, checker: Checker, gpu: Gpu) -> Callable[[], Any]:
    """A peer's call, which gave the right result once."""
    try:
        peer = gpu_peers.prepare(name, work, gpu.capability)
        checker.peer(name, peer.result(peer.call()))
        return peer.call
    except Skipped:
        raise
    except check.CheckError as error:
        raise Skipped(f"its result is wrong: {error}") from error
    except gpu.out_of_memory as error:
        raise Skipped("out of memory") from error
    except Exception as error:  # other people's code: whatever it raises is why it is left out
        _check_alive(gpu, f"{name}: {_first_line(error)}")
        raise Skipped(f"{type(error).__name__}: {_first_line(error)}") from error
    finally:
        gpu.free()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _check_alive(gpu: Gpu, after: str) -> None:
    """Raise `DsaError` where the GPU's error is one that every later call in this process would get as well."""
    try:
        gpu.synchronize()
    except Exception as error:  # torch's own errors of CUDA have no common base but this
        raise DsaError(f"bench: the GPU does not go on after an error ({after}); run the rest by itself") from error


def _say_header(progress: Progress, op: str) -> None:
    titles = [gpu_peers.TITLES[name] for name in gpu_peers.BY_OPERATOR[op]]
    progress.say("")
    progress.say(aligned([*_HEADER, *(cell for t in titles for cell in (f"{t} ms", "x"))], _widths(op)))


def _say(progress: Progress, row: Mapping[str, Any]) -> None:
    progress.say(aligned(cells(row), _widths(row["op"])))


def _widths(op: str) -> Sequence[int]:
    titles = [gpu_peers.TITLES[name] for name in gpu_peers.BY_OPERATOR[op]]
    return [*_WIDTHS, *(width for title in titles for width in (max(len(title) + 3, 9), 5))]


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as cells of the table."""
    found = [row["op"], row["dtype"], str(row["s_q"]), str(row["s_kv"])]
    if row["ours_ms"] is None:
        found += ["FAILED" if row["failed"] else "-", "-", "-", "-", "-"]
    else:
        found += [digits(row["ours_ms"]), *("-" if row[n] is None else digits(row[n]) for n in ("tflops", "tbps"))]
        found += ["-" if row[n] is None else f"{100 * row[n]:.0f}%" for n in ("of_gemm", "of_copy")]
    return found + figures.peer_cells(row, gpu_peers.BY_OPERATOR[row["op"]])
