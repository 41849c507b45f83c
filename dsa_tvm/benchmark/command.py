"""``dsa-tvm bench``: the operators and others that do the same work, in one run on one machine, checked first."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError
from ..terminal.progress import Progress
from . import clock, figures
from .check import Checker, CheckError
from .cpu import CpuSuite
from .cuda import CudaSuite
from .growth import command as growth
from .peers import Peer, Skipped
from .suite import Case, LostError, Suite
from .workload import Workload


def run(args: argparse.Namespace) -> None:
    """Time what the command line asks for; print a table, and write it with ``--json``.

    Parameters
    ----------
    args : argparse.Namespace
        suite, op, s_q, s_kv, threads, preset, dtype, seconds, json, growth, and topk and out for that, as `dsa_tvm.cli`
        parses them.

    Raises
    ------
    ArgumentError
        An unknown operator, preset or type, or a number out of range.
    CheckError
        An operator gave a wrong result. It has no time in the table; the others do.
    DsaError
        There is no GPU to measure, or it stopped working.
    LibraryError
        As `dsa_tvm.runtime.library.load`, or the library has no CUDA kernels.
    """
    for name in ("out", "topk"):
        if getattr(args, name, None) and not args.growth:
            raise ArgumentError(f"bench: {name}: expected --growth beside it, got none")
    if args.growth:
        growth.run(args)
        return
    suite: Suite = CudaSuite(args) if args.suite == "cuda" else CpuSuite(args)
    for line in suite.heading():
        print(line)
    rows: list[dict[str, Any]] = []
    try:
        with Progress(len(suite.cases)) as progress:
            operator = None
            for case in suite.cases:
                if case.op != operator:
                    for line in suite.header(case.op, first=operator is None):
                        progress.say(line)
                    operator = case.op
                progress.step(suite.title(case))
                rows.append(measure(case, suite))
                progress.say(suite.line(rows[-1]))
    finally:
        # After Ctrl-C as well: what has been measured has been measured.
        if args.json and rows:
            figures.write(args.json, {**suite.document(), "rows": rows})
    for line in [*figures.notes(rows, suite.titles), *suite.remarks(rows)]:
        print(line)
    figures.raise_for_wrong(rows)


def measure(case: Case, suite: Suite) -> dict[str, Any]:
    """One row of the results.

    Parameters
    ----------
    case : Case
    suite : Suite

    Returns
    -------
    dict
        The keys of `Suite.blank` and `Suite.figures`, and of the check: "failed" where our result was wrong, "skipped"
        where there is none; "peers" by name: ms and ratio, or "skipped".

    Raises
    ------
    LostError
        The device stopped working.
    Exception
        Whatever our call raised that `Suite.reason` lets end the run.
    """
    row = suite.blank(case)
    try:
        return row | _measured(case, suite, row["peers"])
    except CheckError as error:
        return row | {"failed": str(error)}
    except LostError:
        raise
    except Exception as error:
        reason = suite.reason(error)
        if reason is None:
            raise
        return row | {"skipped": reason}
    finally:
        suite.release()


def _measured(case: Case, suite: Suite, peers: dict[str, Any]) -> dict[str, Any]:
    work, checker = suite.inputs(case)
    ours = suite.ours(case, work)
    outputs = ours()
    finding = checker.ours(outputs if isinstance(outputs, tuple) else (outputs,))
    del outputs
    calls: dict[str, Callable[[], Any]] = {"ours": ours}
    products: dict[str, str] = {}
    for name in suite.peers(case.op):
        try:
            peer = _peer(name, case, suite, work, checker)
        except Skipped as reason:
            peers[name] = {"skipped": str(reason)}
        else:
            calls[name], products[name] = peer.call, peer.product
    times = clock.medians(suite.clock, calls, suite.seconds)
    seconds = times.pop("ours")
    peers |= figures.peer_figures(times, seconds)
    for name in times:
        peers[name] |= {"product": products[name]} if products[name] else {}
    return {
        "ours_ms": 1e3 * seconds,
        "max_error": finding.error,
        "error_of_allowed": finding.of_allowed,
        "near_ties": finding.near_ties,
        **suite.figures(case, work, seconds),
    }


def _peer(name: str, case: Case, suite: Suite, work: Workload, checker: Checker) -> Peer:
    """A peer whose call gave the right result once."""
    try:
        peer = suite.peer(name, case, work)
        result = peer.call()
        if peer.result is not None:
            checker.peer(name, peer.result(result))
        return peer
    except Skipped:
        raise
    except CheckError as error:
        raise Skipped(f"its result is wrong: {error}") from error
    except suite.out_of_memory as error:
        raise Skipped("out of memory") from error
    except Exception as error:  # other people's code: whatever it raises is why it is left out
        line = str(error).strip().partition("\n")[0][:200]
        suite.check_alive(f"{name}: {line}")
        raise Skipped(f"{type(error).__name__}: {line}") from error
    finally:
        suite.release()
