"""What a candidate is worth: checked against the reference, then timed in turns with the default decisions.

Runs in a worker process, on this machine or through TVM's RPC on another. A candidate library holds two kernel sets,
0 the default and 1 the candidate, and TVM's runtime is all that the other machine needs to run them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from ..benchmark import check as gate
from ..benchmark.workload import Workload
from ..errors import DsaError
from .fleet import Remote
from .tasks import Effort, Task, irregular, repetitive

DEFAULT, CANDIDATE = 0, 1

#: A sample lasts at least this long, so that the clock and the first touch of the caches do not count.
_SAMPLE_SECONDS = 0.01
#: A candidate this much slower than the default after two rounds is not worth a third.
_HOPELESS = 1.4


class RemoteError(DsaError):
    """The machine, not the candidate, is at fault: no server of the key, or one that went away."""


class UnreachableError(RemoteError):
    """There is no machine to ask: nothing of the candidate has run."""


def measure(library: str, task: Task, effort: Effort, remote: Remote | None = None) -> dict[str, dict[int, Any]]:
    """Check and time one candidate.

    Returns
    -------
    dict
        ``"seconds"`` and ``"default_seconds"``: number of threads to the seconds of one call in each round;
        ``"gflops"``: the multiply-add limit of a machine of a fleet, which may be another one every time.

    Raises
    ------
    gate.CheckError
        The candidate's result is wrong.
    RemoteError
    """
    with _opened(library, remote) as (module, device):
        *odd, timed = _problems(task)
        for problem in odd:
            _checked(module, device, problem, _arguments(problem.work, device), CANDIDATE, 2)
        arguments = _on_this_machine(task) if remote is None else _arguments(timed.work, device)
        written = _checked(module, device, timed, arguments, CANDIDATE, max(effort.threads))
        outputs = [_poisoned(timed.work, device), written]
        times: dict[str, dict[int, Any]] = {"seconds": {}, "default_seconds": {}, "gflops": {}}
        if remote is not None:
            times["gflops"] = {n: float(module["peak"](n, 100)) for n in effort.threads}
        for count in effort.threads:
            pairs = _in_turns(module, count, [[*arguments, *x] for x in outputs], effort)
            times["default_seconds"][count] = [pair[DEFAULT] for pair in pairs]
            times["seconds"][count] = [pair[CANDIDATE] for pair in pairs]
    return times


def machine(library: str, threads: Sequence[int], remote: Remote | None = None) -> dict[int, float]:
    """GFLOP/s of multiply-adds in registers by number of threads; without `threads` for one and for all CPUs."""
    with _opened(library, remote) as (module, _):
        counts = threads or sorted({1, int(module["cpus"]())})
        return {n: float(module["peak"](n, 100)) for n in counts}


def check(module: Any, device: Any, work: Workload, which: int, threads: int) -> None:
    """Hold one kernel set's results against the float64 reference.

    Raises
    ------
    gate.CheckError
    """
    problem = _Problem.of(work, range(work.lengths["s_q"]))
    _checked(module, device, problem, _arguments(work, device), which, threads)


@dataclass(frozen=True)
class _Problem:
    """Inputs, the queries to look at, and what the reference says of them."""

    work: Workload
    rows: Sequence[int]
    references: tuple[Any, ...]

    @classmethod
    def of(cls, work: Workload, rows: Sequence[int]) -> _Problem:
        return cls(work, rows, gate.references(work, rows))


@functools.lru_cache(maxsize=1)
def _problems(task: Task) -> tuple[_Problem, ...]:
    """The latest task's odd inputs and, last, those that are timed; made once and not for every candidate."""
    odd = [_Problem.of(work, range(work.lengths["s_q"])) for work in (irregular(task), repetitive(task))]
    return *odd, _Problem.of(task.inputs(), sorted({0, task.s_q - 1}))


def _checked(
    module: Any, device: Any, problem: _Problem, arguments: Sequence[Any], which: int, threads: int
) -> list[Any]:
    """The outputs of one kernel set, after they have been held against the reference."""
    outputs = _poisoned(problem.work, device)
    module["call"](which, threads, *arguments, *outputs)
    gate.check(problem.work, [x.numpy() for x in outputs], problem.rows, known=problem.references)
    return outputs


def _in_turns(
    module: Any, threads: int, arguments: Sequence[Sequence[Any]], effort: Effort
) -> list[tuple[float, float]]:
    def sample(which: int, number: int) -> float:
        return float(module["time"](which, threads, number, *arguments[which]))

    once = [sample(which, 1) for which in (DEFAULT, CANDIDATE)]
    number = max(1, math.ceil(_SAMPLE_SECONDS / max(min(once), 1e-9)))
    low, high = effort.rounds
    rounds = min(max(low, int(effort.seconds / (number * sum(once)))), high)
    # A long call needs no warming up.
    pairs = [(once[DEFAULT], once[CANDIDATE])] if number == 1 else []
    while len(pairs) < rounds:
        # The order alternates: what the first leaves in the caches must not favour one of them.
        order = (CANDIDATE, DEFAULT) if len(pairs) % 2 else (DEFAULT, CANDIDATE)
        taken = {which: sample(which, number) for which in order}
        pairs.append((taken[DEFAULT], taken[CANDIDATE]))
        if len(pairs) == 2 and min(b / a for a, b in pairs) > _HOPELESS:
            break
    return pairs


@functools.lru_cache(maxsize=1)
def _on_this_machine(task: Task) -> list[Any]:
    """The arguments that are timed, which stay where they are from candidate to candidate."""
    return _arguments(_problems(task)[-1].work, tvm.cpu())


def _arguments(work: Workload, device: Any) -> list[Any]:
    """Inputs and attributes in the operator's order; None for an optional input that is left out."""
    tensors = {name: tvm.runtime.tensor(x, device) for name, x in work.inputs.items()}
    return [*(tensors.get(t.name) for t in work.spec.inputs), *(work.attrs[a.name] for a in work.spec.attrs)]


def _poisoned(work: Workload, device: Any) -> list[Any]:
    """Outputs that hold what no kernel writes."""
    found = []
    for t in work.spec.outputs:
        lengths = {**work.lengths, **{a.dim: work.attrs[a.name] for a in work.spec.attrs if a.dim}}
        shape = tuple(lengths[d] for d in t.shape)
        dtype = np.dtype(np.int32) if t.dtype == "int32" else np.dtype(np.float32)
        x = np.full(shape, -77, dtype) if t.dtype == "int32" else np.full(shape, np.nan, dtype)
        found.append(tvm.runtime.tensor(x, device))
    return found


@contextlib.contextmanager
def _opened(library: str, remote: Remote | None) -> Iterator[tuple[Any, Any]]:
    if remote is None:
        # Unloaded when nobody holds it: a worker sees thousands.
        yield tvm_ffi.load_module(library, keep_module_alive=False), tvm.cpu()
        return
    from tvm import rpc

    name = Path(library).name
    try:
        tracker = rpc.connect_tracker(remote.host, remote.port)
        session = tracker.request(remote.key, session_timeout=remote.session_seconds)
        session.upload(library)
        module = session.load_module(name)
    except Exception as error:
        raise UnreachableError(f"rpc: {error}") from error
    try:
        yield module, session.cpu()
        session.remove(name)
    except gate.CheckError:
        raise
    except Exception as error:
        # Whether the candidate or the machine ended the session, nobody can tell from here.
        raise RemoteError(f"rpc: {type(error).__name__}: {error}") from error
