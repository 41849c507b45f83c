"""CUDA source of kernels, made by as many processes as there are CPUs: TVM takes most of a second for each kernel."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dsa_tvm

from ...errors import BuildError
from ...runtime.machine import usable_cpus

#: A symbol and the function that makes its PrimFunc, which another process must be able to import.
Job = tuple[str, Callable[[], Any]]

#: Fewer kernels are done here before another process has imported TVM.
_WORTH_PROCESSES = 8

# multiprocessing would run the caller's main module again. In a checkout the package is in two places, so a new process
# has to be told where.
_CHILD = """
import pickle, sys
sys.path[:], path = pickle.load(sys.stdin.buffer)
import dsa_tvm
dsa_tvm.__path__ = path
from dsa_tvm.build.cuda.text import serve
serve()
"""


def definitions(jobs: Mapping[Any, Job]) -> dict[Any, str]:
    """The definition of every kernel, by the same keys.

    Raises
    ------
    BuildError
        TVM cannot make one of the kernels.
    """
    cpus = min(usable_cpus(), len(jobs))
    if cpus < 2 or len(jobs) < _WORTH_PROCESSES:
        return dict(zip(jobs, _definitions(list(jobs.values())), strict=True))
    keys = list(jobs)
    shares = [keys[i::cpus] for i in range(cpus)]
    started = [_start([jobs[key] for key in share]) for share in shares]
    made: dict[Any, str] = {}
    for share, child in zip(shares, started, strict=True):
        out, words = child.communicate()
        if child.returncode:
            for other in started:
                other.kill()
            raise BuildError(f"a CUDA kernel could not be made:\n{words.decode(errors='replace')}")
        made |= zip(share, pickle.loads(out), strict=True)
    return {key: made[key] for key in keys}


def _start(jobs: Sequence[Job]) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin
    pickle.dump((sys.path, list(dsa_tvm.__path__)), child.stdin)
    pickle.dump(jobs, child.stdin)
    child.stdin.flush()
    return child


def serve() -> None:
    """Run in such a process: read jobs, write definitions."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    pickle.dump(_definitions(pickle.load(sys.stdin.buffer)), out)


def _definitions(jobs: Sequence[Job]) -> list[str]:
    from ...schedules.cuda import source

    return [source.device_code(symbol, make()) for symbol, make in jobs]
