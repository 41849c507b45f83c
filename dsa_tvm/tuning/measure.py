"""Measures a candidate on a CPU: checks it against the reference, then times it in turns with DEFAULT.

This runs in a worker process, on this machine or through TVM's RPC on another one, which needs nothing but TVM's
runtime. A candidate library has two kernel sets, 0 for DEFAULT and 1 for the candidate.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm
import tvm_ffi

from ..benchmark.check import CheckError
from ..errors import DsaError
from ..ops.element_types import PRODUCTS, STORAGE, product_of
from .fleet import Remote
from .problem import Problem, problems
from .tasks import Effort, Task, Types
from .turns import Timer, in_turns

DEFAULT, CANDIDATE = 0, 1


class RemoteError(DsaError):
    """The machine is at fault, not the candidate: no server has the key, or a server went away."""


class UnreachableError(RemoteError):
    """No machine could be reached, so the candidate did not run."""


def measure(library: str, task: Task, effort: Effort, remote: Remote | None = None) -> dict[str, dict[int, Any]]:
    """Check and time one candidate.

    Returns
    -------
    dict
        ``"seconds"`` and ``"default_seconds"``: the seconds of one call in each round, by number of threads;
        ``"gflops"``: the multiply-add limit of the machine, if it belongs to a fleet and may differ each time.

    Raises
    ------
    CheckError
        The result of the candidate is wrong.
    RemoteError
        The machine is not there, or went away.
    """
    with _opened(library, remote) as (module, device):
        *odd, timed = problems(task)
        for problem in odd:
            check(module, device, problem, CANDIDATE, 2)
        arguments = _on_this_machine(task) if remote is None else _arguments(timed, device)
        written = _checked(module, device, timed, arguments, CANDIDATE, max(effort.threads))
        outputs = [_poisoned(timed, device), written]
        times: dict[str, dict[int, Any]] = {"seconds": {}, "default_seconds": {}, "gflops": {}}
        if remote is not None:
            times["gflops"] = _peaks(module, effort.threads, task.types)
        for count in effort.threads:
            timers = [_timer(module, which, count, [*arguments, *x]) for which, x in enumerate(outputs)]
            pairs = in_turns(timers, effort)
            times["default_seconds"][count] = [pair[DEFAULT] for pair in pairs]
            times["seconds"][count] = [pair[CANDIDATE] for pair in pairs]
    return times


def machine(
    library: str, threads: Sequence[int], types: Iterable[Types], remote: Remote | None = None
) -> dict[Types, dict[int, float]]:
    """GFLOP/s of multiply-adds in registers, for each of `types` what its kernels multiply by, by number of threads.

    Without `threads` for one and for all CPUs.
    """
    with _opened(library, remote) as (module, _):
        counts = threads or sorted({1, int(module["cpus"]())})
        return {of: _peaks(module, counts, of) for of in types}


def _peaks(module: Any, threads: Sequence[int], types: Types) -> dict[int, float]:
    """By number of threads. A target without dot products of these types multiplies in float32."""
    products = (
        [PRODUCTS.index(product) for product in dict.fromkeys((product_of(types[0]), "float32"))] if types else [0]
    )
    return {n: next(rate for p in products if (rate := float(module["peak"](p, n, 100)))) for n in threads}


def check(module: Any, device: Any, problem: Problem, which: int, threads: int) -> None:
    """Check the results of one kernel set against the float64 reference.

    Raises
    ------
    CheckError
        A result is wrong.
    """
    _checked(module, device, problem, _arguments(problem, device), which, threads)


def _checked(
    module: Any, device: Any, problem: Problem, arguments: Sequence[Any], which: int, threads: int
) -> list[Any]:
    """The outputs of one kernel set, after a check against the reference."""
    outputs = _poisoned(problem, device)
    module["call"](which, threads, *arguments, *outputs)
    # CPUs sum in f32 for every element type.
    dtype = "float32" if problem.work.op == "lightning_indexer" else ""
    problem.check([x.numpy()[list(problem.rows)] for x in outputs], dtype)
    return outputs


def _timer(module: Any, which: int, threads: int, arguments: Sequence[Any]) -> Timer:
    return lambda number: float(module["time"](which, threads, number, *arguments))


@functools.lru_cache(maxsize=1)
def _on_this_machine(task: Task) -> list[Any]:
    """The arguments for timing, which stay in place from candidate to candidate."""
    return _arguments(problems(task)[-1], tvm.cpu())


def _arguments(problem: Problem, device: Any) -> list[Any]:
    """Inputs and attributes in the operator's order; None for an optional input that is left out."""
    tensors = [given and _tensor(*given, device) for given in problem.inputs()]
    return [*tensors, *(problem.work.attrs[a.name] for a in problem.work.spec.attrs)]


def _poisoned(problem: Problem, device: Any) -> list[Any]:
    """Outputs filled with values that no kernel writes: -77 for indices, NaN for any floating-point type."""
    found = []
    for dtype, shape in problem.results():
        bits = np.empty(shape, STORAGE[dtype])
        bits.view(np.uint8)[...] = 0xFF
        if dtype == "int32":
            bits[...] = -77
        found.append(_tensor(dtype, bits, device))
    return found


def _tensor(dtype: str, bits: np.ndarray, device: Any) -> Any:
    """A tensor of an element type that NumPy may lack."""
    return tvm.runtime.tensor(bits if bits.dtype.name == dtype else bits.view(getattr(ml_dtypes, dtype)), device)


@contextlib.contextmanager
def _opened(library: str, remote: Remote | None) -> Iterator[tuple[Any, Any]]:
    if remote is None:
        # Unload it when nobody holds it, because a worker sees thousands.
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
    except CheckError:
        raise
    except Exception as error:
        # Here nobody can tell whether the candidate or the machine ended the session.
        raise RemoteError(f"rpc: {type(error).__name__}: {error}") from error
