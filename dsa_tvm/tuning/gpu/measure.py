"""Measures a candidate on this machine's GPU: checks it against the reference, then times it in turns with DEFAULT.

This runs in a worker process that needs NumPy, the CUDA driver, and the libraries of DEFAULT and of the candidate. It
imports neither TVM nor torch.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...benchmark import workload
from ...benchmark.check import CheckError
from ...gpu.architectures import tensor_flops
from ...gpu.driver import Event, Gpu, Memory, Stream
from ...runtime.loading import CheckedFile
from ...spec import DLPACK_TYPES, ELEMENT_BYTES
from ..problem import Problem, problems
from ..tasks import Effort, Task
from ..turns import Timer, in_turns
from .call import Library, Operands

#: The fewest and the most calls of a sample. The first sample does not count.
_SAMPLE_CALLS = (2, 200)
#: No launch takes less time.
_LEAST_SECONDS = 1e-6


def facts() -> dict[str, Any]:
    """The GPU's name, compute capability (90 for 9.0) and number of multiprocessors.

    Raises
    ------
    LibraryError
        There is no driver or no GPU. The message says which.
    """
    gpu = Gpu()
    return {"name": gpu.name, "capability": gpu.capability, "multiprocessors": gpu.multiprocessors}


def measure(
    default: str | CheckedFile, candidate: str | CheckedFile, task: Task, effort: Effort
) -> dict[str, dict[int, Any]]:
    """Check and time one candidate.

    Parameters
    ----------
    default, candidate : str or CheckedFile
        Libraries from `build.cuda.candidates`.
    task : Task
    effort : Effort
        Its only number of threads is the key of the results.

    Returns
    -------
    dict
        ``"seconds"`` and ``"default_seconds"``: the seconds of one call in each round, with a cold cache; ``"roof"``:
        the fewest seconds that the GPU can take.

    Raises
    ------
    CheckError
        The result of the candidate is wrong.
    LibraryError
        A library is not the one that was built.
    KernelError
        The library of the candidate refuses a call.
    CudaError
        A kernel failed. This process can do nothing more on the GPU.
    """
    (key,) = effort.threads
    machine = _machine()
    libraries = Library(default), Library(candidate)
    on_gpu = _on_gpu(task)
    for problem, operands in on_gpu:
        check(libraries[1], problem, operands, machine.stream)
    _, timed = on_gpu[-1]
    least, most = _SAMPLE_CALLS
    timers = [machine.timer(library.prepare(timed, machine.stream)) for library in libraries]
    pairs = in_turns(timers, effort, least=least, most=most)
    return {
        "default_seconds": {key: [pair[0] for pair in pairs]},
        "seconds": {key: [pair[1] for pair in pairs]},
        "roof": {key: roof(task, machine.gpu)},
    }


def check(library: Library, problem: Problem, operands: Operands, stream: Stream) -> None:
    """Check the results of one library against the float64 reference, and the guard areas behind its outputs.

    Raises
    ------
    CheckError
        A result is wrong, or a guard area was written.
    """
    call = library.prepare(operands, stream)
    operands.poison(stream)
    call.poison(stream)
    call.run()
    stream.synchronize()
    problem.check(operands.outputs(problem.rows))
    for name, memory in (*operands.written.items(), ("workspace", call.workspace)):
        if memory is not None and memory.is_overrun():
            raise CheckError(f"{problem.work.op}: {name}: memory behind its end was written")


@dataclass(frozen=True)
class _Machine:
    gpu: Gpu
    stream: Stream
    #: Twice the size of the GPU's cache. Filling it leaves nothing else in the cache.
    flush: Memory

    def timer(self, call: Any) -> Timer:
        """A timer for a call. It returns the median of its samples, each with a cold cache."""

        def sample(number: int) -> float:
            events = [(Event(), Event()) for _ in range(number)]
            for i, (start, stop) in enumerate(events):
                # The fill also keeps the GPU busy while the launches are enqueued.
                self.stream.fill(self.flush, i % 256)
                self.stream.record(start)
                call.run()
                self.stream.record(stop)
            self.stream.synchronize()
            return statistics.median(stop.seconds_since(start) for start, stop in events)

        return sample


@functools.cache
def _machine() -> _Machine:
    # The context stays current, because the process does nothing else.
    gpu = Gpu().__enter__()
    return _Machine(gpu, Stream(), Memory(2 * max(gpu.l2_bytes, 1 << 20)))


@functools.lru_cache(maxsize=1)
def _on_gpu(task: Task) -> list[tuple[Problem, Operands]]:
    """`problems` with their tensors in GPU memory."""
    return [(problem, Operands(problem)) for problem in problems(task)]


def roof(task: Task, gpu: Gpu) -> float:
    """The fewest seconds of a call, limited by the GPU's tensor cores, its memory, and a launch.

    The cache may already hold as much of the inputs as fits, and may keep the outputs.
    """
    seconds = _LEAST_SECONDS
    ke = workload.causal_ends(task.s_q, task.s_kv)
    if task.types and gpu.clock_hertz:
        lengths = {**task.shape, "topk": task.preset.topk}
        rate = tensor_flops(gpu.capability, DLPACK_TYPES[task.types[0]][1]) * gpu.multiprocessors * gpu.clock_hertz
        seconds = max(seconds, workload.flops(task.op, lengths, np.zeros_like(ke), ke) / rate)
    if gpu.bytes_per_second:
        seconds = max(seconds, (_bytes_read(task, ke) - gpu.l2_bytes) / gpu.bytes_per_second)
    return seconds


def _bytes_read(task: Task, ke: np.ndarray) -> int:
    p, s_q = task.preset.lengths, task.s_q
    if task.op == "topk":
        return 4 * int(ke.astype(np.int64).sum())
    width = {name: ELEMENT_BYTES[dtype] for name, dtype in task.variant.items()}
    if task.op == "lightning_indexer":
        return width["T"] * s_q * p["h_idx"] * p["d_idx"] + width["K"] * int(ke[-1]) * p["d_idx"]
    # At least the keys of one query.
    return width["T"] * p["d_qk"] * (s_q * p["h_q"] + min(int(ke[-1]), p["topk"]))
